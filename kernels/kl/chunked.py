"""Exact divergence of two heads: block after block of rows, neither model's logits ever exist as a whole.

The matrix products are the library's. What follows them is the backend's: a module with the functions of Pass.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor

from twinhead.kernels._head import Head, HeadGradient, blocks, refuse_second_derivative
from twinhead.kernels._precision import full_precision, wide
from twinhead.kernels.kl.operator import MOMENTS, Pass


def linear_kl(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (R, E)
    ref_weight: Tensor,  # (V, E)
    *,
    direction: str,
    temperature: float,
    epilogue: str,
) -> Tensor:
    """Divergences (R,): two matrix products forward; backward these two again, and two for each model that learns."""
    policy, reference = (hidden, weight), (ref_hidden, ref_weight)
    p, q = (policy, reference) if direction == "reverse" else (reference, policy)
    return _linear_kl(*p, *q, temperature, epilogue)[0]


@torch.library.custom_op("twinhead::linear_kl", mutates_args=())
def _linear_kl(
    p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor, temperature: float, epilogue: str
) -> tuple[Tensor, Tensor]:
    """KL(P || Q), (R,), and its moments, (R, 5)."""
    run, (kl, moments) = _load(epilogue), _unmeasured(p_hidden, p_weight, q_hidden, q_weight)
    with full_precision(p_hidden.device):
        p_head, q_head = Head(p_weight, None, kl.dtype), Head(q_weight, None, kl.dtype)
        for rows in blocks(p_hidden):
            p, q = p_head.products(p_hidden[rows]), q_head.products(q_hidden[rows])
            run.measure(p, q, temperature, kl[rows], moments[rows])
    return kl, moments


@_linear_kl.register_fake
def _(p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _unmeasured(p_hidden, p_weight, q_hidden, q_weight)


@torch.library.custom_op("twinhead::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    p_hidden: Tensor,
    p_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    moments: Tensor,
    slopes: Tensor,
    temperature: float,
    epilogue: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of those of the four that need one. A block's gradients stand where its products did."""
    run, slopes = _load(epilogue), slopes.contiguous()
    learns_p, learns_q = any(needs[:2]), any(needs[2:])
    with full_precision(p_hidden.device):
        p_head, q_head = Head(p_weight, None, moments.dtype), Head(q_weight, None, moments.dtype)
        p_gradient = HeadGradient(p_head, p_hidden, (*needs[:2], False))
        q_gradient = HeadGradient(q_head, q_hidden, (*needs[2:], False))
        for rows in blocks(p_hidden):
            p, q = p_head.products(p_hidden[rows]), q_head.products(q_hidden[rows])
            found = p if learns_p else None, q if learns_q else None
            run.gradient(p, q, temperature, moments[rows], slopes[rows], *found)
            if learns_p:
                p_gradient.add(rows, p_hidden[rows], p)
            if learns_q:
                q_gradient.add(rows, q_hidden[rows], q)
    return [d for d in (*p_gradient.result(p_weight, None), *q_gradient.result(q_weight, None)) if d is not None]


@_linear_kl_backward.register_fake
def _(p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor, *others: Any) -> list[Tensor]:
    inputs = (p_hidden, p_weight, q_hidden, q_weight)
    return [x.new_empty(x.shape) for x, needed in zip(inputs, others[-1], strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temperature, ctx.epilogue = inputs
    _, moments = output
    ctx.save_for_backward(*tensors, moments)
    ctx.mark_non_differentiable(moments)


def _gradient(ctx: Any, slopes: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_kl")
    needs = list(ctx.needs_input_grad[:4])
    found = iter(_linear_kl_backward(*ctx.saved_tensors, slopes, ctx.temperature, ctx.epilogue, needs))
    return *(next(found) if needed else None for needed in needs), None, None


_linear_kl.register_autograd(_gradient, setup_context=_save)


def _load(epilogue: str) -> Pass:
    return cast(Pass, importlib.import_module(epilogue))


def _unmeasured(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the divergences of the rows and for their moments."""
    kl = tensors[0].new_empty(len(tensors[0]), dtype=wide(*tensors))
    return kl, kl.new_empty(len(kl), MOMENTS)
