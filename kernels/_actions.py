"""Which entries of a per-token tensor are actions; everything else is left out before any arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


class Actions:
    """The actions of tensors shaped like `tokens`: all of them, or those where `mask` is true.

    Unmasked entries may hold NaN or infinity: `select` replaces them by 0 before anything is computed, which also
    keeps them out of every gradient (0 * NaN would not).
    """

    def __init__(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.mask = None if mask is None else mask.bool()
        self.count: Tensor | int = max(tokens.numel(), 1) if self.mask is None else self.mask.sum().clamp(min=1)

    def select(self, tensor: Tensor) -> Tensor:
        """`tensor` with 0 at everything that is no action."""
        return tensor if self.mask is None else torch.where(self.mask, tensor, 0)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the actions, 0-dimensional; 0 if there is none."""
        return self.select(tensor).sum() / self.count

    def divisor(self, normalizer: Tensor | int | None) -> Tensor | int:
        """What a loss divides by: the caller's global count, else the number of actions here; never less than 1."""
        if normalizer is None:
            return self.count
        return normalizer.clamp(min=1) if isinstance(normalizer, Tensor) else max(normalizer, 1)
