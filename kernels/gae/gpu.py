"""The Triton backend of gae: a program per sequence, and within it a parallel scan, block after block from the end.

What an action hands back to the one before it is a single number. With step = gamma (1 - lam) and decay = gamma lam

    H_t = gamma value_t + decay advantage_t = step value_t + decay return_t,    return_t = reward_t + H_{t+}

so H_t = (step value_t + decay reward_t) + decay H_{t+}, a chain of affine functions; their composition is associative.
An element that is no action is the identity. After the last action H is gamma times the bootstrap.

To whiten, every program leaves behind how many advantages its sequence has, their mean, and the sum of their squared
deviations from it; one more program joins them, always in the same order, and a third launch rescales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels.gae.operator import fused, results
from twinhead.kernels.gae.reference import WHITEN_EPSILON

# most responses fit into one block, and a scan's depth grows only with its logarithm; 8 elements per thread
BLOCK = 1024
WARPS = 4
PARTS = 1024  # sequences whose moments are joined at a time

EPSILON = tl.constexpr(WHITEN_EPSILON)


@triton.jit
def _before(slope, shift, past_slope, past_shift, own_slope, own_shift, own_past_slope, own_past_shift):
    """The function of a stretch of elements after that of the stretch that follows it in time.

    The first two numbers are the function of all its elements, the last two that of all but the foremost.
    """
    return (
        own_slope * slope,
        own_slope * shift + own_shift,
        own_past_slope * slope,
        own_past_slope * shift + own_past_shift,
    )


@triton.jit
def _joined(count, mean, deviations, counts, means, spreads):
    """The moments of one set joined with those of every lane's set (Chan, Golub and LeVeque 1979).

    Moments are a count, a mean, and the sum of the squared deviations from it.
    """
    found = tl.sum(counts)
    middle = tl.sum(counts * means) / tl.maximum(found, 1)
    spread = tl.sum(spreads + counts * (means - middle) * (means - middle))
    share, apart = found / tl.maximum(count + found, 1), middle - mean
    return count + found, mean + apart * share, deviations + spread + apart * apart * count * share


@triton.jit(do_not_specialize=["width"])
def _gae_fwd(
    rewards,
    values,
    mask,  # like rewards, or None
    cu_seqlens,  # (S+1,), or None: sequences of `width` elements
    bootstrap,  # (S,) or None
    advantages,
    returns,
    moments,  # (S, 3), written, or None
    width,
    gamma: tl.float64,
    step: tl.float64,
    decay: tl.float64,
    BLOCK: tl.constexpr,
):
    wide = advantages.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    else:
        start, length = sequence * width, tl.full([], width, tl.int64)
    step, decay = tl.cast(step, wide), tl.cast(decay, wide)
    following = tl.zeros([], wide)
    if bootstrap is not None:
        following = tl.cast(gamma, wide) * tl.load(bootstrap + sequence).to(wide)

    count, mean, deviations = tl.zeros([], wide), tl.zeros([], wide), tl.zeros([], wide)
    lane = tl.arange(0, BLOCK)
    for done in range(0, length, BLOCK):
        first = (length - done - 1) // BLOCK * BLOCK
        inside = first + lane < length
        place = start + first + lane
        action = inside
        if mask is not None:
            action = tl.load(mask + place, inside, 0) != 0
        reward = tl.where(action, tl.load(rewards + place, inside, 0).to(wide), 0.0)
        value = tl.where(action, tl.load(values + place, inside, 0).to(wide), 0.0)
        slope = tl.where(action, decay, 1.0)
        shift = step * value + decay * reward
        alone = slope, shift, tl.full([BLOCK], 1.0, wide), tl.zeros([BLOCK], wide)
        slope, shift, past_slope, past_shift = tl.associative_scan(alone, 0, _before, reverse=True)
        result = reward + past_slope * following + past_shift
        tl.store(returns + place, tl.where(action, result, 0.0), inside)
        advantage = tl.where(action, result - value, 0.0)
        tl.store(advantages + place, advantage, inside)
        following = tl.sum(tl.where(lane == 0, slope * following + shift, 0.0))
        if moments is not None:
            single = action.to(wide), advantage, tl.zeros([BLOCK], wide)
            count, mean, deviations = _joined(count, mean, deviations, *single)
    if moments is not None:
        tl.store(moments + 3 * sequence, count)
        tl.store(moments + 3 * sequence + 1, mean)
        tl.store(moments + 3 * sequence + 2, deviations)


@triton.jit(do_not_specialize=["sequences"])
def _gae_join(
    moments,  # (S, 3)
    scale,  # (2,), written: the mean, and one by the standard deviation
    sequences,
    PARTS: tl.constexpr,
):
    wide = moments.dtype.element_ty
    count, mean, deviations = tl.zeros([], wide), tl.zeros([], wide), tl.zeros([], wide)
    for first in range(0, sequences, PARTS):
        sequence = (first + tl.arange(0, PARTS)).to(tl.int64)
        there = sequence < sequences
        counts, means = tl.load(moments + 3 * sequence, there, 0), tl.load(moments + 3 * sequence + 1, there, 0)
        spreads = tl.load(moments + 3 * sequence + 2, there, 0)
        count, mean, deviations = _joined(count, mean, deviations, counts, means, spreads)
    tl.store(scale, mean)
    tl.store(scale + 1, tl.rsqrt(deviations / tl.maximum(count, 1) + EPSILON))


@triton.jit(do_not_specialize=["total"])
def _gae_whiten(
    advantages,  # (total,), overwritten
    mask,  # (total,) or None
    scale,  # (2,)
    total,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < total
    whitened = (tl.load(advantages + token, inside, 0) - tl.load(scale)) * tl.load(scale + 1)
    if mask is not None:
        whitened = tl.where(tl.load(mask + token, inside, 0) != 0, whitened, 0.0)
    tl.store(advantages + token, whitened, inside)


def forward(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    whitens: bool,
) -> tuple[Tensor, Tensor]:
    """As in operator.results, and filled."""
    advantages, returns = results(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, whitens)
    if total := rewards.numel():
        sequences = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
        mask = None if mask is None else mask.contiguous()
        moments = advantages.new_empty(sequences, 3) if whitens else None
        with torch.cuda.device_of(rewards):
            _gae_fwd[(sequences,)](
                *(None if x is None else x.contiguous() for x in (rewards, values, mask, cu_seqlens, bootstrap)),
                advantages,
                returns,
                moments,
                rewards.shape[-1],
                gamma,
                gamma * (1 - lam),
                gamma * lam,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
            if moments is not None:
                scale = advantages.new_empty(2)
                _gae_join[(1,)](moments, scale, sequences, PARTS=PARTS)
                _gae_whiten[(triton.cdiv(total, BLOCK),)](advantages, mask, scale, total, BLOCK=BLOCK)
    return advantages, returns


gae = fused("triton", forward)
