"""The Triton backend: a program per row walks over the words once, forward, and once more for the gradient.

Loads are 16 bytes wide in every row, whatever the vocabulary: the words before the first 16-byte boundary of a row and
after its last one are an edge of a few words, read one by one, and the loop sees the whole groups in between.

The log-sum-exp of a row is kept in two parts, its largest logit and the log of the sum relative to that logit. As one
number it would round away what distinguishes words when logits are large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels._groups import GROUP_BYTES, edge_of, whole_groups
from twinhead.kernels.logprob.operator import fused, results

# 16 words per thread: two 16-byte loads in half precision. Few registers, so that many rows are in flight on a core,
# which is what keeps the memory busy; a larger block makes every row wait for more warps.
BLOCK = 2048
WARPS = {2: 4, 4: 4, 8: 8}  # by bytes per word: float64 takes two registers
CHOICES = 16  # words of `index` gathered at a time

LOG2_E = tl.constexpr(1.4426950408889634)
# its exp is 0 at any temperature, and its product with any sum of exps is finite, so that the product with 0 is 0
FAR = tl.constexpr(-1e30)
# the log-probability that stands for log 0
LOG_ZERO = tl.constexpr(-1e4)


@triton.jit
def _start(row, inner, outer_stride, inner_stride, offset):
    """Where a row begins."""
    return row // inner * outer_stride + row % inner * inner_stride + offset


@triton.jit
def _powers(x, peak, inverse):
    """exp((x - peak) / temperature), and its product with x - peak."""
    distance = x - peak
    power = tl.exp2(distance * inverse * LOG2_E)
    return power, power * tl.maximum(distance, FAR)


@triton.jit
def _relative(sums, products, peak, higher, inverse):
    """Sums of powers relative to `peak`, and their products, made relative to `higher`."""
    distance = tl.maximum(peak - higher, FAR)
    fade = tl.exp2(distance * inverse * LOG2_E)
    return sums * fade, (products + distance * sums) * fade


@triton.jit
def _normalise(
    logits,
    words,
    start,
    head,
    groups,
    length,
    inverse,
    LOWEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit, the sum of exps relative to it, and the sum of their products with the distance to it."""
    wide = inverse.dtype
    edge_word, inside = edge_of(head, length, words, GROUP)
    edge = tl.load(logits + start + edge_word, inside, -float("inf")).to(wide)
    edge_peak = tl.maximum(tl.max(edge), LOWEST)
    edge_power, edge_product = _powers(edge, edge_peak, inverse)
    edge_power, edge_product = tl.sum(edge_power), tl.sum(edge_product)

    # each lane has its own sums, which meet once, at the end; only the peak is common to all of them at every step
    lane = tl.arange(0, BLOCK)
    peak, sums, products = edge_peak, tl.zeros([BLOCK], wide), tl.zeros([BLOCK], wide)
    for first in range(0, length, BLOCK):
        x = tl.load(logits + groups + first + lane, first + lane < length, -float("inf")).to(wide)
        higher = tl.maximum(peak, tl.max(x))
        power, product = _powers(x, higher, inverse)
        sums, products = _relative(sums, products, peak, higher, inverse)
        sums += power
        products += product
        peak = higher
    edge_power, edge_product = _relative(edge_power, edge_product, edge_peak, peak, inverse)
    return peak, tl.sum(sums) + edge_power, tl.sum(products) + edge_product


