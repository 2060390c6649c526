"""The Triton backend of full_kl: a program per row walks over both logits once, forward, and once for the gradients.

Loads are 16 bytes wide in every row, whatever the vocabulary: the words before the first 16-byte boundary of a row and
after its last one are an edge of a few words, read one by one, and the loop sees the whole groups in between.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels._groups import GROUP_BYTES, edge_of, whole_groups
from twinhead.kernels.kl.operator import MOMENTS, fused

# 8 words of both logits per thread, one 16-byte load of each in half precision. Few registers, so that many rows are in
# flight on a core.
BLOCK = {2: 2048, 4: 2048, 8: 1024}  # by bytes per word: float64 takes two registers
WARPS = 8

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
FAR = tl.constexpr(1e30)  # its negative has an exp of 0, and its product with 0 is 0


@triton.jit
def _terms(x, y, p_peak, q_peak, rate):
    """exp(rate a), exp(rate b), exp(rate a) (a - b), with a and b the logits relative to these peaks."""
    a, b = x - p_peak, y - q_peak
    weight = tl.exp2(a * rate * LOG2_E)
    return weight, tl.exp2(b * rate * LOG2_E), tl.where(weight > 0, weight * (a - b), 0.0)


@triton.jit
def _raise(s, t, u, p_from, q_from, p_to, q_to, rate):
    """The sums of these terms, made relative to higher peaks."""
    p_step, q_step = tl.minimum(p_to - p_from, FAR), tl.minimum(q_to - q_from, FAR)
    p_fade, q_fade = tl.exp2(-p_step * rate * LOG2_E), tl.exp2(-q_step * rate * LOG2_E)
    return s * p_fade, t * q_fade, tl.where(p_fade > 0, (u + s * (q_step - p_step)) * p_fade, 0.0)


@triton.jit(do_not_specialize=["words", "p_stride", "q_stride"])
def _kl_fwd(
    p,  # (n, V)
    q,  # (n, V)
    kl,  # (n,)
    moments,  # (n, 5)
    words,
    p_stride,
    q_stride,
    rate: tl.float64,  # 1 / temperature
    LOWEST: tl.constexpr,
    MOMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wide = kl.dtype.element_ty
    rate = tl.full([], rate, wide)
    p_start = row * p_stride
    p_groups, head, length = whole_groups(p_start, words, GROUP)
    q_start = row * q_stride
    q_groups, _, _ = whole_groups(q_start, words, GROUP)
    word, inside = edge_of(head, length, words, GROUP)
    edge_x = tl.load(p + p_start + word, inside, -INFINITY).to(wide)
    edge_y = tl.load(q + q_start + word, inside, -INFINITY).to(wide)
    p_edge, q_edge = tl.maximum(tl.max(edge_x), LOWEST), tl.maximum(tl.max(edge_y), LOWEST)
    edge_s, edge_t, edge_u = _terms(edge_x, edge_y, p_edge, q_edge, rate)

    # each lane has its own sums, which meet at the end; only the peaks are common to all of them at every step
    lane = tl.arange(0, BLOCK)
    p_peak, q_peak = p_edge, q_edge
    s, t, u = tl.zeros([BLOCK], wide), tl.zeros([BLOCK], wide), tl.zeros([BLOCK], wide)
    for first in range(0, length, BLOCK):
        x = tl.load(p + p_groups + first + lane, first + lane < length, -INFINITY).to(wide)
        y = tl.load(q + q_groups + first + lane, first + lane < length, -INFINITY).to(wide)
        p_higher, q_higher = tl.maximum(p_peak, tl.max(x)), tl.maximum(q_peak, tl.max(y))
        s, t, u = _raise(s, t, u, p_peak, q_peak, p_higher, q_higher, rate)
        more_s, more_t, more_u = _terms(x, y, p_higher, q_higher, rate)
        s, t, u = s + more_s, t + more_t, u + more_u
        p_peak, q_peak = p_higher, q_higher
    edge_s, edge_t, edge_u = _raise(edge_s, edge_t, edge_u, p_edge, q_edge, p_peak, q_peak, rate)
    total = tl.sum(s) + tl.sum(edge_s)
    log_s, log_t = tl.log(total), tl.log(tl.sum(t) + tl.sum(edge_t))
    mean = (tl.sum(u) + tl.sum(edge_u)) / total
    tl.store(kl + row, mean * rate - log_s + log_t)
    moments += row * MOMENTS
    tl.store(moments, p_peak)
    tl.store(moments + 1, log_s)
    tl.store(moments + 2, q_peak)
    tl.store(moments + 3, log_t)
    tl.store(moments + 4, mean)


def measure(p: Tensor, q: Tensor, temperature: float, kl: Tensor, moments: Tensor) -> None:
    """See Pass in operator.py."""
    p, q = _alike(p, q)
    with torch.cuda.device_of(p):
        _kl_fwd[(len(p),)](
            p,
            q,
            kl,
            moments,
            p.shape[1],
            p.stride(0),
            q.stride(0),
            1 / temperature,
            LOWEST=torch.finfo(kl.dtype).min,
            MOMENTS=MOMENTS,
            GROUP=GROUP_BYTES // p.itemsize,
            BLOCK=BLOCK[p.itemsize],
            num_warps=WARPS,
        )


@triton.jit
def _slopes(x, y, p_peak, p_log, q_peak, q_log, mean, rate, slope):
    """The gradients of slope * KL by p's and q's logits: P (log P - log Q - KL) and Q - P; 0 where the slope is 0.

    a - b is a difference without a product, as in _terms, and so is rounded as it was there: where P is certain the
    difference and its mean cancel.
    """
    a, b = x - p_peak, y - q_peak
    probability = tl.exp2((a * rate - p_log) * LOG2_E)
    dp = tl.where(probability > 0, probability * (a - b - mean) * rate, 0.0)
    dq = tl.exp2((b * rate - q_log) * LOG2_E) - probability
    factor = slope * rate
    return tl.where(slope == 0, 0.0, factor * dp), tl.where(slope == 0, 0.0, factor * dq)


@triton.jit(do_not_specialize=["words", "p_stride", "q_stride", "dp_stride", "dq_stride"])
def _kl_bwd(
    p,  # (n, V)
    q,  # (n, V)
    moments,  # (n, 5)
    slopes,  # (n,)
    dp,  # (n, V) or None
    dq,  # (n, V) or None
    words,
    p_stride,
    q_stride,
    dp_stride,
    dq_stride,
    rate: tl.float64,  # 1 / temperature
    LEARNS_P: tl.constexpr,
    LEARNS_Q: tl.constexpr,
    MOMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rate = tl.full([], rate, moments.dtype.element_ty)
    p_start = row * p_stride
    p_groups, head, length = whole_groups(p_start, words, GROUP)
    q_start = row * q_stride
    q_groups, _, _ = whole_groups(q_start, words, GROUP)
    dp_start = row * dp_stride
    dp_groups, _, _ = whole_groups(dp_start, words, GROUP)
    dq_start = row * dq_stride
    dq_groups, _, _ = whole_groups(dq_start, words, GROUP)
    moments += row * MOMENTS
    p_peak, p_log = tl.load(moments), tl.load(moments + 1)
    q_peak, q_log, mean = tl.load(moments + 2), tl.load(moments + 3), tl.load(moments + 4)
    slope = tl.load(slopes + row).to(rate.dtype)

    word, inside = edge_of(head, length, words, GROUP)
    edge_x = tl.load(p + p_start + word, inside, -INFINITY).to(rate.dtype)
    edge_y = tl.load(q + q_start + word, inside, -INFINITY).to(rate.dtype)
    edge_x, edge_y = _slopes(edge_x, edge_y, p_peak, p_log, q_peak, q_log, mean, rate, slope)
    if LEARNS_P:
        tl.store(dp + dp_start + word, edge_x, inside)
    if LEARNS_Q:
        tl.store(dq + dq_start + word, edge_y, inside)
    lane = tl.arange(0, BLOCK)
    for first in range(0, length, BLOCK):
        x = tl.load(p + p_groups + first + lane, first + lane < length, -INFINITY).to(rate.dtype)
        y = tl.load(q + q_groups + first + lane, first + lane < length, -INFINITY).to(rate.dtype)
        x, y = _slopes(x, y, p_peak, p_log, q_peak, q_log, mean, rate, slope)
        if LEARNS_P:
            tl.store(dp + dp_groups + first + lane, x, first + lane < length)
        if LEARNS_Q:
            tl.store(dq + dq_groups + first + lane, y, first + lane < length)


def gradient(
    p: Tensor,
    q: Tensor,
    temperature: float,
    moments: Tensor,
    slopes: Tensor,
    dp: Tensor | None,
    dq: Tensor | None,
) -> None:
    """See Pass in operator.py."""
    p, q = _alike(p, q, *(x for x in (dp, dq) if x is not None))
    with torch.cuda.device_of(p):
        _kl_bwd[(len(p),)](
            p,
            q,
            moments,
            slopes,
            dp,
            dq,
            p.shape[1],
            p.stride(0),
            q.stride(0),
            p.stride(0) if dp is None else dp.stride(0),
            q.stride(0) if dq is None else dq.stride(0),
            1 / temperature,
            LEARNS_P=dp is not None,
            LEARNS_Q=dq is not None,
            MOMENTS=MOMENTS,
            GROUP=GROUP_BYTES // p.itemsize,
            BLOCK=BLOCK[p.itemsize],
            num_warps=WARPS,
        )


def _alike(p: Tensor, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """p and q, copied unless each row of all these tensors lies at one distance from a 16-byte boundary."""
    tensors, group = (p, q, *others), GROUP_BYTES // p.itemsize
    alike = len({x.stride(0) % group for x in tensors}) == 1
    if alike and all(x.data_ptr() % GROUP_BYTES == 0 for x in tensors):
        return p, q
    return p.clone(memory_format=torch.contiguous_format), q.clone(memory_format=torch.contiguous_format)


full_kl = fused("triton", sys.modules[__name__])
