"""What follows the matrix product of a block, in Triton: a program per row, which walks over its words.

A row begins on a boundary, and `stride` numbers later the next one. Loads and stores reach to the end of the stride, so
that whole groups of 16 bytes are moved where a row ends with part of one; what lies behind its last word means nothing.

The functions share a `row`: its products, the bias, words, stride, scale and outer. A logit is scale * (product +
bias), or with a softcap outer * tanh of that; bias and outer are None where there is none.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels._head import Head
from twinhead.kernels.linear.chunked import Measures
from twinhead.kernels.linear.objective import Objective

# 8 words per thread: two 16-byte loads, and few enough registers (57 at most) that four rows are in flight on a core
BLOCK = 2048
WARPS = 8

# the logarithm that stands for log 0: its exp is 0, and its product with 0 is 0 and not NaN
LOG_ZERO = tl.constexpr(-1e4)
INFINITY = tl.constexpr(inf)
# as in _surrogate.py and _estimators.py
LOG_RATIO_LIMIT = tl.constexpr(20.0)
EXPONENT_LIMIT = tl.constexpr(20.0)


@triton.jit
def _tanh(y):
    """By powers near 0, where the quotient of exponentials loses digits; in float64 it has enough of them."""
    power = tl.exp(-2 * tl.abs(y))
    size = (1 - power) / (1 + power)
    tanh = tl.where(y < 0, -size, size)
    if y.dtype == tl.float32:
        z = y * y
        series = -929569 / 638512875 * z + 21844 / 6081075
        series = ((series * z - 1382 / 155925) * z + 62 / 2835) * z - 17 / 315
        tanh = tl.where(z < 0.25, y + y * z * ((series * z + 2 / 15) * z - 1 / 3), tanh)
    return tanh


@triton.jit
def _logits(row, column):
    """The logits of some words, -inf beyond the last one, and the tangents that they are `outer` times of."""
    products, bias, words, stride, scale, outer = row
    y = tl.load(products + column, column < stride, 0.0)
    if bias is not None:
        y += tl.load(bias + column, column < words, 0.0)
    y *= scale
    z = y
    if outer is not None:
        y = _tanh(y)
        z = y * outer
    return tl.where(column < words, z, -INFINITY), y


@triton.jit
def _powers(z, peak):
    """z - peak, no lower than LOG_ZERO, and its exp; NaN stays."""
    below = z - peak
    below = tl.where(below < LOG_ZERO, LOG_ZERO, below)
    return below, tl.exp(below)


@triton.jit
def _measure(row, target, BLOCK: tl.constexpr):
    """A row's logprob, entropy, peak and log_sum, from the sums of exp(t) and t exp(t) for t = z - peak.

    Each lane has its own sums, which meet once, at the end; only the peak is common to all at every step.
    """
    words = row[2]
    wide = row[0].dtype.element_ty
    peak = tl.full([], -INFINITY, wide)
    sums, tilted = tl.zeros([BLOCK], wide), tl.zeros([BLOCK], wide)
    for first in range(0, words, BLOCK):
        z, _ = _logits(row, first + tl.arange(0, BLOCK))
        higher = tl.maximum(peak, tl.max(z))
        level = tl.where(higher == -INFINITY, 0.0, higher)  # nothing but excluded words until now
        lift = tl.where(peak == -INFINITY, 0.0, peak - level)
        below, power = _powers(z, level)
        fade = tl.exp(lift)
        tilted = fade * (tilted + lift * sums) + below * power
        sums = fade * sums + power
        peak = higher
    total = tl.sum(sums)
    log_sum = tl.log(total)
    z, _ = _logits(row, tl.maximum(target, 0))
    return (z - peak) - log_sum, log_sum - tl.sum(tilted) / total, peak, log_sum


@triton.jit
def _write_gradient(row, out, target, entropy, peak, log_sum, slope, entropy_slope, BLOCK: tl.constexpr):
    """A row of slope (onehot - p) - entropy_slope p (log p + entropy), through cap and scale; 0 if both slopes are.

    The second and third term are exp(t) (base + tilt t) for t = z - peak.
    """
    words, stride, scale, outer = row[2], row[3], row[4], row[5]
    lane = tl.arange(0, BLOCK)
    if (target < 0) | ((slope == 0) & (entropy_slope == 0)):
        for first in range(0, words, BLOCK):
            tl.store(out + first + lane, tl.zeros([BLOCK], out.dtype.element_ty), first + lane < stride)
    else:
        share = tl.exp(-log_sum)
        base = -share * (slope + entropy_slope * (entropy - log_sum))
        tilt = -share * entropy_slope
        for first in range(0, words, BLOCK):
            z, y = _logits(row, first + lane)
            below, power = _powers(z, peak)
            dz = (tl.where(first + lane == target, slope, 0.0) + power * (base + tilt * below)) * scale
            if outer is not None:
                dz *= outer * (1 - y * y)
            tl.store(out + first + lane, dz, first + lane < stride)


@triton.jit
def _row(products, bias, words, stride, scale, outer):
    """What the functions above share, for this program's row, and the row's number."""
    number = tl.program_id(0).to(tl.int64)
    wide = products.dtype.element_ty
    scale = tl.full([], scale, wide)
    if outer is not None:
        outer = tl.full([], outer, wide)
    return (products + number * stride, bias, words, stride, scale, outer), number


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=["targets", "logprobs", "entropies", "peaks", "log_sums"],
)
def _linear_measure(
    products,  # (n, V)
    bias,  # (V,)
    words,
    stride,
    scale: tl.float64,
    outer: tl.float64,
    targets,  # (n,), and so are the next four
    logprobs,
    entropies,
    peaks,
    log_sums,
    BLOCK: tl.constexpr,
):
    row, r = _row(products, bias, words, stride, scale, outer)
    target = tl.load(targets + r)
    nothing = tl.zeros([], products.dtype.element_ty)
    logprob, entropy, peak, log_sum = nothing, nothing, nothing, nothing
    if target >= 0:
        logprob, entropy, peak, log_sum = _measure(row, target, BLOCK)
    tl.store(logprobs + r, logprob)
    tl.store(entropies + r, entropy)
    tl.store(peaks + r, peak)
    tl.store(log_sums + r, log_sum)


def measure(products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures) -> None:
    """See Epilogue in chunked.py."""
    with torch.cuda.device_of(products):
        _linear_measure[(len(products),)](
            *_rows(products, head), targets, logprobs, *measures, BLOCK=BLOCK, num_warps=WARPS
        )


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=["targets", "entropies", "peaks", "log_sums", "slopes", "entropy_slopes"],
)
def _linear_gradient(
    products,  # (n, V)
    bias,  # (V,)
    words,
    stride,
    scale: tl.float64,
    outer: tl.float64,
    out,  # (n, V)
    targets,  # (n,), and so are the next five
    entropies,
    peaks,
    log_sums,
    slopes,
    entropy_slopes,
    BLOCK: tl.constexpr,
):
    row, r = _row(products, bias, words, stride, scale, outer)
    out += r * stride
    slope, entropy_slope = tl.load(slopes + r), tl.zeros([], products.dtype.element_ty)
    if entropy_slopes is not None:
        entropy_slope = tl.load(entropy_slopes + r)
    target, entropy = tl.load(targets + r), tl.load(entropies + r)
    peak, log_sum = tl.load(peaks + r), tl.load(log_sums + r)
    _write_gradient(row, out, target, entropy, peak, log_sum, slope, entropy_slope, BLOCK)


def gradient(
    products: Tensor,
    head: Head,
    targets: Tensor,
    measures: Measures,
    slopes: Tensor,
    entropy_slopes: Tensor | None,
) -> Tensor:
    """In the dtype of the matrix, and in the memory of the products if that is theirs."""
    out = _gradient_of(products, head)
    with torch.cuda.device_of(products):
        _linear_gradient[(len(products),)](
            *_rows(products, head), out, targets, *measures, slopes, entropy_slopes, BLOCK=BLOCK, num_warps=WARPS
        )
    return out


@triton.jit
def _token_slope(logprob, old_logprob, advantage, clip_low, clip_high, dual_clip):
    """d loss / d logprob of one token's surrogate, as Surrogate.slope says it."""
    log_ratio = logprob - old_logprob
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT))
    loss = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high) > loss
    bound = (advantage < 0) & (loss > -dual_clip * advantage)
    return tl.where(clipped | bound | (tl.abs(log_ratio) > LOG_RATIO_LIMIT), 0.0, loss)


