"""The benchmarks of the engine, rollouts and training steps: their gates, what is timed, and what they write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import race, readme, rollouts, shapes, updates
from benchmarks.peers import Missing
from benchmarks.race import Entrant, Maker, Race, Wrong
from benchmarks.rollouts import Decoding, Judge
from twinhead.engine import Rollout

CPU = torch.device("cpu")
SAMPLED, HALF, RAGGED = rollouts.cases(CPU, quick=True)
(TRAINING,) = updates.cases(CPU, quick=True)


def judge_of(case: Decoding) -> tuple[Judge, list[Rollout]]:
    """The judge of a case, and our greedy answers."""
    model = case.shape.model(case.dtype, CPU, rollouts.EOS_SCALE if case.ragged else 1.0)
    judge = Judge(case, model)
    return judge, list(rollouts.ours(judge.value_head, case, model)(0.0))


def test_every_decoder_runs_and_the_readme_gets_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts.main("cpu", True, tmp_path)
    found = json.loads((tmp_path / "generate_cpu.json").read_text())
    assert found["machine"]["threads"] == torch.get_num_threads() and found["versions"]["transformers"]
    assert [case["title"] for case in found["cases"]] == [case.title for case in (SAMPLED, HALF, RAGGED)]
    for case, measured in zip((SAMPLED, HALF, RAGGED), found["cases"], strict=True):
        rows = {row["name"]: row for row in measured["rows"]}
        expected = [*found["columns"], *([rollouts.UNFILLED] if case.ragged else [])]
        assert sorted(rows) == sorted(expected) and all("milliseconds" in row for row in rows.values()), rows
        assert rows[found["baseline"]]["speedup"] == 1.0
        for row in rows.values():
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["milliseconds"])
            assert row["equal"] == 1.0 or case.dtype == torch.bfloat16
            assert case.ragged or row["tokens"] == case.batch * case.new
            assert case.ragged or row["step_milliseconds"] == pytest.approx(row["milliseconds"] / case.new)
    assert "HF continuous" in capsys.readouterr().out

    page = tmp_path / "README.md"
    page.write_text("<!-- generate table -->\nold\n<!-- /generate table -->\n")
    readme.main(page, tmp_path)
    text = page.read_text()
    assert "old" not in text and readme.UNMEASURED in text and RAGGED.title in text and "transformers" in text


def test_every_training_step_runs_and_the_readme_gets_its_table(tmp_path: Path) -> None:
    updates.main("cpu", True, tmp_path)
    found = json.loads((tmp_path / "train_cpu.json").read_text())
    (measured,) = found["cases"]
    assert [row["name"] for row in measured["rows"]] == found["columns"]
    for row in measured["rows"]:
        assert row["error"] < 1e-5 and row["tokens"] == sum(len(e.prompt + e.response) for e in TRAINING.examples)
    page = tmp_path / "README.md"
    page.write_text("<!-- train table -->\n<!-- /train table -->\n")
    readme.main(page, tmp_path)
    assert TRAINING.title in page.read_text()


def test_time_that_is_up_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    updates.main("cpu", True, tmp_path, minutes=0)
    found = json.loads((tmp_path / "train_cpu.json").read_text())
    assert found["left_out"] == [TRAINING.title] and not found["cases"]
    assert "no time left" in capsys.readouterr().out


def test_what_is_measured() -> None:
    for device in (CPU, torch.device("cuda")):
        for cases in (rollouts.cases(device, quick=False), updates.cases(device, quick=False)):
            assert len({case.title for case in cases}) == len(cases)
    titles = [case.title for case in rollouts.cases(CPU, quick=False)]
    assert "4 × 256, V=32000, batch 16, float32, sampled" in titles
    assert "4 × 256, V=1024, 256 requests in 64 slots, ragged, float32, greedy" in titles
    assert "4 × 256, V=8192, 16 sequences of 32 to 512 tokens, float32" in [
        case.title for case in updates.cases(CPU, quick=False)
    ]


def swapped(answers: list[Rollout]) -> None:
    """Another word in the middle of the last response."""
    tokens = answers[-1].response
    tokens[len(tokens) // 2] = 2 + (tokens[len(tokens) // 2] - 1) % 60


def shifted(name: str) -> Callable[[list[Rollout]], None]:
    def change(answers: list[Rollout]) -> None:
        answers[1] = replace(answers[1], **{name: getattr(answers[1], name) + 1e-3})

    return change


def undefined(answers: list[Rollout]) -> None:
    answers[0].logprobs[0] = torch.nan


def resumed(answers: list[Rollout]) -> None:
    """A second EOS after the first."""
    min(answers, key=lambda answer: len(answer.response)).response.append(shapes.EOS)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        (SAMPLED, swapped, "nats"),
        (SAMPLED, shifted("logprobs"), "error 1.0e-03 nats"),
        (SAMPLED, shifted("values"), "error 1.0e-03 nats"),
        (SAMPLED, undefined, "error inf nats"),
        (SAMPLED, lambda answers: answers.pop(), "2 responses to 3 prompts"),
        (SAMPLED, lambda answers: answers[0].response.pop(), "goes on after a stop token or ends without one"),
        (SAMPLED, lambda answers: answers[0].response.append(5), "goes on after a stop token or ends without one"),
        (RAGGED, resumed, "goes on after a stop token or ends without one"),
    ],
    ids=["token", "log-prob", "value", "nan", "missing", "short", "long", "after EOS"],
)
def test_a_wrong_rollout_has_no_time(case: Decoding, change: Callable[[list[Rollout]], Any], words: str) -> None:
    judge, answers = judge_of(case)
    assert judge.figures(answers)["error"] < 1e-5
    change(answers)
    with pytest.raises(Wrong, match=words):
        judge.figures(answers)


def test_a_token_that_is_not_the_best_has_no_time() -> None:
    """Whether it comes alone, as from transformers, or with the log-prob that it really has."""
    judge, answers = judge_of(SAMPLED)
    responses = [answer.response for answer in answers]
    assert judge.figures(responses)["error"] < 1e-5
    swapped(answers)
    with pytest.raises(Wrong, match="nats"):
        judge.figures(responses)
    truth = judge.judge(SAMPLED.prompts[-1], answers[-1].response)
    answers[-1] = replace(answers[-1], logprobs=truth.logprobs, values=truth.values)
    with pytest.raises(Wrong, match="nats"):
        judge.figures(answers)


def test_ragged_lengths_are_spread_and_counted() -> None:
    judge, answers = judge_of(replace(RAGGED, batch=32, new=40))
    lengths = [len(answer.response) for answer in answers]
    assert len(set(lengths)) > 8 and min(lengths) < 8
    assert judge.figures(answers)["tokens"] == sum(lengths)


@pytest.mark.parametrize("change", ["loss", "one parameter", "no gradient"])
def test_a_wrong_training_step_has_no_time(change: str) -> None:
    model = TRAINING.shape.model(torch.float32, CPU).train()
    truth = updates.one_by_one(TRAINING.examples, TRAINING.shape.model(torch.float32, CPU))
    right = updates.padded(TRAINING.examples, model)
    assert TRAINING.figures(right, model, truth)["error"] < 1e-5
    weight = model.model.layers[0].self_attn.q_proj.weight
    if change == "no gradient":
        weight.requires_grad_(False)
    wrong = {
        "loss": lambda: 1.001 * right(),
        "one parameter": lambda: right() + 1e-3 * (weight.sum() - weight.detach().sum()),
        "no gradient": right,
    }[change]
    with pytest.raises(Wrong, match="1 parameters without" if change == "no gradient" else "of the loss or the"):
        TRAINING.figures(wrong, model, truth)


def test_bfloat16_is_what_is_timed() -> None:
    model = HALF.shape.model(torch.bfloat16, CPU)
    before = model.lm_head.weight.clone()
    policy = shapes.policy(model, "shared")
    assert policy.model.dtype == torch.bfloat16 and torch.equal(before, policy.model.lm_head.weight)
    assert policy.value_head is not None and policy.value_head.weight.dtype == torch.float32


@dataclass
class Fake:
    """A case of nothing, for contenders given by name."""

    makers: Mapping[str, Maker]
    title: str = "fake"
    steps: int | None = 10
    log: list[str] = field(default_factory=list)

    def entrants(self, device: torch.device) -> Mapping[str, Maker]:
        return self.makers


def entrant(log: list[str], name: str = "", failure: Exception | None = None) -> Entrant:
    def check() -> dict[str, float]:
        if failure is not None:
            raise failure
        return {"tokens": 100, "error": 0.0}

    return Entrant(lambda: log.append(f"run {name}"), check, lambda: log.append(f"close {name}"))


def unavailable() -> Entrant:
    raise Missing("needs a GPU")


def test_who_has_no_time_says_why_and_everybody_is_closed() -> None:
    log: list[str] = []
    makers: dict[str, Maker] = {
        "twinhead": lambda: entrant(log, "ours"),
        "wrong": lambda: entrant(log, "wrong", Wrong("far off")),
        "broken": lambda: entrant(log, "broken", RuntimeError("no\nkernel")),
        "absent": unavailable,
    }
    measured = race.measure(Fake(makers), "wrong", CPU, seconds=0)
    rows = {row["name"]: row for row in measured["rows"]}
    assert rows["wrong"] == {"name": "wrong", "failed": "wrong: far off"}
    assert rows["broken"] == {"name": "broken", "failed": "RuntimeError: no"}
    assert rows["absent"] == {"name": "absent", "not_run": "needs a GPU"}
    assert rows["twinhead"]["speedup"] is None, "its baseline has no time"
    assert {"close wrong", "close broken", "close ours"} <= set(log) and "run wrong" not in log
    assert log[-1] == "close ours"


def test_what_runs_on_between_calls_does_not_run_while_others_are_timed() -> None:
    log: list[str] = []
    makers: dict[str, Maker] = {name: lambda name=name: entrant(log, name) for name in ("twinhead", "other")}
    race.measure(Fake(makers), "other", CPU, seconds=0)
    awake: set[str] = set()
    for what, name in map(str.split, log):
        (awake.add if what == "run" else awake.discard)(name)
        assert len(awake) <= 1, f"{awake} ran side by side"
    assert log.count("run other") > race.LEAST, "it was started outside of what is timed"


def test_a_failure_of_ours_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    makers: dict[str, Maker] = {"twinhead": lambda: entrant([], failure=Wrong("far off")), "other": unavailable}
    with pytest.raises(SystemExit, match="fake: twinhead"):
        race.run(Race("generate", [Fake(makers)], ["twinhead", "other"], "other"), "cpu", True, tmp_path)
    assert json.loads((tmp_path / "generate_cpu.json").read_text())["cases"], "what was found is kept"
    assert "far off" in capsys.readouterr().out


def test_the_readme_has_our_speed_beside_everybodys() -> None:
    row = {"milliseconds": 10.0, "tokens_per_second": 12345.0, "step_milliseconds": 1.25, "peak_bytes": 3 << 20}
    rows = [{"name": "A", "speedup": 2.5, **row}, {"name": "B", "speedup": 1.0, **row}, {"name": "C", "failed": "x"}]
    found = {
        "machine": {"cpu": "Some CPU", "threads": 2}, "versions": {"torch": "2.13", "transformers": "5"},
        "commit": "abc", "date": "today", "quick": False, "columns": ["A", "B", "C"], "baseline": "B",
        "cases": [{"title": "small", "steps": 8, "rows": rows}],
    }  # fmt: skip
    lines = readme.race([found, None])
    assert lines[0] == "| tokens per second | A | B | C | A / B | a step | MiB, A / B |"
    assert lines[2] == "| small | **12,345** | 12,345 | – | 2.50 | 1.25 ms | 3 / 3 |"
    assert lines[3].startswith(f"| {readme.UNMEASURED} |") and lines[3].count("|") == lines[0].count("|")
    assert lines[-1] == "Some CPU, 2 threads, torch 2.13, transformers 5, commit abc, today."
