"""The C++ twin of ppo_loss: the loss, its statistics and its gradient in one pass over the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels.ppo.operator import fused, results


def forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    entropy: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor | None,
    count: int,
    settings: Sequence[float],
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in operator.results, and filled."""
    tokens = (logprobs, old_logprobs, advantages, values, old_values, returns, entropy)
    loss, stats, slopes = results(*tokens, mask, normalizer, count, settings, learns)
    clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef = settings

    def flat(tensor: Tensor) -> NDArray:
        return tensor.detach().to(loss.dtype).contiguous().view(-1).numpy()

    _C.ppo_loss(
        flat(logprobs),
        flat(old_logprobs),
        flat(advantages),
        flat(values),
        flat(old_values),
        flat(returns),
        None if entropy is None else flat(entropy),
        None if mask is None else mask.contiguous().view(-1).numpy(),
        clip_low,
        clip_high,
        dual_clip,
        value_clip,
        value_coef,
        entropy_coef,
        count if normalizer is None else max(normalizer.item(), 1),
        torch.get_num_threads(),
        flat(loss),
        flat(stats),
        flat(slopes) if learns else None,
    )
    return loss, stats, slopes


ppo_loss = fused("cpu", forward)
