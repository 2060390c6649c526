"""Exact divergence of two heads in PyTorch: block after block of rows, neither model's logits ever exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twinhead.kernels._head import Head, HeadGradient, blocks, refuse_second_derivative
from twinhead.kernels._precision import full_precision, wide


def linear_kl(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (R, E)
    ref_weight: Tensor,  # (V, E)
    *,
    direction: str = "reverse",
    temperature: float = 1.0,
) -> Tensor:
    """Divergences (R,): two matrix products forward; backward these two again, and two for each model that learns."""
    if direction == "reverse":
        return _LinearKL.apply(hidden, weight, ref_hidden, ref_weight, temperature)
    return _LinearKL.apply(ref_hidden, ref_weight, hidden, weight, temperature)


class _LinearKL(torch.autograd.Function):
    """KL(p || q) = sum p (log p - log q), p and q the softmax of either head's logits.

    By p's logits its gradient is p (log p - log q - KL), by q's logits q - p.
    """

    @staticmethod
    def forward(
        ctx: Any, p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor, temperature: float
    ) -> Tensor:
        dtype = wide(p_hidden, p_weight, q_hidden, q_weight)
        kl = p_hidden.new_empty(len(p_hidden), dtype=dtype)
        with full_precision(p_hidden.device):
            p_head = Head(p_weight, None, dtype, temperature=temperature)
            q_head = Head(q_weight, None, dtype, temperature=temperature)
            for rows in blocks(p_hidden):
                z = p_head.logits(p_hidden[rows])
                log_ratio = z.log_softmax(-1).sub_(q_head.logits(q_hidden[rows]).log_softmax(-1))
                kl[rows] = torch.linalg.vecdot(z.softmax(-1), log_ratio)
        # a copy, because the divergence belongs to the caller, who may write to it
        ctx.save_for_backward(p_hidden, p_weight, q_hidden, q_weight, kl.clone())
        ctx.temperature = temperature
        return kl

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_kl")
        p_hidden, p_weight, q_hidden, q_weight, kl = ctx.saved_tensors
        needs_p, needs_q = ctx.needs_input_grad[:2], ctx.needs_input_grad[2:4]
        with full_precision(p_hidden.device):
            p_head = Head(p_weight, None, kl.dtype, temperature=ctx.temperature)
            q_head = Head(q_weight, None, kl.dtype, temperature=ctx.temperature)
            p_gradient = HeadGradient(p_head, p_hidden, (*needs_p, False))
            q_gradient = HeadGradient(q_head, q_hidden, (*needs_q, False))
            for rows in blocks(p_hidden):
                p_logits, q_logits = p_head.logits(p_hidden[rows]), q_head.logits(q_hidden[rows])
                p, row_slope = p_logits.softmax(-1), slope[rows, None]
                if any(needs_p):
                    log_ratio = p_logits.log_softmax(-1).sub_(q_logits.log_softmax(-1))
                    dz = log_ratio.sub_(kl[rows, None]).mul_(p).mul_(row_slope)
                    p_gradient.add(rows, p_hidden[rows], dz, p_logits)
                if any(needs_q):
                    dz = q_logits.softmax(-1).sub_(p).mul_(row_slope)
                    q_gradient.add(rows, q_hidden[rows], dz, q_logits)
        return *p_gradient.result(p_weight, None)[:2], *q_gradient.result(q_weight, None)[:2], None
