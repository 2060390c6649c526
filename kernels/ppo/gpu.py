"""The Triton backend of ppo_loss: one launch over the tokens, and a small one that adds up its blocks.

A block's sums go to memory of their own and are added in one fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels._surrogate import LOG_RATIO_LIMIT, STATISTICS
from twinhead.kernels.ppo.operator import fused, results

# one 16-byte load of every array per thread in float32; 65,536 tokens are then 128 programs, one for every core
BLOCK = 512
WARPS = 4
PARTS = 256  # blocks added at a time

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
ROWS = tl.constexpr(16)  # the next power of two above the number of statistics
POLICY, VALUE, ENTROPY, K1, K3, REF_KL, CLIPS, VALUE_CLIPS, RATIO, RATIO_MAX = map(tl.constexpr, range(len(STATISTICS)))


@triton.jit
def _clamp(x, low, high):
    """As torch has it, unlike tl.clamp: NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _larger(x, y):
    """As torch has it: NaN is larger than everything."""
    return tl.maximum(x, y, tl.PropagateNan.ALL)


@triton.jit
def _load(pointers, inside):
    """0 outside; with None everything lies inside, and the compiler may read 16 bytes at a time."""
    if inside is None:
        found = tl.load(pointers)
    else:
        found = tl.load(pointers, inside, 0)
    return found


@triton.jit
def _read(logprobs, old_logprobs, advantages, values, old_values, returns, entropy, mask, token, inside):
    """A block of every array, and which of it are actions. The loads stand together, so that none waits for another."""
    action = token >= 0
    if mask is not None:
        action = _load(mask + token, inside) != 0
    elif inside is not None:
        action = inside
    new, old = _load(logprobs + token, inside), _load(old_logprobs + token, inside)
    value, old_value = _load(values + token, inside), _load(old_values + token, inside)
    advantage, target = _load(advantages + token, inside), _load(returns + token, inside)
    spread = tl.zeros_like(new)
    if entropy is not None:
        spread = _load(entropy + token, inside)
    return new, old, advantage, value, old_value, target, spread, action


@triton.jit
def _select(action, x, wide: tl.constexpr):
    """x in the dtype `wide`, and 0 at what is no action."""
    return tl.where(action, x.to(wide), 0.0)


@triton.jit
def _divisor(normalizer, count, wide: tl.constexpr):
    """The normalizer that was counted on the device if there is one, else `count`; at least 1."""
    if normalizer is not None:
        return tl.maximum(tl.load(normalizer).to(wide), 1)
    return tl.maximum(tl.full([], count, wide), 1)


@triton.jit
def _policy(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip):
    """The loss, its slope by logprobs, the log-ratio, the same within limits, the ratio, and where it is clipped."""
    log_ratio = logprobs - old_logprobs
    held = _clamp(log_ratio, -LIMIT, LIMIT)
    ratio = tl.exp(held)
    free = -advantages * ratio
    fenced = -advantages * _clamp(ratio, 1 - tl.cast(clip_low, ratio.dtype), 1 + tl.cast(clip_high, ratio.dtype))
    clipped = fenced > free
    larger = tl.where(clipped, fenced, free)
    ceiling = -tl.cast(dual_clip, ratio.dtype) * advantages
    bound = (advantages < 0) & (larger > ceiling)
    loss = tl.where(bound, ceiling, larger)
    # the slope of -A exp(new - old) is that expression itself
    slope = tl.where(clipped | bound | (held != log_ratio), 0.0, loss)
    return loss, slope, log_ratio, held, ratio, clipped


@triton.jit
def _value(values, old_values, returns, clip):
    """The loss, its slope by values, and where it is clipped."""
    clip = tl.cast(clip, values.dtype)
    error = values - returns
    fenced = _clamp(values, old_values - clip, old_values + clip) - returns
    clipped = fenced * fenced > error * error
    return tl.where(clipped, fenced * fenced, error * error) / 2, tl.where(clipped, 0.0, error), clipped


