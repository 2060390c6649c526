"""Best-of-n: several responses to each prompt are sampled, and the one with the highest score is kept.

Nothing is trained, so it is what trained policies are to be measured against (Gao et al. 2022 draw both over the same
axis, the KL divergence from where they started).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from twinhead.engine.batch import Rollout
from twinhead.engine.data import Prompt
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import Scorer, nonfinite_rows


@dataclass(frozen=True, slots=True)
class Best:
    """The winners of P prompts."""

    rollouts: list[Rollout]  # (P,)
    scores: Tensor  # (P, n) of all responses; a row's maximum is the winner's
    kl: float  # nats per response, from the policy that was sampled: see best_of_kl


def best_of(
    policy: Policy, prompts: Sequence[Prompt], scorer: Scorer, n: int, sampling: Sampling | None = None
) -> Best:
    """Sample n responses to each prompt, as `sampling` says, and keep the best; among equals the first.

    Raises ValueError for n below 1, for greedy sampling of more than one, and for scores that are not finite.
    """
    sampling = sampling or Sampling()
    kl = best_of_kl(n)
    if sampling.temperature == 0 and n > 1:
        raise ValueError(f"best_of: expected a temperature above 0 for n={n} different responses, got 0")
    asked = [prompt for prompt in prompts for _ in range(n)]
    rollouts = generate(policy, [p.tokens for p in asked], sampling)
    scores, _ = scorer(rollouts, asked)
    if bad := nonfinite_rows(scores):
        raise ValueError(f"best_of: expected finite scores, got {scores[bad[0]]} for prompt {bad[0] // n}")
    table = scores.view(len(prompts), n)
    first = (table == table.amax(1, keepdim=True)).int().argmax(1)
    return Best([rollouts[i * n + best] for i, best in enumerate(first.tolist())], table, kl)


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n: nats by which the best of n differs from one response, where no two score the same.

    Stiennon et al. 2020, appendix G.3; an upper bound in general (Beirami et al. 2024). Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"best_of: expected n of at least 1, got {n}")
    return math.log(n) - (n - 1) / n
