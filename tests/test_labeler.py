"""The programmed labeler samples, judges, and ranks as Plackett and Luce say."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests import toys
from twinhead.engine import data
from twinhead.engine.generate import generate
from twinhead.engine.labeler import compare, gumbel, ranks
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

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


def test_gumbel_has_its_mean_and_variance_and_is_always_finite() -> None:
    rng = random.Random(3)
    drawn = [gumbel(rng) for _ in range(DRAWS)]
    mean = sum(drawn) / DRAWS
    variance = sum((x - mean) ** 2 for x in drawn) / DRAWS
    assert mean == pytest.approx(0.5772, abs=4 * math.sqrt(1.645 / DRAWS))
    assert variance == pytest.approx(math.pi**2 / 6, rel=0.06)

    class Ends(random.Random):
        bits = iter((0, 2**52 - 1))

        def getrandbits(self, k: int) -> int:
            return next(self.bits)

    assert all(math.isfinite(gumbel(Ends())) for _ in range(2))


def test_without_noise_the_best_is_rank_zero_and_equal_scores_share_a_rank() -> None:
    assert ranks([1.0, 3.0, 1.0, -2.0], 0.0, random.Random(0)) == [1, 0, 1, 3]
    assert ranks([], 0.0, random.Random(0)) == []


def test_the_same_seed_gives_the_same_ranking() -> None:
    first, second = ([ranks([0, 0, 0, 0], 1.0, rng) for _ in range(9)] for rng in (random.Random(3), random.Random(3)))
    assert first == second
    assert len(set(map(tuple, first))) > 1


def test_bad_input_is_one_clear_sentence() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="expected noise >= 0, got -1"):
        ranks([0.0, 1.0], -1, rng)
    with pytest.raises(ValueError, match="expected noise >= 0, got nan"):
        ranks([0.0, 1.0], math.nan, rng)
    with pytest.raises(ValueError, match="expected finite scores"):
        ranks([0.0, math.nan], 1.0, rng)


# -- compare -----------------------------------------------------------------------------------------------------------

SAMPLING = Sampling(max_new_tokens=6, seed=5)
K = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with toys.one_thread():
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    path = toys.language_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)
    return Policy.from_pretrained(path, critic="none")


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(toys.tokenizer())


@pytest.fixture(scope="module")
def asked(text: Text) -> data.Loaded[data.Prompt]:
    rows = [row | {"number": i} for i, row in enumerate(toys.prompts(7))]
    return data.prompts(rows, text, 8)


def length(completions: list[str], **columns: Any) -> list[float]:
    """Judges by the number of words alone."""
    return [float(len(completion.split())) for completion in completions]


def test_rows_hold_what_the_policy_says_in_the_order_of_the_prompts(
    policy: Policy, text: Text, asked: data.Loaded[data.Prompt]
) -> None:
    rows = compare(policy, text, asked, length, SAMPLING, num_responses=K, noise=0.0)
    rollouts = generate(policy, [p.tokens for p in asked for _ in range(K)], SAMPLING)
    assert [row["prompt"] for row in rows] == [p.text for p in asked]
    for i, row in enumerate(rows):
        group = rollouts[i * K : (i + 1) * K]
        assert row["completions"] == [text.decode(r.response) for r in group]
        assert row["finished"] == [r.finished for r in group]
        words = [len(completion.split()) for completion in row["completions"]]
        assert row["ranks"] == [sum(other > own for other in words) for own in words]
    assert {flag for row in rows for flag in row["finished"]} == {True, False}
    assert any(len(set(row["completions"])) > 1 for row in rows)


def test_the_judge_sees_prompts_completions_and_columns_side_by_side(
    policy: Policy, text: Text, asked: data.Loaded[data.Prompt]
) -> None:
    seen: list[dict[str, Any]] = []

    def judge(**given: Any) -> list[float]:
        seen.append(given)
        return [0.0] * len(given["completions"])

    rows = compare(policy, text, asked, judge, SAMPLING, num_responses=K, noise=1.0)
    (given,) = seen
    assert given["prompts"] == [p.text for p in asked for _ in range(K)]
    assert given["number"] == [i for i in range(len(asked)) for _ in range(K)]
    assert given["completions"] == [completion for row in rows for completion in row["completions"]]
    assert given["finished"] == [flag for row in rows for flag in row["finished"]]


def test_the_seed_decides_answers_and_noise(policy: Policy, text: Text, asked: data.Loaded[data.Prompt]) -> None:
    def flat(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    def drawn(seed: int) -> list[dict[str, Any]]:
        return compare(policy, text, asked, flat, Sampling(max_new_tokens=6, seed=seed), num_responses=K, noise=1.0)

    first, again, other = drawn(5), drawn(5), drawn(6)
    assert first == again
    assert [row["completions"] for row in first] != [row["completions"] for row in other]
    assert [row["ranks"] for row in first] != [row["ranks"] for row in other]
    assert all(sorted(row["ranks"]) == [0, 1, 2] for row in first)


def test_the_reward_stage_reads_its_rows(
    policy: Policy, text: Text, asked: data.Loaded[data.Prompt], tmp_path: Path
) -> None:
    rows = compare(policy, text, asked, length, SAMPLING, num_responses=K, noise=0.1)
    read = data.comparisons(toys.write(tmp_path / "rows.jsonl", rows), text, 32)
    assert len(read) + sum(map(len, read.dropped.values())) == len(rows)
    by_prompt = {tuple(text.prompt(row["prompt"])): row for row in rows}
    for comparison in read:
        row = by_prompt[tuple(comparison.examples[0].prompt)]
        assert comparison.ranks == row["ranks"]
        ends = [example.response[-1:] == [text.eos_id] for example in comparison.examples]
        assert ends == row["finished"]  # what was cut off is not made to look as if it had ended


def test_a_judge_that_fails_is_named(policy: Policy, text: Text, asked: data.Loaded[data.Prompt]) -> None:
    def few(**_: Any) -> list[float]:
        return [1.0]

    def nan(completions: list[str], **_: Any) -> list[float]:
        return [math.nan] * len(completions)

    with pytest.raises(ValueError, match=r"^reward function few: expected 21 scores, got 1$"):
        compare(policy, text, asked, few, SAMPLING, num_responses=K, noise=1.0)
    with pytest.raises(ValueError, match=r"^expected finite scores, got"):
        compare(policy, text, asked, nan, SAMPLING, num_responses=K, noise=1.0)