@triton.jit
def _divergence_slope(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
    """The derivative of k1, k2 or k3 by the logprob, as in _estimators.py."""
    distance = logprob - ref_logprob
    slope = distance
    if ESTIMATOR == 1:
        slope = distance * 0 + 1
    if ESTIMATOR == 3:
        slope = 1 - tl.where(distance < -EXPONENT_LIMIT, 0.0, tl.exp(tl.minimum(-distance, EXPONENT_LIMIT)))
    return slope


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=[
        "targets", "logprobs", "entropies", "peaks", "log_sums", "old_logprobs", "advantages", "ref_logprobs"
    ],
)  # fmt: skip
def _linear_learn(
    products,  # (n, V)
    bias,  # (V,)
    words,
    stride,
    scale: tl.float64,
    outer: tl.float64,
    out,  # (n, V)
    targets,  # (n,), and so are the next seven
    logprobs,
    entropies,
    peaks,
    log_sums,
    old_logprobs,
    advantages,
    ref_logprobs,
    divisor,  # ()
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, r = _row(products, bias, words, stride, scale, outer)
    wide = products.dtype.element_ty
    target, shared = tl.load(targets + r), tl.load(divisor)
    logprob, entropy, peak, log_sum = _measure(row, target, BLOCK)
    tl.store(logprobs + r, logprob)
    tl.store(entropies + r, entropy)
    tl.store(peaks + r, peak)
    tl.store(log_sums + r, log_sum)
    clip_low, clip_high = tl.full([], clip_low, wide), tl.full([], clip_high, wide)
    old_logprob, advantage = tl.load(old_logprobs + r), tl.load(advantages + r)
    slope = _token_slope(logprob, old_logprob, advantage, clip_low, clip_high, tl.full([], dual_clip, wide))
    if ref_logprobs is not None:
        slope += tl.full([], kl_coef, wide) * _divergence_slope(logprob, tl.load(ref_logprobs + r), ESTIMATOR)
    entropy_slope = -tl.full([], entropy_coef, wide) / shared
    out += r * stride
    _write_gradient(row, out, target, entropy, peak, log_sum, slope / shared, entropy_slope, BLOCK)


def learn(
    products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures, objective: Objective
) -> Tensor:
    """Like `gradient`; the row is read for the second time while it is in the cache."""
    out = _gradient_of(products, head)
    with torch.cuda.device_of(products):
        _linear_learn[(len(products),)](
            *_rows(products, head),
            out,
            targets,
            logprobs,
            *measures,
            objective.old_logprobs,
            objective.advantages,
            None if objective.kl_coef == 0 else objective.ref_logprobs,
            objective.divisor,
            objective.clip_low,
            objective.clip_high,
            inf if objective.dual_clip is None else objective.dual_clip,
            objective.kl_coef,
            objective.entropy_coef,
            ESTIMATOR=int(objective.kl_estimator.removeprefix("k")),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


def _gradient_of(products: Tensor, head: Head) -> Tensor:
    """Memory for the gradient of the products, laid out as they are."""
    if head.weight.dtype == products.dtype:
        return products
    return products.new_empty(len(products), products.stride(0), dtype=head.weight.dtype)[:, : products.shape[1]]


def _rows(products: Tensor, head: Head) -> tuple[Any, ...]:
    """The arguments of `_row`."""
    scale = head.scale if head.softcap is None else head.scale / head.softcap
    outer = None if head.softcap is None else head.softcap / head.temperature
    return products, head.bias, products.shape[1], products.stride(0), scale, outer
