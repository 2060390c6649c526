"""A reward model that its policy has outgrown is refreshed by comparisons of what the policy says now."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toys
from twinhead.engine import data, ppo, reward
from twinhead.engine.evaluate import reward_accuracy
from twinhead.engine.labeler import compare
from twinhead.engine.metrics import JsonLines
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.refresh import Round, refresh
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

Box = dict[str, str]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with toys.one_thread():
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


def measured_praise(completions: list[str], **_: Any) -> list[float]:
    """Up to two times "good" is welcome, more is flattery: what a first policy says too seldom to be compared."""
    return [min(num, 4 - num) for num in (c.split().count("good") for c in completions)]


def labeler(box: Box, num: int = 96) -> Callable[[Policy, int], list[dict[str, Any]]]:
    """Compares three answers to each of some prompts, without noise."""
    text = Text.from_pretrained(box["model"])
    asked = data.prompts(toys.prompts(num, seed=3), text, 8)

    def label(policy: Policy, number: int) -> list[dict[str, Any]]:
        sampling = Sampling(max_new_tokens=5, seed=number, stop=tuple(text.stop_ids))
        return compare(policy, text, asked, measured_praise, sampling, num_responses=3, noise=0.0)

    return label


def configs(box: Box, steps: int = 30, **changes: Any) -> tuple[reward.Config, ppo.Config]:
    learning = {"batch_size": 8, "learning_rate": 3e-3, "data": toys.comparisons(8), "eval_data": "", "epochs": 2}
    policy = {"steps": steps, "rollouts_per_step": 32, "learning_rate": 3e-3, "missing_eos_penalty": 0.0}
    policy |= {"reward_functions": (), "prompts": toys.prompts(64), "kl_coef": 0.01} | changes
    found = [toys.options(stage, box) | given for stage, given in (("reward", learning), ("ppo", policy))]
    return reward.Config(**found[0]), ppo.Config(**found[1])


@pytest.fixture(scope="module")
def refreshed(box: Box, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Round]]:
    folder = tmp_path_factory.mktemp("refreshed")
    with toys.one_thread():
        return folder, refresh(*configs(box), labeler(box), 2, folder)


def test_a_refreshed_reward_model_knows_what_the_policy_says_now(refreshed: tuple[Path, list[Round]]) -> None:
    _, (first, second) = refreshed
    assert first.stale is None
    assert first.fresh > 0.75
    assert second.stale is not None
    assert second.fresh > second.stale + 0.1


def test_every_round_begins_where_the_last_one_ended(box: Box, refreshed: tuple[Path, list[Round]]) -> None:
    folder, (first, second) = refreshed
    headers = [next(iter(JsonLines(done.policy / "metrics.jsonl")))["config"] for done in (first, second)]
    assert [h["model"] for h in headers] == [box["model"], str(first.policy)]
    assert [h["reference"] for h in headers] == [box["model"]] * 2
    assert [h["reward_model"] for h in headers] == [str(first.reward_model), str(second.reward_model)]
    assert [h["seed"] for h in headers] == [0, 1]
    judges = [next(iter(JsonLines(done.reward_model / "metrics.jsonl")))["config"] for done in (first, second)]
    assert [j["model"] for j in judges] == [box["model"]] * 2
    assert [j["data"].split(" rows")[0] for j in judges] == ["80", "152"]  # 8 given, and 72 of 96 from every round
    assert [j["eval_data"].split(" rows")[0] for j in judges] == ["24", "24"]
    rows = [json.loads(line) for line in (folder / "round-2/comparisons.jsonl").read_text().splitlines()]
    assert rows == labeler(box)(Policy.from_pretrained(first.policy, "none"), 2)


def test_accuracies_are_of_comparisons_that_were_never_trained_on(
    box: Box, refreshed: tuple[Path, list[Round]]
) -> None:
    folder, (first, second) = refreshed
    held_out = [json.loads(line) for line in (folder / "round-2/comparisons.jsonl").read_text().splitlines()][72:]
    samples = data.comparisons(held_out, Text.from_pretrained(box["model"]), 16)
    for model, found in ((first.reward_model, second.stale), (second.reward_model, second.fresh)):
        assert reward_accuracy(RewardModel.from_pretrained(model), samples).micro == found


def test_an_interrupted_refresh_goes_on_and_asks_nobody_twice(box: Box, tmp_path: Path) -> None:
    asked: list[int] = []
    label = labeler(box, 12)

    def mortal(policy: Policy, number: int) -> list[dict[str, Any]]:
        asked.append(number)
        if asked == [1, 2]:
            raise KeyboardInterrupt
        return label(policy, number)

    given = configs(box, steps=2)
    with pytest.raises(KeyboardInterrupt):
        refresh(*given, mortal, 2, tmp_path / "interrupted")
    found = refresh(*given, mortal, 2, tmp_path / "interrupted")
    assert asked == [1, 2, 2]
    straight = refresh(*given, label, 2, tmp_path / "straight")
    for ours, theirs in zip(found, straight, strict=True):
        assert (ours.stale, ours.fresh) == (theirs.stale, theirs.fresh)
        assert toys.metrics(ours.policy) == toys.metrics(theirs.policy)
        weights = [Policy.from_pretrained(r.policy).state_dict() for r in (ours, theirs)]
        assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_some_comparisons_are_learned_and_some_held_out(share: float, held: int, box: Box, tmp_path: Path) -> None:
    given = toys.comparisons(4, seed=7)
    (found,) = refresh(*configs(box, steps=1), lambda *_: given, 1, tmp_path, held_out=share)
    config = next(iter(JsonLines(found.reward_model / "metrics.jsonl")))["config"]
    assert [config[name].split(" rows")[0] for name in ("data", "eval_data")] == [f"{8 + 4 - held}", f"{held}"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rounds": 0}, r"^rounds: expected at least 1, got 0$"),
        ({"held_out": 1.0}, r"^held_out: expected a share between 0 and 1, got 1.0$"),
        ({"held_out": 0.0}, r"^held_out: expected a share between 0 and 1, got 0.0$"),
        (
            {"ppo_config": {"reward_model": "m"}},
            r"^reward_model: expected none, as every round trains its own, got 'm'",
        ),
        (
            {"ppo_config": {"reward_models": ("m",)}},
            r"^reward_model: expected none, as every round trains its own, got",
        ),
        ({"label": lambda *_: toys.comparisons(1)}, r"^label: expected at least 2 comparisons of round 1, got 1$"),
    ],
)
def test_a_refresh_that_cannot_be_is_refused(changes: dict[str, Any], sentence: str, box: Box, tmp_path: Path) -> None:
    judge, policy = configs(box)
    given = {"reward_config": judge, "label": labeler(box, 2), "rounds": 1, "output_dir": tmp_path / "run"} | changes
    given["ppo_config"] = dataclasses.replace(policy, **changes.get("ppo_config", {}))
    with pytest.raises(ValueError, match=sentence):
        refresh(**given)
    assert not (tmp_path / "run").exists()