@triton.jit(do_not_specialize=["total", "count"])
def _ppo_fwd(
    logprobs,  # (R,), and so are the next six
    old_logprobs,
    advantages,
    values,
    old_values,
    returns,
    entropy,  # or None
    mask,  # (R,) or None
    normalizer,  # () or None
    slopes,  # (2 or 3, R), written if LEARNS
    sums,  # (10, blocks), written
    total,
    count,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    value_clip: tl.float64,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    LEARNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wide = sums.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < total
    arrays = logprobs, old_logprobs, advantages, values, old_values, returns, entropy, mask
    if (tl.program_id(0) + 1).to(tl.int64) * BLOCK <= total:
        new, old, advantage, value, old_value, target, spread, action = _read(*arrays, token, None)
    else:
        new, old, advantage, value, old_value, target, spread, action = _read(*arrays, token, inside)
    new, old, advantage = _select(action, new, wide), _select(action, old, wide), _select(action, advantage, wide)
    value, old_value = _select(action, value, wide), _select(action, old_value, wide)
    target, spread = _select(action, target, wide), _select(action, spread, wide)
    loss, slope, log_ratio, held, ratio, clipped = _policy(new, old, advantage, clip_low, clip_high, dual_clip)
    value_loss, value_slope, value_clipped = _value(value, old_value, target, value_clip)

    sums += tl.program_id(0)
    blocks = tl.num_programs(0).to(tl.int64)
    tl.store(sums + POLICY * blocks, tl.sum(loss))
    tl.store(sums + VALUE * blocks, tl.sum(value_loss))
    tl.store(sums + ENTROPY * blocks, tl.sum(spread))
    tl.store(sums + K1 * blocks, -tl.sum(log_ratio))
    tl.store(sums + K3 * blocks, tl.sum(ratio - 1 - held))
    tl.store(sums + REF_KL * blocks, 0.0)
    tl.store(sums + CLIPS * blocks, tl.sum(clipped.to(wide)))
    tl.store(sums + VALUE_CLIPS * blocks, tl.sum(value_clipped.to(wide)))
    tl.store(sums + RATIO * blocks, tl.sum(tl.where(action, ratio, 0.0)))
    tl.store(sums + RATIO_MAX * blocks, tl.reduce(tl.where(action, ratio, 0.0), 0, _larger))

    if LEARNS:
        divisor = _divisor(normalizer, count, wide)
        tl.store(slopes + token, slope / divisor, inside)
        tl.store(slopes + (token + total), value_slope * tl.cast(value_coef, wide) / divisor, inside)
        if entropy is not None:
            spread_slope = -tl.cast(entropy_coef, wide) / divisor
            tl.store(slopes + (token + total + total), tl.where(action, spread_slope, 0.0), inside)


@triton.jit(do_not_specialize=["blocks", "count"])
def _ppo_finish(
    sums,  # (10, blocks)
    normalizer,  # () or None
    loss,  # (), written
    statistics,  # (10,), written
    blocks,
    count,
    value_coef: tl.float64,
    entropy_coef: tl.float64,
    STATISTICS: tl.constexpr,
    PARTS: tl.constexpr,
):
    wide = sums.dtype.element_ty
    row = tl.arange(0, ROWS)
    total, peak = tl.zeros([ROWS], wide), tl.zeros([ROWS], wide)
    for first in range(0, blocks, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (row[:, None] < STATISTICS) & (part[None, :] < blocks)
        found = tl.load(sums + row[:, None].to(tl.int64) * blocks + part[None, :], there, 0)
        total += tl.sum(found, 1)
        peak = _larger(peak, tl.reduce(found, 1, _larger))
    shares = total / _divisor(normalizer, count, wide)
    terms = tl.where(row == POLICY, shares, 0.0)
    terms = tl.where(row == VALUE, tl.cast(value_coef, wide) * shares, terms)
    terms = tl.where(row == ENTROPY, -tl.cast(entropy_coef, wide) * shares, terms)
    tl.store(loss, tl.sum(terms))
    tl.store(statistics + row, tl.where(row == RATIO_MAX, peak, shares), row < STATISTICS)


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
    if normalizer is not None:
        normalizer = normalizer.to(loss.device, non_blocking=True)
    elif count == 0:
        normalizer, count = (None, logprobs.numel()) if mask is None else (mask.sum(), 0)
    blocks = max(triton.cdiv(logprobs.numel(), BLOCK), 1)
    sums = loss.new_empty(len(STATISTICS), blocks)
    with torch.cuda.device_of(logprobs):
        _ppo_fwd[(blocks,)](
            *(None if x is None else x.contiguous() for x in (*tokens, mask)),
            normalizer,
            slopes,
            sums,
            logprobs.numel(),
            count,
            *settings,
            LEARNS=learns,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        _ppo_finish[(1,)](
            sums, normalizer, loss, stats, blocks, count, *settings[4:], STATISTICS=len(STATISTICS), PARTS=PARTS
        )
    return loss, stats, slopes


ppo_loss = fused("triton", forward)
