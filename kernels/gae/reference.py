"""The oracle: backwards through time, one step for all sequences at once, and whitening."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._actions import Actions
from twinhead.kernels._precision import wide

WHITEN_EPSILON = 1e-8  # keeps the scale of equal numbers finite


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    whitens: bool,
) -> tuple[Tensor, Tensor]:
    """[B, T] with a mask (or None), or (R,) with cu_seqlens; bootstrap (B,) or (S,). Two tensors like rewards."""
    dtype = wide(rewards, values)
    rewards, values = rewards.to(dtype), values.to(dtype)
    if cu_seqlens is None:
        mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
        advantages, returns = _padded(rewards, values, gamma, lam, mask, bootstrap)
    else:
        advantages, returns = _packed(rewards, values, gamma, lam, cu_seqlens, bootstrap)
    if whitens:
        advantages = whiten(advantages, mask, shift_mean=True, unbiased=False)
    return advantages, returns


def _packed(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, cu_seqlens: Tensor, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens.diff().long()
    width = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(width, device=rewards.device) < lengths[:, None]  # [S, width]

    def padded(tokens: Tensor) -> Tensor:
        return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens)

    advantages, returns = _padded(padded(rewards), padded(values), gamma, lam, mask, bootstrap)
    return advantages[mask], returns[mask]


def _padded(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, mask: Tensor, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(rewards)
    advantage = rewards.new_zeros(len(rewards))
    next_value = advantage if bootstrap is None else bootstrap.to(rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        action = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(action, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(action, values[:, t], next_value)
        advantages[:, t] = torch.where(action, advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def whiten(x: Tensor, mask: Tensor | None, *, shift_mean: bool, unbiased: bool) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the actions, 0 elsewhere; without shift_mean the mean is put back."""
    actions = Actions(x, mask)
    x = actions.select(x.to(wide(x)))
    mean = actions.mean(x)
    variance = actions.mean((x - mean).square())
    if unbiased:
        variance = variance * actions.count / (actions.count - 1)
    whitened = (x - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return actions.select(whitened if shift_mean else whitened + mean)
