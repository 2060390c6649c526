"""The C++ twin of gae: every sequence is a run of a flat array, so one call serves the packed and the padded form."""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels.gae.operator import fused, results


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

    def flat(tensor: Tensor, dtype: torch.dtype = advantages.dtype) -> NDArray:
        return tensor.to(dtype).contiguous().view(-1).numpy()

    if cu_seqlens is None:
        rows, width = rewards.shape
        cu_seqlens = torch.arange(rows + 1) * width
    _C.gae(
        flat(rewards),
        flat(values),
        flat(cu_seqlens, torch.int64),
        None if mask is None else flat(mask, torch.bool),
        None if bootstrap is None else flat(bootstrap),
        gamma,
        lam,
        whitens,
        torch.get_num_threads(),
        flat(advantages),
        flat(returns),
    )
    return advantages, returns


gae = fused("cpu", forward)
