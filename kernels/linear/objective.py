"""The PPO objective of linear_ppo_loss on (R,) tokens: its value, and its slope, which needs only one block of rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from twinhead.kernels import _estimators
from twinhead.kernels._actions import Actions
from twinhead.kernels._arguments import expect_between, expect_choice
from twinhead.kernels._surrogate import Surrogate, statistics, surrogate


@dataclass(frozen=True)
class Objective:
    """[sum of the clipped surrogate + kl_coef * estimator - entropy_coef * entropy] / normalizer."""

    old_logprobs: Tensor  # (R,)
    advantages: Tensor  # (R,)
    ref_logprobs: Tensor | None  # (R,)
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float
    normalizer: Tensor | int | None

    def __post_init__(self) -> None:
        op = "linear_ppo_loss"
        expect_between(op, 0, 1, clip_low=self.clip_low)
        expect_between(op, 0, inf, clip_high=self.clip_high)
        expect_between(op, 1, inf, dual_clip=self.dual_clip)
        expect_choice(op, "kl_estimator", self.kl_estimator, _estimators.KINDS)
        if self.kl_coef != 0 and self.ref_logprobs is None:
            raise ValueError(f"{op}: expected ref_logprobs for kl_coef={self.kl_coef}, got None")

    def loss(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(R,), (R,) -> the loss, 0-dimensional, and its statistics."""
        actions = Actions(logprobs, None)
        divisor = actions.divisor(self.normalizer)
        policy = self._surrogate(logprobs, slice(None))
        measured = {"pg_loss": policy.loss.sum() / divisor, "entropy": entropy.sum() / divisor}
        loss = measured["pg_loss"] - self.entropy_coef * measured["entropy"]
        if self.ref_logprobs is not None:
            kl = _estimators.estimate(logprobs, self.ref_logprobs, self.kl_estimator)
            measured["ref_kl"] = kl.sum() / divisor
            loss = loss + self.kl_coef * measured["ref_kl"]
        return loss, statistics(policy, actions, divisor, **measured)

    def slope(self, logprobs: Tensor, rows: slice) -> Tensor:
        """d loss / d logprobs for the block `rows`, whose log-probs (n,) these are."""
        slope = self._surrogate(logprobs, rows).slope
        if self.ref_logprobs is not None and self.kl_coef != 0:
            slope = slope + self.kl_coef * _estimators.slope(logprobs, self.ref_logprobs[rows], self.kl_estimator)
        return slope / self._divisor

    def entropy_slope(self, entropy: Tensor) -> Tensor:
        """d loss / d entropy, the same for every token of `entropy` (n,)."""
        return torch.full_like(entropy, -self.entropy_coef) / self._divisor

    @property
    def _divisor(self) -> Tensor | int:
        return Actions(self.advantages, None).divisor(self.normalizer)

    def _surrogate(self, logprobs: Tensor, rows: slice) -> Surrogate:
        old_logprobs, advantages = self.old_logprobs[rows], self.advantages[rows]
        return surrogate(logprobs, old_logprobs, advantages, self.clip_low, self.clip_high, self.dual_clip)