@triton.jit(do_not_specialize=["words", "choices", "inner", "outer_stride", "inner_stride", "offset"])
def _logprob_fwd(
    logits,
    index,  # (R, K)
    row_mask,  # (R,)
    logprobs,  # (R, K)
    entropy,  # (R,)
    lse,  # (R, 2)
    words,
    choices,
    inner,
    outer_stride,
    inner_stride,
    offset,
    inverse: tl.float64,  # 1 / temperature
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOWEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wide = lse.dtype.element_ty
    inverse = tl.full([], inverse, wide)
    lane = tl.arange(0, CHOICES)
    logprobs += row * choices
    if MASKED and tl.load(row_mask + row) == 0:
        tl.store(lse + 2 * row + tl.arange(0, 2), tl.zeros([2], wide))
        for first in range(0, choices, CHOICES):
            tl.store(logprobs + first + lane, tl.zeros([CHOICES], wide), first + lane < choices)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
        return
    start = _start(row, inner, outer_stride, inner_stride, offset)
    groups, head, length = whole_groups(start, words, GROUP)
    peak, total, product = _normalise(logits, words, start, head, groups, length, inverse, LOWEST, GROUP, BLOCK)
    log_sum = tl.log(total)
    tl.store(lse + 2 * row, peak)
    tl.store(lse + 2 * row + 1, log_sum)
    if ENTROPY:
        tl.store(entropy + row, log_sum - product * inverse / total)
    for first in range(0, choices, CHOICES):
        word = tl.load(index + row * choices + first + lane, first + lane < choices, -1)
        x = tl.load(logits + start + word, (word >= 0) & (word < words), float("nan")).to(wide)
        tl.store(logprobs + first + lane, (x - peak) * inverse - log_sum, first + lane < choices)


def forward(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., V), (..., K), row_mask (...) or None -> logprobs (..., K), entropy (...) or (0,) without, lse (..., 2).

    An index outside of [0, V) gives NaN: to look whether there is one would make the GPU wait.
    """
    logprobs, entropy, lse = results(logits, index, temperature, row_mask, with_entropy)
    if rows := logits.shape[:-1].numel():
        base, *layout = _layout(logits)
        with torch.cuda.device_of(logits):
            _logprob_fwd[(rows,)](
                base,
                index.contiguous(),
                None if row_mask is None else row_mask.contiguous(),
                logprobs,
                entropy,
                lse,
                logits.shape[-1],
                index.shape[-1],
                *layout,
                1 / temperature,
                MASKED=row_mask is not None,
                ENTROPY=with_entropy,
                LOWEST=torch.finfo(lse.dtype).min,
                GROUP=GROUP_BYTES // logits.itemsize,
                BLOCK=BLOCK,
                CHOICES=CHOICES,
                num_warps=WARPS[logits.itemsize],
            )
    return logprobs, entropy, lse


@triton.jit
def _slope(x, word, first, count, index, dlogprobs, choices, peak, log_sum, inverse, total, pull, entropy):
    """The gradient of the logits x of the words first + word, which are fewer than `count`.

    d logprob_k / d z_v = [v = k] - p_v,   d entropy / d z_v = -p_v (log p_v + entropy),   z = logits / temperature

    `total` is the sum of the slopes of the row's logprobs, and `pull` the slope of its entropy.
    """
    logp = tl.maximum((x - peak) * inverse - log_sum, LOG_ZERO, tl.PropagateNan.ALL)
    slope = -tl.exp2(logp * LOG2_E) * (total + pull * (logp + entropy))
    for k in range(choices):
        chosen = tl.load(index + k) - first
        if (chosen >= 0) & (chosen < count):
            slope += tl.where(word == chosen.to(tl.int32), tl.load(dlogprobs + k), 0.0)
    return slope * inverse


@triton.jit(do_not_specialize=["words", "choices", "inner", "outer_stride", "inner_stride", "offset"])
def _logprob_bwd(
    logits,
    index,  # (R, K)
    row_mask,  # (R,)
    lse,  # (R, 2)
    entropy,  # (R,)
    dlogprobs,  # (R, K)
    dentropy,  # (R,)
    dlogits,  # (R, V)
    words,
    choices,
    inner,
    outer_stride,
    inner_stride,
    offset,
    inverse: tl.float64,  # 1 / temperature
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIKE: tl.constexpr,  # the rows of logits and dlogits lie at the same distance from a 16-byte boundary
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wide = lse.dtype.element_ty
    inverse = tl.full([], inverse, wide)
    lane = tl.arange(0, BLOCK)
    start = _start(row, inner, outer_stride, inner_stride, offset)
    groups, head, length = whole_groups(start, words, GROUP)
    out = row * words
    out_groups = (out + GROUP - 1) // GROUP * GROUP if ALIKE else out + head
    edge_word, inside = edge_of(head, length, words, GROUP)
    if MASKED and tl.load(row_mask + row) == 0:
        tl.store(dlogits + out + edge_word, tl.zeros([2 * GROUP], wide), inside)
        for first in range(0, length, BLOCK):
            tl.store(dlogits + out_groups + first + lane, tl.zeros([BLOCK], wide), first + lane < length)
        return
    peak, log_sum = tl.load(lse + 2 * row), tl.load(lse + 2 * row + 1)
    index += row * choices
    dlogprobs += row * choices
    total = peak * 0
    for k in range(choices):
        total += tl.load(dlogprobs + k)
    pull, spread = total * 0, total * 0
    if ENTROPY:
        pull, spread = tl.load(dentropy + row), tl.load(entropy + row)

    edge = tl.load(logits + start + edge_word, inside, -float("inf")).to(wide)
    edge = _slope(edge, edge_word, 0, words, index, dlogprobs, choices, peak, log_sum, inverse, total, pull, spread)
    tl.store(dlogits + out + edge_word, edge, inside)
    for first in range(0, length, BLOCK):
        x = tl.load(logits + groups + first + lane, first + lane < length, -float("inf")).to(wide)
        x = _slope(x, lane, head + first, BLOCK, index, dlogprobs, choices, peak, log_sum, inverse, total, pull, spread)
        tl.store(dlogits + out_groups + first + lane, x, first + lane < length)


def backward(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
) -> Tensor:
    """The gradient of logits, contiguous, from what forward took and gave and the gradients of logprobs and entropy."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, words = logits.shape[:-1].numel(), logits.shape[-1]
    if rows:
        base, inner, outer_stride, inner_stride, offset = _layout(logits)
        group = GROUP_BYTES // logits.itemsize
        mismatches = [
            offset,
            outer_stride - inner * words if inner < rows else 0,
            inner_stride - words if inner > 1 else 0,
        ]
        with torch.cuda.device_of(logits):
            _logprob_bwd[(rows,)](
                base,
                index.contiguous(),
                None if row_mask is None else row_mask.contiguous(),
                lse,
                entropy,
                dlogprobs.contiguous(),
                None if dentropy is None else dentropy.contiguous(),
                dlogits,
                words,
                index.shape[-1],
                inner,
                outer_stride,
                inner_stride,
                offset,
                1 / temperature,
                MASKED=row_mask is not None,
                ENTROPY=dentropy is not None,
                ALIKE=all(mismatch % group == 0 for mismatch in mismatches),
                GROUP=group,
                BLOCK=BLOCK,
                num_warps=WARPS[logits.itemsize],
            )
    return dlogits


def _layout(logits: Tensor) -> tuple[Tensor, int, int, int, int]:
    """A tensor that begins on a 16-byte boundary, and where in it row r begins, counted in words:

        r // inner * outer_stride + r % inner * inner_stride + offset

    That covers what slicing makes of [B, T, V]. Logits that lie in memory in another way are copied.
    """
    levels: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if levels and levels[-1][1] == size * stride:
            size *= levels.pop()[0]
        if size > 1:
            levels.append((size, stride))
    if len(levels) > 2 or (logits.stride(-1) != 1 and logits.shape[-1] > 1):
        return _layout(logits.contiguous())
    (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *levels][-2:]
    offset = logits.data_ptr() % GROUP_BYTES // logits.itemsize
    if offset > logits.storage_offset():
        return _layout(logits.clone())
    base = logits.as_strided((1,), (1,), logits.storage_offset() - offset)
    return base, inner, outer_stride, inner_stride, offset


selective_log_softmax, selective_log_softmax_and_entropy, entropy_from_logits = fused("triton", forward, backward)
