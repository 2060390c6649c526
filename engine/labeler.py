"""A programmed labeler: sampled answers, judged and ranked with Gumbel noise, become rows of comparisons."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from twinhead.engine.data import Prompt
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import RewardFunction, score_with
from twinhead.engine.text import Text


def compare(
    policy: Policy,
    text: Text,
    asked: Sequence[Prompt],
    judge: RewardFunction,
    sampling: Sampling,
    *,
    num_responses: int,
    noise: float,
) -> list[dict[str, Any]]:
    """Let the policy answer every prompt `num_responses` times and rank the answers.

    One row per prompt: prompt, completions, ranks (0 best), and finished (whether each answer ended by itself), as
    twinhead.engine.data.comparisons() reads them. The noise is drawn from sampling.seed.
    """
    repeated = [p for p in asked for _ in range(num_responses)]
    rollouts = generate(policy, [p.tokens for p in repeated], sampling)
    completions = [text.decode(r.response) for r in rollouts]
    scores = score_with(judge, rollouts, completions, repeated).tolist()
    rng = random.Random(sampling.seed)
    rows = []
    for i, prompt in enumerate(asked):
        group = slice(i * num_responses, (i + 1) * num_responses)
        finished = [r.finished for r in rollouts[group]]
        order = ranks(scores[group], noise, rng)
        rows.append({"prompt": prompt.text, "completions": completions[group], "ranks": order, "finished": finished})
    return rows


def ranks(scores: Sequence[float], noise: float, rng: random.Random) -> list[int]:
    """K gold scores -> K ranks: rank_k = the number of responses that the labeler finds strictly better, so 0 is best.

    The labeler orders score + noise * Gumbel(0, 1), which draws whole orders from the Plackett-Luce model (Plackett,
    1975; Luce, 1959): P(a beats b) = sigmoid((score_a - score_b) / noise), whatever else is ranked beside them.
    Without noise, equal scores share a rank. Raises ValueError for a negative noise or a score that is not finite.
    """
    if not noise >= 0:
        raise ValueError(f"expected noise >= 0, got {noise}")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"expected finite scores, got {list(scores)}")
    perceived = [score + noise * gumbel(rng) for score in scores]
    return [sum(other > own for other in perceived) for own in perceived]


def gumbel(rng: random.Random) -> float:
    """One draw of the standard Gumbel distribution, -log(-log(u))."""
    u = (rng.getrandbits(52) + 0.5) / 2**52  # strictly inside (0, 1), where both logarithms are finite
    return -math.log(-math.log(u))
