"""The C++ twin of gae: every sequence is a run of a flat array, so one call serves the packed and the padded form."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels._precision import wide


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[B, T] with a mask (or None), or (R,) with cu_seqlens; bootstrap (B,) or (S,). Two tensors like rewards."""
    dtype = wide(rewards, values)
    advantages = torch.empty(rewards.shape, dtype=dtype)
    returns = torch.empty_like(advantages)
    if cu_seqlens is None:
        rows, width = rewards.shape
        offsets = torch.arange(rows + 1) * width
    else:
        offsets = cu_seqlens.long()
    _C.gae(
        rewards.to(dtype).contiguous().view(-1).numpy(),
        values.to(dtype).contiguous().view(-1).numpy(),
        offsets.numpy(),
        None if mask is None else mask.bool().contiguous().view(-1).numpy(),
        None if bootstrap is None else bootstrap.to(dtype).contiguous().numpy(),
        gamma,
        lam,
        torch.get_num_threads(),
        advantages.view(-1).numpy(),
        returns.view(-1).numpy(),
    )
    return advantages, returns
