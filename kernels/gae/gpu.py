"""The Triton backend of gae: a program per sequence, and within it a parallel scan, block after block from the end.

What an action hands back to the one before it is a single number. With step = gamma (1 - lam) and decay = gamma lam

    H_t = gamma value_t + decay advantage_t = step value_t + decay return_t,    return_t = reward_t + H_{t+}

so H_t = (step value_t + decay reward_t) + decay H_{t+}, a chain of affine functions; their composition is associative.
An element that is no action is the identity. After the last action H is gamma times the bootstrap.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from twinhead.kernels.gae.operator import fused, results

# most responses fit into one block, and a scan's depth grows only with its logarithm; 8 elements per thread
BLOCK = 1024
WARPS = 4


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


@triton.jit(do_not_specialize=["width"])
def _gae_fwd(
    rewards,
    values,
    mask,  # like rewards, or None
    cu_seqlens,  # (S+1,), or None: sequences of `width` elements
    bootstrap,  # (S,) or None
    advantages,
    returns,
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
        tl.store(advantages + place, tl.where(action, result - value, 0.0), inside)
        following = tl.sum(tl.where(lane == 0, slope * following + shift, 0.0))


def forward(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As in operator.results, and filled."""
    advantages, returns = results(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
    sequences = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences:
        _gae_fwd[(sequences,)](
            *(None if x is None else x.contiguous() for x in (rewards, values, mask, cu_seqlens, bootstrap)),
            advantages,
            returns,
            rewards.shape[-1],
            gamma,
            gamma * (1 - lam),
            gamma * lam,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return advantages, returns


gae = fused("triton", forward)
