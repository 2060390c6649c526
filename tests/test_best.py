"""When to keep a checkpoint and when to stop: the best one by an evaluation, patience, and a bound on the KL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import toys
from twinhead.engine.best import Best
from twinhead.engine.policy import Policy

Box = dict[str, str]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


def feed(best: Best, values: list[float | None]) -> list[int]:
    """The steps that set a record, until it is settled."""
    saved: list[int] = []
    for step, value in enumerate(values, 1):
        line = {"score/x": 9.0} | ({} if value is None else {"eval/x": value})
        if best.settled(step, line, lambda step=step: saved.append(step)):
            return [*saved, -step]
    return saved


def test_only_records_are_kept() -> None:
    assert feed(Best("eval/x", 0), [1.0, None, 0.5, 1.0, math.nan, 2.0]) == [1, 6]
    assert feed(Best("eval/x", 0), [math.nan, -3.0]) == [2]
    assert feed(Best("", 0), [1.0, 2.0]) == []


def test_patience_counts_evaluations() -> None:
    assert feed(Best("eval/x", 2), [1.0, None, 0.5, None, None, 1.5, 1.4, 1.5, 9.0]) == [1, 6, -8]


def test_a_measure_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^best_by: expected one of eval/x, got 'eval/y'$"):
        feed(Best("eval/y", 0), [1.0])


def scripted(values: Iterator[float]) -> Any:
    return lambda policy: {"x": next(values)}


def test_the_best_policy_stays(box: Box, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(policy: Policy) -> dict[str, float]:
        seen.append({name: p.clone() for name, p in policy.model.state_dict().items()})
        return {"x": [1.0, 3.0, 2.0, 3.0][len(seen) - 1]}

    run = toys.train("ppo", box, tmp_path / "run", steps=4, eval_every=1, best_by="eval/x", evaluate=evaluate)
    kept = load_file(run.dir / "best" / "model.safetensors")
    assert all(torch.equal(seen[1][name], w) for name, w in kept.items())
    assert any(not torch.equal(seen[3][name], w) for name, w in kept.items())
    Policy.from_pretrained(run.dir / "best")


def test_a_plateau_ends_training(box: Box, tmp_path: Path) -> None:
    values = iter([1.0, 2.0, 1.5, 1.0, 7.0])
    run = toys.train(
        "ppo", box, tmp_path / "run", steps=9, eval_every=1, best_by="eval/x", patience=2, evaluate=scripted(values)
    )
    assert [line["step"] for line in toys.metrics(run.dir)] == [1, 2, 3, 4]
    assert run.finished
    Policy.from_pretrained(run.dir)


def test_the_divergence_ends_training(box: Box, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-2, "kl_coef": 0.0, "steps": 12, "rollouts_per_step": 32}
    free = [line["objective/kl"] for line in toys.metrics(toys.train("ppo", box, tmp_path / "free", **options).dir)]
    bound = max(free) / 3
    run = toys.train("ppo", box, tmp_path / "run", stop_kl_nats=bound, save_every=1, keep_checkpoints=99, **options)
    lines = toys.metrics(run.dir)
    kls = [line["objective/kl"] for line in lines]
    assert 1 < len(kls) < 12
    assert kls[-1] > bound >= max(kls[:-1])
    assert kls == free[: len(kls)]
    assert "policy/num_updates" not in lines[-1]  # the policy that is kept is the one that was measured
    final = load_file(run.dir / "model.safetensors")
    before = load_file(run.dir / f"checkpoint-{len(kls) - 1}" / "model.safetensors")
    assert all(torch.equal(before[name], w) for name, w in final.items())
    assert run.finished


def test_held_out_prompts_are_scored(box: Box, tmp_path: Path) -> None:
    run = toys.train(
        "ppo", box, tmp_path / "run", eval_every=2, eval_prompts=box["heldout"], best_by="eval/score", steps=4
    )
    lines = toys.metrics(run.dir)
    assert ["eval/score" in line for line in lines] == [False, True, False, True]
    assert 0.0 <= lines[1]["eval/score"] <= 1.0 and 0.0 <= lines[1]["eval/eos_rate"] <= 1.0
    assert (run.dir / "best" / "config.json").is_file()
    still = toys.train(
        "ppo", box, tmp_path / "still", eval_every=1, eval_prompts=box["heldout"], learning_rate=0.0, steps=3
    )
    assert len({line["eval/score"] for line in toys.metrics(still.dir)}) == 1


def test_held_out_prompts_must_fit(box: Box, tmp_path: Path) -> None:
    long = [{"prompt": " ".join(["one"] * 70)}]
    with pytest.raises(ValueError, match=r"expected at most the model's 64 tokens"):
        toys.train("ppo", box, tmp_path / "run", eval_every=1, eval_prompts=long, max_prompt_tokens=100)
