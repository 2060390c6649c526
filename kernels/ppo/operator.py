"""What torch knows of a fused ppo_loss: the shapes of its results, and its gradient, which the forward has formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from twinhead.kernels._head import refuse_second_derivative
from twinhead.kernels._precision import wide
from twinhead.kernels._surrogate import STATISTICS

LEARNED = (0, 3, 6)  # the places of logprobs, values and entropy among the arguments of a forward


def fused(
    backend: str, forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The ppo_loss of `backend`, from its forward, which takes and gives what `results` does, and is registered here.

    The statistics stand in the order of STATISTICS. The slopes are those of the loss by logprobs, values and entropy,
    0 at what is no action; without `learns` there are none.
    """
    operator = custom_op(f"twinhead::ppo_loss_{backend}", forward, mutates_args=())
    operator.register_fake(results)
    operator.register_autograd(_backward, setup_context=_save)

    def ppo_loss(
        logprobs: Tensor,
        *constants_and_values: Tensor,
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
        tokens = (logprobs, *constants_and_values, entropy)
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tokens)
        counted, count = (normalizer, 0) if isinstance(normalizer, Tensor) else (None, _count(normalizer))
        settings = [clip_low, clip_high, _or_inf(dual_clip), _or_inf(value_clip), value_coef, entropy_coef]
        mask = None if mask is None else mask.bool()
        loss, stats, _ = operator(*tokens, mask, counted, count, settings, learns)
        return loss, dict(zip(STATISTICS, stats.unbind(), strict=True))

    return ppo_loss


def _or_inf(clip: float | None) -> float:
    return inf if clip is None else clip


def _count(normalizer: int | None) -> int:
    return 0 if normalizer is None else max(normalizer, 1)


def results(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    entropy: Tensor | None,
    mask: Tensor | None,  # bool
    normalizer: Tensor | None,  # or
    count: int,  # the number of actions in the whole optimizer step; both None and 0: that of this call
    settings: Sequence[float],  # clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef; inf: not clipped
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss (), the statistics (10,), and the slopes (0, 2 or 3, *shape)."""
    dtype = wide(logprobs, values)
    rows = 0 if not learns else 2 if entropy is None else 3
    return (
        logprobs.new_empty((), dtype=dtype),
        logprobs.new_empty(len(STATISTICS), dtype=dtype),
        logprobs.new_empty((rows, *logprobs.shape), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, slopes = output
    ctx.save_for_backward(slopes)
    ctx.mark_non_differentiable(stats, slopes)
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)


def _backward(ctx: Any, slope: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("ppo_loss")
    (slopes,) = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.arguments
    if slope is not None:
        rows = slopes.unbind()
        places = [place for place in LEARNED[: len(rows)] if ctx.needs_input_grad[place]]
        # one launch for all of them, and memory of its own for each; autograd itself gives it the dtype of the input
        products = torch._foreach_mul([rows[LEARNED.index(place)] for place in places], slope)
        for place, product in zip(places, products, strict=True):
            gradients[place] = product
    return tuple(gradients)
