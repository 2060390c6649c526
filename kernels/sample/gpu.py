"""The Triton backend: a program per row, which walks over the words twice, and more often where a filter is on.

top-k and top-p keep the words above a threshold. It is found by halving an interval of logits, in the order of their
bits: each walk measures what lies above the middle, and moves a bound to the nearest logit that is really there, until
the two bounds meet. That takes at most as many walks as a logit has bits, and no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels._precision import wide

# A batch of decoding has fewer rows than a GPU has cores, so a row gets many threads, and each of them two 16-byte
# loads (one where a warp is 64 wide)
BLOCK_BYTES = 16384
WARPS = 16

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _weights(logits, first, words, peak, rate, BLOCK: tl.constexpr):
    """The next BLOCK logits, and their exp relative to the largest one; 0 after the last word."""
    lane = first + tl.arange(0, BLOCK)
    x = tl.load(logits + lane, lane < words, -INFINITY).to(peak.dtype)
    return x, tl.exp2((x - peak) * rate)


@triton.jit
def _normalise(logits, words, rate, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, the sum of weights, and the smallest finite logit and the number of the finite ones."""
    lane = tl.arange(0, BLOCK)
    wide = rate.dtype
    peak = tl.full([], LOWEST, wide)
    sums, finite = tl.zeros([BLOCK], wide), tl.zeros([BLOCK], tl.int32)
    lowest = tl.full([BLOCK], INFINITY, wide)
    for first in range(0, words, BLOCK):
        x = tl.load(logits + first + lane, first + lane < words, -INFINITY).to(wide)
        higher = tl.maximum(peak, tl.max(x))
        sums = sums * tl.exp2((peak - higher) * rate) + tl.exp2((x - higher) * rate)
        lowest = tl.minimum(lowest, tl.where(x > -INFINITY, x, INFINITY))
        finite += (x > -INFINITY).to(tl.int32)
        peak = higher
    return peak, tl.sum(sums), tl.min(lowest), tl.sum(finite)


@triton.jit
def _turn(bits):
    """The bits of a number, read as an integer, become one that sorts as the numbers do; and back again."""
    if bits.dtype == tl.int64:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(x):
    x = tl.where(x == 0, 0.0, x)  # -0 and 0 are equal, and so are their keys
    if x.dtype == tl.float64:
        return _turn(x.to(tl.int64, bitcast=True))
    else:
        return _turn(x.to(tl.int32, bitcast=True))


