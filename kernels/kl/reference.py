"""The oracle: Kullback-Leibler divergence, estimated from samples or summed over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._estimators import estimate
from twinhead.kernels._precision import wide


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Two tensors of one shape -> the same shape."""
    dtype = wide(logprobs, ref_logprobs)
    return estimate(logprobs.to(dtype), ref_logprobs.to(dtype), kind)


def full_kl(logits: Tensor, ref_logits: Tensor, *, direction: str = "reverse", temperature: float = 1.0) -> Tensor:
    """(..., V) twice -> (...)."""
    dtype = wide(logits, ref_logits)
    logp = (logits.to(dtype) / temperature).log_softmax(-1)
    logq = (ref_logits.to(dtype) / temperature).log_softmax(-1)
    if direction == "forward":
        logp, logq = logq, logp
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0)).sum(-1)


def linear_kl(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (R, E)
    ref_weight: Tensor,  # (V, E)
    *,
    direction: str = "reverse",
    temperature: float = 1.0,
) -> Tensor:
    """full_kl of the two models' logits, (R,)."""
    dtype = wide(hidden, weight, ref_hidden, ref_weight)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    ref_logits = ref_hidden.to(dtype) @ ref_weight.to(dtype).t()
    return full_kl(logits, ref_logits, direction=direction, temperature=temperature)
