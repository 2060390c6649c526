"""The benchmark of whole PPO iterations: both sides' processes, the gate, what is written, and the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import iterations, readme, trainers
from benchmarks.iterations import OURS, THEIRS, Iteration, gate, judged, measure, play, unlike
from benchmarks.peers import TRL_TRAINER, Missing
from benchmarks.race import Wrong

CPU = torch.device("cpu")
FULL, RAGGED = iterations.cases(CPU, quick=True)
HAS_TRL = pytest.mark.skipif(
    not TRL_TRAINER.folder.is_dir(), reason=f"needs {TRL_TRAINER.label}: python -m benchmarks peers"
)


def report(case: Iteration) -> dict[str, Any]:
    """What a process tells that ran three iterations of a case."""
    count = case.batch * case.response // (4 if case.ragged else 1)
    counts = [count, count, 2 * count if case.ragged else count]
    phases = {"generate": 0.1, "examine": 0.2, "update": 0.7}
    return {
        "seconds": [1.0, 2.0], "phases": [phases, phases], "tokens": counts, "optimizer_steps": [8, 8, 8],
        "losses": [0.1, 0.2], "kl": 1e-6, "entropy": 3.0, "peak_bytes": 5 << 20,
    }  # fmt: skip


def played(trainer: str, case: Iteration, folder: Path) -> dict[str, Any]:
    """What a real process tells of two iterations."""
    case.write(folder, 2)
    return play(trainer, case.work(folder, CPU, 2))


def test_our_process_does_the_work(tmp_path: Path) -> None:
    found = played("twinhead", RAGGED, tmp_path)
    gate(RAGGED, found)
    assert len(found["tokens"]) == len(found["optimizer_steps"]) == 2 and len(found["losses"]) == 4
    (seconds,), (phases,) = found["seconds"], found["phases"]
    assert list(phases) == list(trainers.PHASES) and min(phases.values()) > 0
    assert sum(phases.values()) == pytest.approx(seconds)
    assert found["peak_bytes"] is None or found["peak_bytes"] > 1 << 20


@HAS_TRL
def test_their_process_does_the_work(tmp_path: Path) -> None:
    found = played("trl", RAGGED, tmp_path)
    gate(RAGGED, found)
    (seconds,), (phases,) = found["seconds"], found["phases"]
    assert min(phases[name] for name in trainers.PHASES) > 0 and sum(phases.values()) == pytest.approx(seconds)


@HAS_TRL
def test_both_sides_stand_in_one_case() -> None:
    ours, theirs = measure(FULL, CPU, (1, 3))["rows"]
    assert (ours["name"], theirs["name"]) == (OURS, THEIRS)
    assert ours["tokens"] == theirs["tokens"] == FULL.batch * FULL.response
    assert ours["speedup"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=iterations.ENTROPY)


def test_a_process_without_its_trainer_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINHEAD_PEERS", str(tmp_path))
    with pytest.raises(Missing, match="python -m benchmarks peers"):
        played("trl", FULL, tmp_path)


def test_a_process_that_fails_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="invalid choice: 'nobody'"):
        play("nobody", FULL.work(tmp_path, CPU, 2))
    monkeypatch.setattr(iterations, "PATIENCE", 0.01)
    with pytest.raises(RuntimeError, match="no end after 0 seconds"):
        play("twinhead", FULL.work(tmp_path, CPU, 2))


def test_responses_count_up_to_their_end() -> None:
    responses = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8], [1, 1, 5, 1]])
    assert trainers.lengths(responses, eos=1) == 2 + 4 + 1


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        (FULL, {"tokens": [64, 128, 128]}, "iteration 1 has 64 response tokens, expected 128 to 128"),
        (FULL, {"tokens": [128, 128, 127]}, "iteration 3 has 127 response tokens"),
        (RAGGED, {"tokens": [40, 40, 128]}, "iteration 3 has 128 response tokens, expected 19 to 64"),
        (RAGGED, {"tokens": [40, 12, 40]}, "iteration 2 has 12 response tokens"),
        (FULL, {"optimizer_steps": [8, 4, 8]}, "iteration 2 took 4 optimizer steps, expected 8"),
        (FULL, {"losses": [0.1, float("nan")]}, "a loss is not finite"),
        (FULL, {"losses": [float("inf"), 0.1]}, "a loss is not finite"),
        (FULL, {"kl": -0.02}, "-0.02 nats between policy and reference"),
        (FULL, {"kl": float("nan")}, "nan nats between policy and reference"),
        (replace(FULL, dtype=torch.bfloat16), {"kl": 2.1}, "2.1 nats between policy and reference"),
    ],
    ids=["half", "one less", "too long", "too short", "steps", "nan", "inf", "kl", "nan kl", "bfloat16"],
)
def test_other_work_has_no_time(case: Iteration, change: dict[str, Any], words: str) -> None:
    right = report(case)
    gate(case, right)
    assert "milliseconds" in judged(case, [right, right])
    with pytest.raises(Wrong, match=words):
        gate(case, right | change)
    found = judged(case, [right, right | change])
    assert found["failed"].startswith("wrong: ") and "milliseconds" not in found


def test_the_figures_of_a_side() -> None:
    found = judged(FULL, [report(FULL), report(FULL) | {"seconds": [3.0, 4.0], "peak_bytes": 7 << 20}])
    assert found["milliseconds"] == 2500 and found["rounds"] == 4 and found["tokens"] == 128
    assert found["phases"] == {"generate": 100, "examine": 200, "update": 700}
    assert found["tokens_per_second"] == pytest.approx((128 / 2 + 128 / 3) / 2), "median of 128, 64, 43 and 32"
    assert found["peak_bytes"] == 7 << 20
    ragged = judged(RAGGED, [report(RAGGED)])
    assert ragged["tokens_per_second"] == pytest.approx(32), "32 in one second, 64 in two"
    assert judged(FULL, [report(FULL) | {"peak_bytes": None}])["peak_bytes"] is None


def test_different_policies_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unlike(FULL, 3.0, 3.05) == "" and unlike(RAGGED, 3.0, 6.0) == ""
    assert "entropy 3.000" in unlike(FULL, 3.0, 3.1)
    entropy = {"twinhead": 3.0, "trl": 3.1}
    monkeypatch.setattr(iterations, "play", lambda trainer, work: report(FULL) | {"entropy": entropy[trainer]})
    for row in measure(FULL, CPU, (1, 3))["rows"]:
        assert row["failed"].startswith("wrong: entropy") and "milliseconds" not in row


def fake(monkeypatch: pytest.MonkeyPatch, their: Callable[[], dict[str, Any]]) -> list[str]:
    """Processes that take no time; the names of those that were started."""
    started: list[str] = []

    def pretend(trainer: str, work: trainers.Work) -> dict[str, Any]:
        started.append(trainer)
        case = replace(FULL, batch=work.batch, response=work.response, ragged="ragged" in work.folder)
        return report(case) if trainer == "twinhead" else their()

    monkeypatch.setattr(iterations, "play", pretend)
    monkeypatch.setattr(iterations, "cases", lambda device, quick: [FULL])
    return started


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slow = report(FULL) | {"seconds": [4.0, 4.0]}
    started = fake(monkeypatch, lambda: slow)
    iterations.main("cpu", True, tmp_path)
    assert started[:2] == ["twinhead", "trl"] and set(started[2:]) == {"twinhead"}
    found = json.loads((tmp_path / "ppo_cpu.json").read_text())
    assert found["machine"]["threads"] == torch.get_num_threads() and found["versions"]["transformers"]
    (case,) = found["cases"]
    assert case["title"] == FULL.title and [row["name"] for row in case["rows"]] == found["columns"]
    assert case["rows"][0]["speedup"] == pytest.approx((128 + 64) / 2 / 32)
    assert [scaling["axis"] for scaling in found["scaling"]] == ["response", "batch", "vocabulary"]
    for scaling in found["scaling"]:
        first, *_, last = scaling["rows"]
        assert first["size"] < last["size"]
        assert scaling["ratio"] == last["microseconds_per_token"] / first["microseconds_per_token"]
    printed = capsys.readouterr().out
    assert FULL.title in printed and "cost against batch" in printed and not found["left_out"]

    page = tmp_path / "README.md"
    page.write_text("<!-- ppo table -->\nold\n<!-- /ppo table -->\n")
    readme.main(page, tmp_path)
    text = page.read_text()
    assert "old" not in text and readme.UNMEASURED in text
    assert f"| {FULL.title} | **96** | 32 | 3.00 | 100 ms + 200 ms + 700 ms |" in text
    assert "A response token at batch 4, 8 costs us" in text and "5 / 5" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_processes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch, lambda: report(FULL))
    measure(FULL, CPU, (2, 3))
    assert started == ["twinhead", "trl"] * 2


def test_without_trl_ours_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> dict[str, Any]:
        raise Missing("not installed")

    started = fake(monkeypatch, absent)
    ours, theirs = measure(FULL, CPU, (2, 3))["rows"]
    assert theirs == {"name": THEIRS, "not_run": "not installed"} and started.count("trl") == 1
    assert ours["milliseconds"] and "speedup" not in ours
    iterations.main("cpu", True, tmp_path)
    lines = readme.iterations([json.loads((tmp_path / "ppo_cpu.json").read_text()), None])
    assert "| **96** | – | – | 100 ms + 200 ms + 700 ms | – | 5 / – |" in lines[2]


def test_a_failure_of_ours_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda: report(FULL))
    monkeypatch.setattr(iterations, "play", lambda trainer, work: report(FULL) | {"optimizer_steps": [4, 4, 4]})
    with pytest.raises(SystemExit, match=FULL.title.replace("+", r"\+") + ": twinhead"):
        iterations.main("cpu", True, tmp_path)
    assert json.loads((tmp_path / "ppo_cpu.json").read_text())["scaling"][0]["ratio"] is None


def test_who_is_stopped_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> dict[str, Any]:
        if started.count("trl") > 1:
            raise KeyboardInterrupt
        return report(FULL)

    started = fake(monkeypatch, stop)
    monkeypatch.setattr(iterations, "cases", lambda device, quick: [FULL, FULL])
    with pytest.raises(KeyboardInterrupt):
        iterations.main("cpu", True, tmp_path)
    assert len(json.loads((tmp_path / "ppo_cpu.json").read_text())["cases"]) == 1


def test_time_that_is_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = fake(monkeypatch, lambda: report(FULL))
    iterations.main("cpu", True, tmp_path, minutes=0)
    found = json.loads((tmp_path / "ppo_cpu.json").read_text())
    assert not started and not found["cases"] and not found["scaling"]
    assert found["left_out"] == [FULL.title, *(scaling.title for scaling in iterations.scalings(quick=True))]


def test_what_is_measured() -> None:
    titles = [case.title for case in iterations.cases(CPU, quick=False)]
    assert len(set(titles)) == len(titles)
    for vocabulary in (4096, 32000):
        assert f"4 × 256, V={vocabulary}, batch 32, 32 + 64 tokens, float32" in titles
        assert f"4 × 256, V={vocabulary}, batch 32, 32 + up to 64 tokens, float32" in titles
    first = iterations.cases(torch.device("cuda"), quick=False)[0]
    assert first.title == "24 × 896, V=151936, batch 64, 512 + 512 tokens, bfloat16"
    assert all(case.shape.vocabulary in iterations.EOS_SCALES for case in iterations.cases(CPU, False) if case.ragged)
    for scaling in iterations.scalings(quick=False):
        sizes = [size for size, _ in scaling.points]
        assert sizes == sorted(sizes) and len({case.title for _, case in scaling.points}) == len(sizes) == 4


@pytest.mark.parametrize(
    ("words", "module", "expected"),
    [
        ("kernels", "kernels", ("cpu", [], False, command.RESULTS, None, False)),
        (
            "kernels --device cuda --op gae kl --quick --results r --minutes 1.5 --keep_memory",
            "kernels",
            ("cuda", ["gae", "kl"], True, Path("r"), 1.5, True),
        ),
        ("generate", "rollouts", ("cpu", False, command.RESULTS, None)),
        ("generate --quick --minutes 2 --device cuda", "rollouts", ("cuda", True, command.RESULTS, 2.0)),
        ("train", "updates", ("cpu", False, command.RESULTS, None)),
        ("train --quick --minutes 2 --results r", "updates", ("cpu", True, Path("r"), 2.0)),
        ("ppo", "iterations", ("cpu", False, command.RESULTS, None)),
        ("ppo --quick --minutes 3 --device cuda --results r", "iterations", ("cuda", True, Path("r"), 3.0)),
        ("quality --seeds 4 5 --runs a --results r", "quality", ([4, 5], Path("a"), Path("r"))),
        ("gpu --device cpu --output o", "gpu", ("cpu", Path("o"))),
        ("peers", "peers", ()),
        ("readme --results r", "readme", (Path("README.md"), Path("r"))),
    ],
)
def test_the_options_of_a_command_reach_it(
    words: str, module: str, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    modules = [module, "sharing", "comparison"] if module == "quality" else [module]
    for name in modules:
        monkeypatch.setattr(importlib.import_module(f"benchmarks.{name}"), "main", lambda *given: seen.append(given))
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    command.main()
    assert seen == [expected] * len(modules)


@pytest.mark.parametrize("words", ["ppo --keep_memory", "train --op gae", "kernels --device tpu", "nothing"])
def test_an_option_of_another_command_is_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        command.main()
