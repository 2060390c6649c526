"""Mismatch: how far the trainer's log-probs of sampled tokens lie from the sampler's, under the same weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEALTHY = (0.8, 1.25)  # ratios of a token's two probabilities


def measure(trainer: Tensor, sampler: Tensor) -> dict[str, Tensor]:
    """(R,) log-probs twice -> 0-dimensional numbers, all 0 where both agree.

    mean, p99 and max of the absolute gap in nats; kl: the k3 estimate of KL(sampler || trainer) per token; outside: the
    share of ratios that leave HEALTHY.
    """
    gap = trainer.detach() - sampler
    if gap.numel() == 0:
        return dict.fromkeys(("mean", "p99", "max", "kl", "outside"), gap.new_zeros(()))
    size, ratio = gap.abs(), gap.exp()
    return {
        "mean": size.mean(),
        "p99": size.kthvalue(math.ceil(0.99 * len(size))).values,
        "max": size.max(),
        "kl": (gap.expm1() - gap).mean(),
        "outside": ((ratio < HEALTHY[0]) | (ratio > HEALTHY[1])).to(gap.dtype).mean(),
    }


def importance(trainer: Tensor, sampler: Tensor, cap: float) -> Tensor:
    """(R,) truncated importance weights min(p_trainer / p_sampler, cap), for gradients from another one's samples.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; Ionides 2008.
    """
    return torch.exp(trainer - sampler).clamp(max=cap)


def warning(mean: float, alarm: float) -> str:
    """What a person should hear of a gap above `alarm`."""
    return (
        f"sampler and trainer disagree by {mean:.1e} nats per token, more than mismatch_alarm = {alarm:g}; "
        "old_logprobs=recompute takes the ratio to the trainer's own log-probs, importance_cap weighs what is left"
    )
