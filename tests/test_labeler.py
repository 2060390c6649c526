"""The programmed labeler follows Plackett-Luce."""

from __future__ import annotations

import math
import random
from itertools import permutations

import pytest

from twinhead.engine.labeler import rankings, ranks

DRAWS = 20_000


def within_chance(hits: int, probability: float) -> bool:
    """Four standard deviations: a correct labeler fails once in 16000 runs, and the seed is fixed."""
    return abs(hits / DRAWS - probability) <= 4 * math.sqrt(probability * (1 - probability) / DRAWS)


@pytest.mark.parametrize("gap", [0.0, 0.3, -1.0, 2.5])
@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_pairs_follow_the_logistic_formula(gap: float, noise: float) -> None:
    rng = random.Random(1)
    wins = sum(ranks([1.0 + gap, 1.0], noise, rng) == [0, 1] for _ in range(DRAWS))
    assert within_chance(wins, 1 / (1 + math.exp(-gap / noise)))


def test_whole_orders_follow_plackett_luce() -> None:
    scores, noise, rng = [0.0, 0.8, -0.5], 0.7, random.Random(2)
    drawn = [tuple(ranks(scores, noise, rng)) for _ in range(DRAWS)]
    weights = [math.exp(score / noise) for score in scores]
    for order in permutations(range(3)):  # order[0] is the best response
        left, probability = sum(weights), 1.0
        for k in order:
            probability *= weights[k] / left
            left -= weights[k]
        assert within_chance(drawn.count(tuple(order.index(k) for k in range(3))), probability)


def test_without_noise_the_best_is_rank_zero_and_equal_scores_share_a_rank() -> None:
    assert ranks([1.0, 3.0, 1.0, -2.0], 0.0, random.Random(0)) == [1, 0, 1, 3]
    assert ranks([], 0.0, random.Random(0)) == []


def test_rows_keep_the_order_of_prompts_and_responses() -> None:
    rows = rankings(["p", "q"], [["a", "b"], ["c", "d", "e"]], [[0, 1], [5, 3, 4]], 0.0, random.Random(0))
    assert rows == [
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]},
        {"prompt": "q", "responses": ["c", "d", "e"], "ranks": [0, 2, 1]},
    ]


def test_the_same_seed_gives_the_same_ranking() -> None:
    first, second = ([ranks([0, 0, 0, 0], 1.0, rng) for _ in range(9)] for rng in (random.Random(3), random.Random(3)))
    assert first == second


def test_bad_input_is_one_clear_sentence() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="expected noise >= 0, got -1"):
        ranks([0.0, 1.0], -1, rng)
    with pytest.raises(ValueError, match="expected finite scores"):
        ranks([0.0, math.nan], 1.0, rng)
    with pytest.raises(ValueError, match="got 1 prompts, 2 lists of responses, 1 lists of scores"):
        rankings(["p"], [["a"], ["b"]], [[0]], 1.0, rng)
    with pytest.raises(ValueError, match="prompt 0: expected one score per response, got 1 for 2"):
        rankings(["p"], [["a", "b"]], [[0]], 1.0, rng)