@triton.jit
def _reach(logits, words, peak, rate, lowest, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The logit at which the measure, from the largest downwards, reaches `wanted`, and the measure above it.

    The measure of a word is its weight, or 1. That of all words from `lowest` upwards must reach what is wanted.
    """
    wide = peak.dtype
    top, above = peak, peak * 0
    low_key, top_key = _key(lowest), _key(top)
    while low_key < top_key:
        # the mean, rounded up, of two numbers whose sum may be too large
        pivot = _turn((low_key & top_key) + ((low_key ^ top_key) >> 1) + ((low_key ^ top_key) & 1))
        pivot = pivot.to(wide, bitcast=True)
        sums = tl.zeros([BLOCK], wide)
        over, under = tl.full([BLOCK], INFINITY, wide), tl.full([BLOCK], -INFINITY, wide)
        for first in range(0, words, BLOCK):
            x, weight = _weights(logits, first, words, peak, rate, BLOCK)
            inside = x >= pivot
            if COUNT:
                weight = inside.to(wide)
            sums += tl.where(inside, weight, 0.0)
            over = tl.minimum(over, tl.where(inside, x, INFINITY))
            under = tl.maximum(under, tl.where(inside, -INFINITY, x))
        reached = tl.sum(sums)
        if reached >= wanted:
            lowest = tl.min(over)
        else:
            top = tl.max(under)
            above = reached
        low_key, top_key = _key(lowest), _key(top)
    return top, above


@triton.jit
def _keep(x, weight, threshold, ties, seen):
    """The weights above the threshold, and of `ties` words that equal it; `seen` of these have come before."""
    equal = x == threshold
    order = tl.cumsum(equal.to(tl.int32))
    weight = tl.where((x > threshold) | (equal & (seen + order <= ties)), weight, 0.0)
    return weight, seen + tl.sum(equal.to(tl.int32))


@triton.jit
def _filter(
    logits,
    words,
    peak,
    total,
    lowest,
    finite,
    rate,
    top_k,
    top_p,
    min_p,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is kept: the words above a threshold, the number of those equal to it, and the sum of their weights."""
    wide = peak.dtype
    threshold, ties = tl.full([], -INFINITY, wide), words + 0
    if TOP_K:
        wanted = top_k.to(wide)
        if finite > top_k:
            threshold, above = _reach(logits, words, peak, rate, lowest, wanted, True, BLOCK)
            ties = top_k.to(tl.int32) - above.to(tl.int32)
            total = _mass(logits, words, peak, rate, threshold, ties, BLOCK)
            lowest = threshold
    if TOP_P:
        wanted = tl.full([], top_p, wide) * total
        edge, above = _reach(logits, words, peak, rate, lowest, wanted, False, BLOCK)
        share = tl.ceil((wanted - above) / tl.exp2((edge - peak) * rate))
        fit = tl.maximum(tl.minimum(share, words.to(wide)), 1.0).to(tl.int32)
        ties = tl.where(edge == threshold, tl.minimum(ties, fit), fit)
        threshold = edge
    if MIN_P:
        likely = peak + tl.log2(tl.full([], min_p, wide)) / rate
        ties = tl.where(likely > threshold, words, ties)
        threshold = tl.maximum(likely, threshold)
    return threshold, ties, _mass(logits, words, peak, rate, threshold, ties, BLOCK)


@triton.jit
def _mass(logits, words, peak, rate, threshold, ties, BLOCK: tl.constexpr):
    """The sum of the weights that are kept."""
    total, seen = peak * 0, words * 0
    for first in range(0, words, BLOCK):
        x, weight = _weights(logits, first, words, peak, rate, BLOCK)
        weight, seen = _keep(x, weight, threshold, ties, seen)
        total += tl.sum(weight)
    return total


@triton.jit
def _first_equal(logits, words, peak, BLOCK: tl.constexpr):
    """Where the first of the largest logits stands."""
    lane = tl.arange(0, BLOCK)
    found = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for first in range(0, words, BLOCK):
        x = tl.load(logits + first + lane, first + lane < words, -INFINITY).to(peak.dtype)
        found = tl.minimum(found, tl.where(x == peak, first + lane, 0x7FFFFFFF))
    return tl.min(found)


@triton.jit
def _first_above(logits, words, peak, rate, threshold, ties, wanted, FILTERED: tl.constexpr, BLOCK: tl.constexpr):
    """The first word at which the cumulative weight exceeds `wanted`, and its logit.

    Where the sums round to less than that, it is the last word that has a weight.
    """
    total, seen = peak * 0, words * 0
    block, before, equals = words * 0, total, seen
    for first in range(0, words, BLOCK):
        x, weight = _weights(logits, first, words, peak, rate, BLOCK)
        then_seen = seen
        if FILTERED:
            weight, then_seen = _keep(x, weight, threshold, ties, seen)
        mass = tl.sum(weight)
        if (total <= wanted) & (mass > 0):
            block, before, equals = first, total, seen
        total += mass
        seen = then_seen
    lane = tl.arange(0, BLOCK)
    x, weight = _weights(logits, block, words, peak, rate, BLOCK)
    if FILTERED:
        weight, _ = _keep(x, weight, threshold, ties, equals)
    beyond = (before + tl.cumsum(weight) > wanted) & (weight > 0)
    place = tl.min(tl.where(beyond, lane, BLOCK))
    if place == BLOCK:
        place = tl.max(tl.where(weight > 0, lane, 0))
    return block + place, tl.sum(tl.where(lane == place, x, 0.0))


@triton.jit(do_not_specialize=["top_k"])
def _sample_fwd(
    logits,  # (B, V)
    uniforms,  # (B,)
    tokens,  # (B,)
    logprobs,  # (B,)
    words,
    stride,
    rate: tl.float64,  # log2(e) / temperature
    top_k,
    top_p: tl.float64,
    min_p: tl.float64,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    LOWEST: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wide = logprobs.dtype.element_ty
    logits += row * stride
    rate = tl.full([], rate, wide)
    peak, total, lowest, finite = _normalise(logits, words, rate, LOWEST, BLOCK)
    if GREEDY:
        token, x = _first_equal(logits, words, peak, BLOCK), peak
    else:
        filtered: tl.constexpr = TOP_K or TOP_P or MIN_P
        threshold, ties = tl.full([], -INFINITY, wide), words
        if filtered:
            threshold, ties, total = _filter(
                logits, words, peak, total, lowest, finite, rate, top_k, top_p, min_p, TOP_K, TOP_P, MIN_P, BLOCK
            )
        # below 1 by more than a rounding error, so that the product stays below the total
        u = tl.minimum(tl.maximum(tl.load(uniforms + row).to(wide), 0.0), 1.0 - EPSILON)
        token, x = _first_above(logits, words, peak, rate, threshold, ties, u * total, filtered, BLOCK)
    drawn = total > 0
    tl.store(tokens + row, tl.where(drawn, token, words - 1))
    tl.store(logprobs + row, tl.where(drawn, (x - peak) * rate / LOG2_E - tl.log(total), float("nan")))


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """(B, V), (B,) -> tokens (B,), logprobs (B,)."""
    rows, words = logits.shape
    dtype = wide(logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=dtype, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            _sample_fwd[(rows,)](
                logits.detach(),
                uniforms.contiguous(),
                tokens,
                logprobs,
                words,
                logits.stride(0),
                LOG2_E.value / (temperature or 1.0),
                min(top_k, words),
                top_p,
                min_p,
                GREEDY=temperature == 0,
                TOP_K=0 < top_k < words,
                TOP_P=top_p < 1,
                MIN_P=min_p > 0,
                LOWEST=torch.finfo(dtype).min,
                EPSILON=torch.finfo(dtype).eps,
                BLOCK=BLOCK_BYTES // logits.itemsize,
                num_warps=WARPS,
            )
    return tokens, logprobs
