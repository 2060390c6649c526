"""What torch knows of a fused backend: two operators, what they return, and that one is the gradient of the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from twinhead.kernels._head import refuse_second_derivative
from twinhead.kernels._precision import wide


class Fused(NamedTuple):
    """The operation of a backend; signatures as in reference.py."""

    selective_log_softmax: Callable[..., Tensor]
    selective_log_softmax_and_entropy: Callable[..., tuple[Tensor, Tensor]]
    entropy_from_logits: Callable[..., Tensor]


def fused(
    backend: str, forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[..., Tensor]
) -> Fused:
    """The operation of `backend`, from its forward and its backward, which are registered as operators here.

    forward(logits (..., V), index (..., K), temperature, row_mask (...) or None, with_entropy)
        -> logprobs (..., K), entropy (...) or (0,) without, lse (..., 2), which only backward reads
    backward(logits, index, temperature, row_mask, lse, entropy, dlogprobs (..., K), dentropy (...) or None)
        -> dlogits (..., V), contiguous
    """
    find = custom_op(f"twinhead::logprob_{backend}", forward, mutates_args=())
    descend = custom_op(f"twinhead::logprob_{backend}_backward", backward, mutates_args=())

    def gradient(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a log-probability or entropy of logits")
        logits, index, row_mask, lse, entropy = ctx.saved_tensors
        if dlogprobs is None and dentropy is None:
            return None, None, None, None, None
        if dlogprobs is None:
            dlogprobs = lse.new_zeros(index.shape)
        dlogits = descend(logits, index, ctx.temperature, row_mask, lse, entropy, dlogprobs, dentropy)
        return dlogits, None, None, None, None

    find.register_fake(results)
    find.register_autograd(gradient, setup_context=_save)
    descend.register_fake(lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format))

    def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> Tensor:
        return find(logits, index, temperature, row_mask, False)[0]

    def selective_log_softmax_and_entropy(
        logits: Tensor, index: Tensor, entropy_requires_grad: bool, temperature: float, row_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, _ = find(logits, index, temperature, row_mask, True)
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    def entropy_from_logits(logits: Tensor, chunk_size: int) -> Tensor:
        nothing = torch.empty((*logits.shape[:-1], 0), dtype=torch.int64, device=logits.device)
        return find(logits, nothing, 1.0, None, True)[1]

    return Fused(selective_log_softmax, selective_log_softmax_and_entropy, entropy_from_logits)


def results(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what a forward returns."""
    rows, dtype = logits.shape[:-1], wide(logits)
    return (
        logits.new_empty(index.shape, dtype=dtype),
        logits.new_empty(rows if with_entropy else (0,), dtype=dtype),
        logits.new_empty((*rows, 2), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, index, temperature, row_mask, with_entropy = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, index, row_mask, lse, entropy)
    ctx.mark_non_differentiable(*((lse,) if with_entropy else (lse, entropy)))
    ctx.set_materialize_grads(False)
    ctx.temperature = temperature
