"""Generalised advantage estimation, and the whitening of what it gives.

Over the actions of one sequence in order, with t+ the next action (arXiv 1506.02438, equations 11 and 16):

    delta_t = reward_t + gamma value_{t+} - value_t
    advantage_t = delta_t + gamma lam advantage_{t+}
    return_t = advantage_t + value_t

After the last action value_{t+} is the sequence's bootstrap, 0 if there is none, and advantage_{t+} is 0.
"""

from __future__ import annotations

from torch import Tensor

from twinhead.kernels._arguments import expect_between, expect_like, expect_offsets, expect_shape
from twinhead.kernels._dispatch import Backends

_GAE_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="reference")
_WHITEN_BACKENDS = Backends(__name__, torch="reference")


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    whiten: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both shaped like rewards, float32 or wider, without gradient.

    Packed: rewards and values (R,), cu_seqlens (S+1,) int32, bootstrap (S,). A sequence may be empty.
    Padded: rewards and values [B, T], mask [B, T] true at actions (None: everywhere), bootstrap (B,). Columns that are
    no action are skipped: they may hold NaN, cost no discount (tool output inside a response is a hole, not a step),
    and come out as 0.

    `bootstrap` is the value of the state after the last action, for sequences that were cut off rather than finished.
    With `whiten` the advantages come back as whiten(advantages, mask) would give them, over the actions of all
    sequences together, their statistics taken in the same pass; the returns are those of the advantages before.

    Raises ValueError for shapes that do not fit, gamma or lam outside [0, 1], or mask and cu_seqlens together.
    """
    expect_like("gae", "rewards", rewards, values=values, mask=mask)
    expect_between("gae", 0, 1, gamma=gamma, lam=lam)
    if cu_seqlens is None and rewards.ndim != 2:
        raise ValueError(f"gae: expected rewards [B, T], or (R,) with cu_seqlens, got shape {tuple(rewards.shape)}")
    if cu_seqlens is not None:
        if rewards.ndim != 1 or mask is not None:
            got = f"rewards of shape {tuple(rewards.shape)} and {'no ' if mask is None else 'a '}mask"
            raise ValueError(f"gae: expected rewards (R,) and no mask with cu_seqlens, got {got}")
        expect_offsets("gae", cu_seqlens, len(rewards))
    if bootstrap is not None:
        expect_shape("gae", "bootstrap", bootstrap, len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1)
        bootstrap = bootstrap.detach()
    return _GAE_BACKENDS.pick("gae", rewards.device, backend).gae(
        rewards.detach(),
        values.detach(),
        gamma=gamma,
        lam=lam,
        mask=mask,
        cu_seqlens=cu_seqlens,
        bootstrap=bootstrap,
        whitens=whiten,
    )


def whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all entries, or over those where `mask` is true; the others become 0.

    The shape of x, float32 or wider; unmasked entries may hold NaN. Without `shift_mean` the scale changes and the mean
    stays. The variance divides by N, or by N - 1 with `unbiased`. N = 0 gives zeros, N = 1 gives 0. Raises ValueError
    for N = 1 with `unbiased`, where looking costs a GPU a sync, and if the mask does not have the shape of x.
    """
    expect_like("whiten", "x", x, mask=mask)
    implementation = _WHITEN_BACKENDS.pick("whiten", x.device)
    if unbiased and (x.numel() if mask is None else int(mask.bool().sum())) == 1:
        raise ValueError("whiten: expected at least 2 entries for an unbiased variance, got 1")
    return implementation.whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased)
