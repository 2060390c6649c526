"""The oracle: the clipped policy loss and the KL term, aggregated the way each member of the family does."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._actions import Actions
from twinhead.kernels._estimators import estimate
from twinhead.kernels._precision import wide
from twinhead.kernels._surrogate import statistics, surrogate


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    loss_type: str,
    normalizer: Tensor | int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """[B, T] with a mask (or None), or (R,) with cu_seqlens -> the loss, 0-dimensional, and its statistics."""
    dtype, actions = wide(logprobs), Actions(logprobs, mask)
    lengths = _lengths(logprobs, actions.mask, cu_seqlens)

    def per_token(responses: Tensor) -> Tensor:
        if cu_seqlens is None:
            return responses[:, None].expand(logprobs.shape)
        return responses.repeat_interleave(lengths, output_size=len(logprobs))

    if advantages.shape != logprobs.shape:
        advantages = per_token(advantages)
    tokens = (logprobs, old_logprobs.detach(), advantages.detach())
    logprobs, old_logprobs, advantages = (actions.select(x.to(dtype)) for x in tokens)
    divisor = actions.divisor(_own_normalizer(loss_type, lengths, logprobs) if normalizer is None else normalizer)
    weight = per_token(1 / lengths.clamp(min=1).to(dtype)) if loss_type == "grpo" else torch.ones_like(logprobs)

    policy = surrogate(logprobs, old_logprobs, advantages, epsilon_low, epsilon_high, None)
    loss = (weight * policy.loss).sum() / divisor
    measured = {"pg_loss": loss}
    if ref_logprobs is not None:
        kl = estimate(logprobs, actions.select(ref_logprobs.detach().to(dtype)), "k3")
        loss = loss + beta * (weight * kl).sum() / divisor
        measured["ref_kl"] = actions.mean(kl)
    return loss, statistics(policy, actions, actions.count, **measured)


def _lengths(tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The number of actions of every response, (S,) or (B,)."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    return (torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask).sum(1)


def _own_normalizer(loss_type: str, lengths: Tensor, tokens: Tensor) -> Tensor | int:
    """What this call alone divides by: its responses, its responses times the longest possible one, or its actions."""
    if loss_type == "grpo":
        return (lengths > 0).sum()
    if loss_type == "dapo":
        return lengths.sum()
    # a padded batch is as wide as a response may be; a packed one only knows its longest, and 0 if it has none
    return tokens.numel() if tokens.ndim == 2 else len(lengths) * torch.nn.functional.pad(lengths, (0, 1)).amax()
