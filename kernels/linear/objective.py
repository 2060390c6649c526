"""The PPO objective of linear_ppo_loss on (R,) tokens: its value, and its slope, which needs only one block of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    @property
    def divisor(self) -> Tensor:
        """What the sums are divided by, 0-dimensional, on the device of the tokens and in their dtype."""
        divisor = Actions(self.advantages, None).divisor(self.normalizer)
        if isinstance(divisor, Tensor):
            return divisor.detach().to(self.advantages)
        return self.advantages.new_full((), divisor)

    def at(self, rows: slice) -> Objective:
        """The part of the same objective that one block of rows has."""
        old_logprobs, advantages = self.old_logprobs[rows], self.advantages[rows]
        part = replace(self, old_logprobs=old_logprobs, advantages=advantages, normalizer=self.divisor)
        return part if self.ref_logprobs is None else replace(part, ref_logprobs=self.ref_logprobs[rows])

    def loss(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(R,), (R,) -> the loss, 0-dimensional, and its statistics."""
        divisor, policy = self.divisor, self._surrogate(logprobs)
        measured = {"pg_loss": policy.loss.sum() / divisor, "entropy": entropy.sum() / divisor}
        loss = measured["pg_loss"] - self.entropy_coef * measured["entropy"]
        if self.ref_logprobs is not None:
            kl = _estimators.estimate(logprobs, self.ref_logprobs, self.kl_estimator)
            measured["ref_kl"] = kl.sum() / divisor
            loss = loss + self.kl_coef * measured["ref_kl"]
        return loss, statistics(policy, Actions(logprobs, None), divisor, **measured)

    def slope(self, logprobs: Tensor) -> Tensor:
        """d loss / d logprobs, (R,)."""
        slope = self._surrogate(logprobs).slope
        if self.ref_logprobs is not None and self.kl_coef != 0:
            slope = slope + self.kl_coef * _estimators.slope(logprobs, self.ref_logprobs, self.kl_estimator)
        return slope / self.divisor

    def entropy_slope(self, entropy: Tensor) -> Tensor | None:
        """d loss / d entropy, (R,), the same for every token; None where the entropy has no part in the loss."""
        return None if self.entropy_coef == 0 else torch.full_like(entropy, -self.entropy_coef) / self.divisor

    def _surrogate(self, logprobs: Tensor) -> Surrogate:
        return surrogate(logprobs, self.old_logprobs, self.advantages, self.clip_low, self.clip_high, self.dual_clip)
