"""The divergence of two blocks of logits in PyTorch: a pass over the block for every operation."""

from __future__ import annotations

import torch
from torch import Tensor


def measure(p: Tensor, q: Tensor, temperature: float, kl: Tensor, moments: Tensor) -> None:
    """See Pass in operator.py."""
    for logits, at in ((p, 0), (q, 2)):
        moments[:, at] = logits.amax(-1)
        moments[:, at + 1] = ((logits - moments[:, at, None]) / temperature).logsumexp(-1)
    probability, log_ratio = _softmax(p, moments[:, :2], temperature), _distance(p, q, moments)
    moments[:, 4] = torch.linalg.vecdot(probability, log_ratio.where(probability > 0, 0))
    kl.copy_(moments[:, 4] / temperature - moments[:, 1] + moments[:, 3])


def gradient(
    p: Tensor,
    q: Tensor,
    temperature: float,
    moments: Tensor,
    slopes: Tensor,
    dp: Tensor | None,
    dq: Tensor | None,
) -> None:
    """P (log P - log Q - KL) by p's logits, Q - P by q's; both times slope / temperature."""
    slopes, probability = slopes[:, None] / temperature, _softmax(p, moments[:, :2], temperature)
    from_p = None if dp is None else _distance(p, q, moments).sub_(moments[:, 4, None]).div_(temperature)
    if dq is not None:
        torch.mul(_softmax(q, moments[:, 2:4], temperature).sub_(probability), slopes, out=dq)
    if from_p is not None:
        torch.mul(from_p.mul_(probability).where(probability > 0, 0), slopes, out=dp)


def _softmax(logits: Tensor, moments: Tensor, temperature: float) -> Tensor:
    return (logits - moments[:, :1]).div_(temperature).sub_(moments[:, 1:]).exp_()


def _distance(p: Tensor, q: Tensor, moments: Tensor) -> Tensor:
    """The logits of p less those of q, both relative to the largest one of their row."""
    return (p - moments[:, :1]).sub_(q - moments[:, 2:3])
