"""The oracle: the clipped policy loss, the clipped value loss, the entropy bonus, and what is measured beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._actions import Actions
from twinhead.kernels._precision import wide
from twinhead.kernels._surrogate import statistics, surrogate


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    mask: Tensor | None,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    normalizer: Tensor | int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tensors of one shape, (R,) or [B, T] -> the loss, 0-dimensional, and its statistics."""
    dtype, actions = wide(logprobs, values), Actions(logprobs, mask)
    tokens = (logprobs, old_logprobs, advantages, values, old_values, returns)
    logprobs, old_logprobs, advantages, values, old_values, returns = (actions.select(x.to(dtype)) for x in tokens)
    divisor = actions.divisor(normalizer)

    policy = surrogate(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip)
    value_loss, value_clipped = _value_loss(values, old_values, returns, value_clip)
    measured = {
        "pg_loss": policy.loss.sum() / divisor,
        "vf_loss": value_loss.sum() / divisor,
        "vf_clipfrac": actions.select(value_clipped.to(dtype)).sum() / divisor,
    }
    loss = measured["pg_loss"] + value_coef * measured["vf_loss"]
    if entropy is not None:
        entropy = actions.select(entropy.to(dtype))
        measured["entropy"] = entropy.sum() / divisor
        loss = loss - entropy_coef * measured["entropy"]
    return loss, statistics(policy, actions, divisor, **measured)


def _value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the larger squared error, of the value or of one kept within `clip` of the old; and is it the latter?"""
    error = (values - returns).square()
    if clip is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    # clamped to two borders, not moved by a clamped step: the step's rounding would look like a clip
    clipped_error = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    clipped = clipped_error > error
    return torch.where(clipped, clipped_error, error) / 2, clipped
