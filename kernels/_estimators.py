"""The three per-token estimates of a Kullback-Leibler divergence, and their slopes; what they mean stands in kl."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("k1", "k2", "k3")
EXPONENT_LIMIT = 20.0  # exp(20) = 5e8; without a limit k3 overflows where the reference is much likelier


def estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, with d = logprobs - ref_logprobs."""
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    return (-d).clamp(max=EXPONENT_LIMIT).expm1() + d


def slope(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """The derivative of the estimate by logprobs: 1, d, and 1 - exp(-d)."""
    d = logprobs - ref_logprobs
    if kind == "k1":
        return torch.ones_like(d)
    if kind == "k2":
        return d
    return torch.where(-d <= EXPONENT_LIMIT, -(-d).expm1(), 1)
