"""Validation: what is measured between training steps, of the policy and of its average, always on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from twinhead.engine.data import Prompt
from twinhead.engine.policy import Policy
from twinhead.engine.residence import resident
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import Scorer
from twinhead.engine.shares import generate

Evaluation = Callable[[Policy], dict[str, float]]


@dataclass(frozen=True)
class HeldOut:
    """An evaluation: the mean score of answers to prompts that nothing is learned from, drawn from one seed."""

    asked: Sequence[Prompt]
    scorer: Scorer
    sampling: Sampling

    def __call__(self, policy: Policy) -> dict[str, float]:
        """The score as the reward model or the functions give it, and the share of answers that end by themselves."""
        rollouts = generate(policy, [p.tokens for p in self.asked], self.sampling)
        with resident(self.scorer.reward_model, policy.device):
            scores, _ = self.scorer(rollouts, self.asked)
        stopped = sum(r.finished for r in rollouts) / len(rollouts)
        return {"score": scores.double().mean().item(), "eos_rate": stopped}


@dataclass(frozen=True)
class Validation:
    """Every evaluation of every subject, each `every` steps (0: never)."""

    every: int
    evaluations: Sequence[Evaluation]
    subjects: dict[str, Policy]  # by the first part of their metrics' names

    def __call__(self, step: int, timed: Callable[[str], AbstractContextManager[None]]) -> dict[str, float]:
        """eval/score, ..., and eval_ema/score, ... where an average is kept; nothing after a step without a turn."""
        if not self.evaluations or not self.every or step % self.every:
            return {}
        with timed("evaluate"):
            return {
                f"{subject}/{name}": value
                for subject, policy in self.subjects.items()
                for evaluation in self.evaluations
                for name, value in evaluation(policy).items()
            }
