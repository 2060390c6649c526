"""Every arm of the comparison on a toy budget: what it tells, and that what is measured is not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import arms
from benchmarks.arms import ARMS, HACKABLE, TRUSTED, Arm, Budget, Trial
from benchmarks.quality import Labels
from tests import toys

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
