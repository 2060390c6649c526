"""Diversity: what repeating each other costs, written out; and as a reward, by name, of both stages that take one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toys
from twinhead.engine import scorers
from twinhead.engine.batch import Rollout
from twinhead.engine.data import Prompt
from twinhead.engine.diversity import SHIPPED, batch_diversity, group_diversity, rarity
from twinhead.engine.scorers import Scorer
from twinhead.engine.text import Text

Box = dict[str, str]
LOOP = [5, 6, 5, 6, 5, 6]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


def bigrams(answer: list[int]) -> list[tuple[int, int]]:
    return [(answer[i], answer[i + 1]) for i in range(len(answer) - 1)]


@pytest.mark.parametrize("seed", range(5))
def test_weighted_by_bigrams_the_rewards_average_to_distinct_2(seed: int) -> None:
    rng = random.Random(seed)
    answers = [rng.choices(range(4), k=rng.randrange(2, 9)) for _ in range(6)]
    every = [gram for answer in answers for gram in bigrams(answer)]
    rewards = rarity(answers)
    total = sum(reward * (len(answer) - 1) for reward, answer in zip(rewards, answers, strict=True))
    assert total / len(every) == pytest.approx(len(set(every)) / len(every))
    assert all(0 < reward <= 1 for reward in rewards)


def test_equal_answers_share_and_a_loop_pays() -> None:
    assert rarity([[5, 6, 7]] * 4) == [0.25] * 4
    assert rarity([[5, 6, 7], [7, 6, 5]]) == [1.0, 1.0]
    assert rarity([LOOP]) == [pytest.approx((3 * 1 / 3 + 2 * 1 / 2) / 5)]
    assert rarity([[5], [5], [6], [5, 6], []]) == [0.5, 0.5, 1.0, 1.0, 0.0]
    assert rarity([]) == []
    assert rarity([[5, 6, 7], [5, 6, 8]], n=3) == [1.0, 1.0]


def test_a_group_is_one_prompt_and_a_batch_is_all() -> None:
    question = [{"role": "user", "content": "one"}]
    asked: dict[str, Any] = {
        "prompts": ["one", question, "one", question, "two"],
        "completion_ids": [[5, 6], [5, 6], [5, 6], [7, 8], [5, 6]],
    }
    assert group_diversity(**asked) == [0.5, 1.0, 0.5, 1.0, 1.0]
    assert batch_diversity(**asked) == [0.25, 0.25, 0.25, 1.0, 0.25]


def test_it_is_a_reward_among_others_by_its_name() -> None:
    assert [scorers.load_function(name) for name in SHIPPED] == [group_diversity, batch_diversity]
    with pytest.raises(ValueError, match=r"^process_function: expected file.py:function with an existing file, got "):
        scorers.load_function("group_diversity", "process_function")
    scorer = Scorer(Text(toys.tokenizer()), None, [group_diversity, batch_diversity], [1.0, 10.0])
    answers = [[5, 6], [5, 6], [7, 8], [5, 6]]
    rollouts = [Rollout([4], answer, torch.zeros(2), None, True) for answer in answers]
    total, sources = scorer(rollouts, [Prompt([4], word, {}) for word in ("a", "a", "a", "b")])
    assert sources["group_diversity"].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert total.tolist() == pytest.approx([0.5 + 10 / 3, 0.5 + 10 / 3, 11.0, 1 + 10 / 3])


@pytest.mark.parametrize(("stage", "name"), [("grpo", "group_diversity"), ("ppo", "batch_diversity")])
def test_answers_grow_more_different_where_it_is_paid_for(stage: str, name: str, box: Box, tmp_path: Path) -> None:
    long = {"steps": 15, "max_new_tokens": 6, "learning_rate": 1e-2, "seed": 1}
    many = {"prompts_per_step": 8} if stage == "grpo" else {"rollouts_per_step": 32}
    weights = {"reward_functions": (f"{box['rewards']}:goodness", name), "prompts": toys.prompts(24)}
    found = {}
    for weight in (0.0, 3.0):
        run = toys.train(stage, box, tmp_path / f"{weight}", reward_weights=(1.0, weight), **weights, **long, **many)
        last = toys.metrics(run.dir)[-3:]
        found[weight] = sum(line[f"score/{name}"] for line in last) / 3
    assert found[3.0] > found[0.0] + 0.1, found
