"""What torch knows of a fused full_kl: two operators, what they return, and that one is the gradient of the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.library import custom_op

from twinhead.kernels._head import refuse_second_derivative
from twinhead.kernels._precision import wide

# of a row: p's largest logit, log sum exp((p - it) / temperature), the same two of q, and the mean under P of a - b,
# where a and b are the logits less the largest one of their row
MOMENTS = 5


class Pass(Protocol):
    """What a backend does with two blocks of logits, (n, V) with the words of a row side by side.

    P and Q are the softmax of p / temperature and of q / temperature.
    """

    def measure(self, p: Tensor, q: Tensor, temperature: float, kl: Tensor, moments: Tensor) -> None:
        """Writes KL(P || Q), (n,), and its moments, (n, 5), float32 or wider."""

    def gradient(
        self,
        p: Tensor,
        q: Tensor,
        temperature: float,
        moments: Tensor,
        slopes: Tensor,
        dp: Tensor | None,
        dq: Tensor | None,
    ) -> None:
        """Writes the gradients of sum slopes * kl, (n, V), which may stand where p and q do; None: nobody needs it."""


def fused(backend: str, run: Pass) -> Callable[..., Tensor]:
    """The full_kl of `backend`, from its passes, which are registered as operators here."""

    def forward(p: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        kl, moments = unmeasured(p)
        if kl.numel():
            run.measure(_rows(p), _rows(q), temperature, kl.view(-1), moments.view(-1, MOMENTS))
        return kl, moments

    def backward(
        p: Tensor, q: Tensor, temperature: float, moments: Tensor, slopes: Tensor, needs: list[bool]
    ) -> list[Tensor]:
        found = _like_needed(p, q, temperature, moments, slopes, needs)
        if slopes.numel():
            flat, rows = slopes.contiguous().view(-1), iter(found)
            dp, dq = (_rows(next(rows)) if need else None for need in needs)
            run.gradient(_rows(p), _rows(q), temperature, moments.view(-1, MOMENTS), flat, dp, dq)
        return found

    find = custom_op(f"twinhead::full_kl_{backend}", forward, mutates_args=())
    descend = custom_op(f"twinhead::full_kl_{backend}_backward", backward, mutates_args=())

    def gradient(ctx: Any, slopes: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative("full_kl")
        if slopes is None:
            return None, None, None
        p, q, moments = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        found = iter(descend(p, q, ctx.temperature, moments, slopes, needs))
        dp, dq = (next(found) if need else None for need in needs)
        return dp, dq, None

    find.register_fake(lambda p, q, temperature: unmeasured(p))
    find.register_autograd(gradient, setup_context=_save)
    descend.register_fake(_like_needed)

    def full_kl(logits: Tensor, ref_logits: Tensor, *, direction: str, temperature: float) -> Tensor:
        """(..., V) twice -> (...)."""
        if logits.dtype != ref_logits.dtype:
            dtype = wide(logits, ref_logits)
            logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
        p, q = (logits, ref_logits) if direction == "reverse" else (ref_logits, logits)
        return find(p, q, temperature)[0]

    return full_kl


def unmeasured(p: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the divergences (...) of logits (..., V), and for their moments (..., 5)."""
    kl = p.new_empty(p.shape[:-1], dtype=wide(p))
    return kl, kl.new_empty((*kl.shape, MOMENTS))


def _rows(x: Tensor) -> Tensor:
    """(..., V) -> (n, V), with the words of a row side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _like_needed(
    p: Tensor, q: Tensor, temperature: float, moments: Tensor, slopes: Tensor, needs: list[bool]
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip((p, q), needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    p, q, ctx.temperature = inputs
    _, moments = output
    ctx.save_for_backward(p, q, moments)
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)
