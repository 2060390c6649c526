"""What torch knows of a fused gae: the shapes of its results. It has no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

from twinhead.kernels._precision import wide


def fused(backend: str, forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The gae of `backend`, from its forward, which takes and gives what `results` does, and is registered here."""
    operator = custom_op(f"twinhead::gae_{backend}", forward, mutates_args=())
    operator.register_fake(results)

    def gae(
        rewards: Tensor,
        values: Tensor,
        *,
        gamma: float,
        lam: float,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        bootstrap: Tensor | None,
        whitens: bool,
    ) -> tuple[Tensor, Tensor]:
        """[B, T] with a mask (or None), or (R,) with cu_seqlens; bootstrap (B,) or (S,). Two tensors like rewards."""
        mask = None if mask is None else mask.bool()
        return operator(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, whitens)

    return gae


def results(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,  # bool
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    whitens: bool,
) -> tuple[Tensor, Tensor]:
    """Memory for the advantages and the returns."""
    advantages = torch.empty(rewards.shape, dtype=wide(rewards, values), device=rewards.device)
    return advantages, torch.empty_like(advantages)
