"""Every arm of the comparison on a toy budget: what it tells, and that what is measured is not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import arms
from benchmarks.arms import ARMS, HACKABLE, TRUSTED, Arm, Budget, Trial
from benchmarks.quality import Labels
from tests import toys
from twinhead.engine.evaluate import Contest
from twinhead.engine.policy import Policy, RewardModel

TINY = Labels(prompts=12, noise=0.5, epochs=1)
TOY = Budget(
    steps=2, answers=16, every=1, prompts=8, best_of=(1, 2), passes=((TRUSTED, 2), (HACKABLE, 3)), rounds=2,
    demonstrations=256, labels=((TRUSTED, TINY), (HACKABLE, TINY)),
)  # fmt: skip
CONTESTED = {"proxy", *arms.MEASURED}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tmp_path_factory.mktemp("comparison"), seed=3, budget=TOY)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_tells_its_points(name: str, trial: Trial) -> None:
    with toys.one_thread():
        found = trial.measured(name, ARMS[name])
    assert all(point.keys() >= CONTESTED for point in found)
    steps = [point["step"] for point in found]
    if "best_of" in name:
        assert steps == [1, 2] and found[1]["proxy"] >= found[0]["proxy"]
        assert [point["kl"] for point in found] == [0, pytest.approx(0.6931 - 0.5, abs=1e-4)]
        return
    assert found[0]["step"] == 0 and abs(found[0]["kl"]) < 1e-5  # the SFT model itself
    assert steps == sorted(steps) and steps[-1] >= 2
    assert found[-1]["kl"] != found[0]["kl"]
    if "refresh" in name:
        assert [point["labels"] for point in found[1:]] == [4 + 4, 4 + 8]
    elif "dpo" not in name and "grpo" not in name:
        assert "explained_variance" in found[-1]
        assert found[-1]["answers"] == 2 * 16


def test_a_killed_arm_goes_on_where_it_was(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the contest of the second step: the first step is not made again, and the numbers are the same."""
    with toys.one_thread():
        expected = trial.measured("weak_ppo", ARMS["weak_ppo"])
        held, contest = [], Contest.__call__

        def killed(self: Contest, policy: Policy) -> dict[str, float]:
            held.append(policy)
            if len(held) == 2:
                raise KeyboardInterrupt
            return contest(self, policy)

        monkeypatch.setattr(Contest, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            trial.measured("killed", ARMS["weak_ppo"])
        assert not Path(trial.task.path("arms/killed.json")).exists()
        assert [line["step"] for line in toys.metrics(trial.task.path("killed"))] == [1]
        assert trial.measured("killed", ARMS["weak_ppo"]) == expected
    assert len(held) == 4  # step 1, the one that was killed, it again, and the SFT model


def test_what_is_measured_is_not_measured_again(trial: Trial) -> None:
    file = Path(trial.task.path("arms/noted.json"))
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([{"gold": 1.5}]))

    def train(trial: Trial, name: str) -> list[arms.Point]:
        raise AssertionError(f"{name} was trained")

    assert trial.measured("noted", Arm("noted", train)) == [{"gold": 1.5}]
    with pytest.raises(AssertionError, match="other was trained"):
        trial.measured("other", Arm("other", train))


def test_refresh_buys_as_many_labels_as_the_weak_reward_model_had(trial: Trial) -> None:
    with toys.one_thread():
        found = trial.measured("weak_refresh", ARMS["weak_refresh"])
    assert found[-1]["labels"] == TINY.prompts
    bought = [
        path.read_text().splitlines() for path in Path(trial.task.path("weak_refresh")).rglob("comparisons.jsonl")
    ]
    assert [len(rows) for rows in bought] == [4, 4]
    assert all(len(json.loads(row)["completions"]) == 4 for rows in bought for row in rows)


def test_a_policy_answers_the_first_prompt(trial: Trial) -> None:
    with toys.one_thread():
        said = trial.answer(Path(trial.sft).name)
        assert said == trial.answer("sft")
    assert said.split()[:2] == [trial.asked[0].text.split()[0], "<sep>"]


def test_the_length_term() -> None:
    ids = [[5] * 14, [5] * 10, [5] * 16, []]
    assert arms.usual_length(completion_ids=ids, prompts=[""] * 4) == pytest.approx([0.0, -0.4, -0.2, -1.4])


def test_rankings_are_shared_and_first_weights_are_not(trial: Trial) -> None:
    with toys.one_thread():
        first, second = (RewardModel.from_pretrained(trial.judge(name)) for name in (HACKABLE, "weak_2"))
    assert not Path(trial.task.path("weak_2.jsonl")).exists()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(a.shape == b.shape for a, b in pairs)
    assert not torch.equal(first.model.score.weight, second.model.score.weight)
    assert set(trial.accuracies()) >= {TRUSTED, HACKABLE, "weak_2"}
