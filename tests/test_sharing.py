"""The benchmark of models that share a base: what its arms weigh, and what it writes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import quality, sharing
from benchmarks.quality import Labels, Reviews
from tests import toys
from twinhead.engine.policy import Policy

pytest.importorskip("peft")


def test_what_an_arm_weighs_is_counted(tmp_path: Path) -> None:
    box = toys.box(tmp_path / "box")
    toys.train("reward", box, tmp_path / "adapter", **sharing.JUDGE)
    toys.tokenizer().save_pretrained(tmp_path / "adapter")
    found = sharing.weights(box["model"], box["reward_model"], str(tmp_path / "adapter"))
    model = Policy.from_pretrained(box["model"], "none").model
    one, words = sum(p.numel() for p in model.parameters()), len(toys.WORDS)
    trunk = sum(p.numel() for p in model.base_model.parameters())
    layers = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)  # q and o, k and v, and the three of the MLP
    policy, judge = 2 * (layers + 32 + words), 4 * (layers + 32 + words)
    assert found["whole"] == pytest.approx((2 * one + trunk + 33 + 32) / one)
    assert found["apart"] == pytest.approx((2 * one + 2 * trunk + 33 + 32) / one)
    assert found["shared"] == pytest.approx((one + policy + judge + 33 + 32) / one)


def test_the_benchmark_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharing, "Reviews", partial(Reviews, num_demonstrations=256))
    monkeypatch.setattr(sharing, "HEALTHY", Labels(prompts=24, noise=0.5, epochs=1))
    monkeypatch.setattr(sharing, "BUDGET", {"steps": 1, "kl_coef": 0.05, "eval_every": 1})
    monkeypatch.setattr(quality, "CONTEST_PROMPTS", 16)
    with toys.one_thread():
        sharing.main([4], tmp_path / "runs", tmp_path / "results")
        before = (tmp_path / "runs/seed4/ppo_shared/metrics.jsonl").read_bytes()
        sharing.main([4], tmp_path / "runs", tmp_path / "results")  # what is finished is not run again
    assert (tmp_path / "runs/seed4/ppo_shared/metrics.jsonl").read_bytes() == before
    found = json.loads((tmp_path / "results" / "quality_sharing.json").read_text())
    assert found["task"] == "A, reviews"
    assert found["policy"]["lora_targets"] == ["all-linear", "lm_head"]
    seed = found["seeds"]["4"]
    assert set(seed["curves"]) == set(seed["weights"]) == set(sharing.ARMS)
    assert seed["weights"]["shared"] <= 1.15 < 2.5 < seed["weights"]["whole"] < 3.5 < seed["weights"]["apart"]
    for points in seed["curves"].values():
        assert [point["step"] for point in points] == [1]
    assert 0 < seed["reward_accuracy"]["reward_adapter"] < 1
    lines = [json.loads(line) for line in (tmp_path / "runs/seed4/ppo_shared/metrics.jsonl").open()]
    assert lines[0]["config"]["share"] == "all"
    assert "Task A: win rate, gold, KL" in capsys.readouterr().out
