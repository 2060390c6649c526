"""The comparison's page: tables on fixed numbers, pictures, and one command that fills it and can be given again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import arms, comparison, critics, gallery
from benchmarks.arms import ARMS, Arm, Budget, Point
from benchmarks.gallery import Found
from benchmarks.iterations import TINY, Iteration
from benchmarks.trainers import Work
from tests import toys
from twinhead.engine.metrics import JsonLines


def point(step: int, gold: float, **other: float) -> Point:
    usual = {"win_rate": 0.5, "kl": step / 2, "proxy": step / 10, "distinct": 1.0, "eos_rate": 1.0, "length": 14.0}
    return {"step": step, "answers": 256 * step, "updates": 16 * step, "gold": gold, **usual, **other}


RISES = [point(0, 0.2), *(point(k, 0.2 + k / 5, explained_variance=k / 12) for k in (2, 4, 6, 8, 10, 12))]
FALLS = [point(0, 0.2), point(10, 1.5, win_rate=0.7), point(20, -3.0, win_rate=0.1)]
WORSE = [point(0, 0.2), point(10, 1.1, win_rate=0.6), point(20, -5.0, win_rate=0.0)]
BEST = [point(1, 0.2), point(4, 0.9), point(16, 1.4)]


@pytest.fixture
def found() -> Found:
    """Every arm with two seeds."""
    best = {"0": BEST, "1": BEST}
    steady = {name: {"0": RISES, "1": RISES} for name in ARMS if not name.startswith("weak")}
    return {**steady, **{name: {"0": FALLS, "1": WORSE} for name in ARMS if name.startswith("weak")}} | {
        "best_of": best, "weak_best_of": best,
    }  # fmt: skip


def test_methods_say_what_they_spent(found: Found) -> None:
    lines = comparison.methods(found)
    assert lines[2] == (
        "| SFT | – | 0.50 (0.50 to 0.50) | 0.20 (0.20 to 0.20) | 0.00 (0.00 to 0.00) | 0.00 (0.00 to 0.00) | "
        "1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |"
    )
    assert lines[3].startswith("| PPO, kl_coef 0.05 | 3,072 answers scored, 192 updates |")
    assert lines[5].startswith("| DPO, beta 0.1 | the reward model's rankings, 192 updates |")
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| best of 1", "| best of 4", "| best of 16"]
    assert "16 scored for each answer that is given" in lines[-1]


def test_optimisation_tells_the_maximum_and_the_end(found: Found) -> None:
    row = comparison.optimisation(found)[2]
    assert row == (
        "| PPO | 1.30 (1.10 to 1.50) | 5.00 (5.00 to 5.00) | −4.00 (−5.00 to −3.00) | 10.00 (10.00 to 10.00) | "
        "2.00 (2.00 to 2.00) | 0.05 (0.00 to 0.10) |"
    )


def test_a_row_for_every_coefficient_mitigation_and_critic(found: Found) -> None:
    assert [line.split(" | ")[0] for line in comparison.sweep(found)[2:]] == [
        "| 0", "| 0.02", "| 0.05", "| 0.1", "| 0.2",
    ]  # fmt: skip
    mended = comparison.mitigations(found)
    assert len(mended) == 2 + len(arms.MITIGATIONS)
    assert mended[2].startswith("| none | 0.05 (0.00 to 0.10) | −4.00 (−5.00 to −3.00) | 1.30 (1.10 to 1.50) |")
    told = comparison.critic_rows(found)[2]
    assert told.startswith("| shared | 0.50 (0.50 to 0.50) | 2.60 (2.60 to 2.60) | 6.00 (6.00 to 6.00) | 1.00 ")
    assert told.endswith("| 0.17 (0.17 to 0.17) | 0.50 (0.50 to 0.50) | 1.00 (1.00 to 1.00) |")


def test_rows_are_of_the_same_seeds(found: Found) -> None:
    fewer = found | {"weak_kl_0.05": {"0": FALLS}}
    assert comparison.sweep(fewer)[2].startswith("| 0 | 0.10 | −3.00 |")
    assert {name: [*seeds] for name, seeds in gallery.alike(fewer, ["weak_ppo", "weak_kl_0.05", "none"]).items()} == {
        "weak_ppo": ["0"], "weak_kl_0.05": ["0"],
    }  # fmt: skip


def test_one_seed_has_no_range_and_none_a_dash(found: Found) -> None:
    one = {name: {"0": seeds["0"]} for name, seeds in found.items()}
    assert comparison.optimisation(one)[2].startswith("| PPO | 1.50 | 5.00 | −3.00 |")
    assert comparison.mitigations({})[2] == "| none | – | – | – | – | – | – |"
    assert comparison.methods({})[2] == "| PPO, kl_coef 0.05 | not measured |  |  |  |  |  |  |"


def test_judges_and_costs() -> None:
    rows = comparison.judges({"0": {"reward": 0.84, "weak": 0.7}, "1": {"reward": 0.86, "weak": 0.8}})
    assert rows[2].endswith("| 0.85 (0.84 to 0.86) |") and rows[3].endswith("| 0.75 (0.70 to 0.80) |")
    assert rows[4].endswith("| – |")
    row = {"critic": "shared", "seconds": 1.154, "peak_bytes": 200 * 2**20, "trained": 4_200_000}
    assert comparison.costs([row])[2] == "| shared | 4.2 M | 1.15 s | 200 |"


def test_answers_are_quoted() -> None:
    rows = comparison.quoted({"0": {"sft": "room <sep> the room is old .", "weak_ppo": "room <sep> safe"}, "1": {}})
    assert rows[2:] == ["| SFT | `room <sep> the room is old .` |", "| PPO, hackable | `room <sep> safe` |"]


def test_sorted_digits_are_told_per_method() -> None:
    curve = [{"step": 50, "sampled": 0.95, "greedy": 1.0, "kl": 0.5}]
    run = {"digits": 5, "sft": {"sampled": 0.5, "greedy": 0.99}, "curve": curve}
    lines = comparison.sorted_digits({"task": "C", "versions": {}, "sharpened": {"0": run | {"ppo": curve}, "1": run}})
    assert lines[2] == (
        "| sharpened | 5 | GRPO | 50 | 2 | 0.500 (0.500 to 0.500) to 0.950 (0.950 to 0.950) | "
        "0.990 (0.990 to 0.990) to 1.000 (1.000 to 1.000) | 0.50 (0.50 to 0.50) |"
    )
    assert lines[3].startswith("| sharpened | 5 | PPO | 50 | 1 | 0.500 to 0.950 |")


def test_pictures_are_drawn_of_what_there_is(found: Found, tmp_path: Path) -> None:
    drawn = gallery.main(found, tmp_path)
    assert [path.stem for path in drawn] == [
        "comparison_frontier", "comparison_over_optimisation", "comparison_kl_sweep", "comparison_mitigations",
        "comparison_critics",
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert gallery.main({}, tmp_path) == []
    bundle = gallery.frontier(found).panels[1].bundles[0]
    assert bundle.mean == [(0, pytest.approx(0.2)), (5, pytest.approx(1.3)), (10, pytest.approx(-4))]
    assert bundle.end == pytest.approx(-4)
    apart = gallery.Bundle("PPO", "ppo", [[(0, 0.2), (5, 1.5)], [(0, 0.2), (6, 1.1)]])
    assert apart.mean == [] and apart.end == pytest.approx(1.3)


def test_the_command_fills_the_page_and_can_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(trial: arms.Trial, name: str) -> list[Point]:
        trained.append(name)
        return FALLS

    monkeypatch.setattr(comparison, "ARMS", {name: Arm(arm.title, train) for name, arm in ARMS.items()})
    monkeypatch.setattr(critics, "main", lambda runs: [])
    runs, results = tmp_path / "runs", tmp_path / "results"
    small = Budget(demonstrations=4)
    comparison.main([5], runs, results, small)
    assert trained == list(ARMS)
    page = results / "comparison.md"
    said = page.read_text().replace("# Comparison", "# Comparison\n\nWhat a reader said.")
    page.write_text(said)
    comparison.main([5], runs, results, small)
    assert trained == list(ARMS)  # nothing twice
    assert page.read_text() == said
    written = json.loads((results / "comparison.json").read_text())
    assert written["arms"]["weak_ppo"]["5"] == FALLS
    assert written["budget"]["demonstrations"] == 4
    page.write_text(said.replace("<!-- sweep table -->", ""))
    with pytest.raises(ValueError, match="expected <!-- sweep table --> and <!-- /sweep table --> in"):
        comparison.write(results)


@pytest.mark.parametrize("name", ["shared", "detached", "branch of 1 layer", "separate"])
def test_a_critic_is_timed_and_weighed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(critics.ARRANGEMENTS, "branch of 1 layer", {"critic": "branch", "branch_layers": 1})
    case = Iteration(TINY, critics.torch.float32, 8, 5, 8)
    with toys.one_thread():
        case.write(tmp_path, 2)
        work = case.work(tmp_path, critics.torch.device("cpu"), 2)
        found = critics.train(work, name, tmp_path / "run")
    (seconds,) = found["seconds"]  # of the second step
    assert 0 < seconds < 60 and found["peak_bytes"] >= 0
    shared = sum(p.numel() for p in TINY.model(critics.torch.float32, critics.torch.device("cpu")).parameters()) + 33
    more = {"shared": 1.0, "detached": 1.0, "branch of 1 layer": 1.2, "separate": 1.5}[name]
    assert found["trained"] == shared if more == 1 else found["trained"] > more * shared


def test_critics_take_turns_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []

    def process(folder: Path, name: str, turn: int, work: Work) -> dict[str, Any]:
        turns.append((name, turn))
        return {"seconds": [1.0 + turn], "peak_bytes": 10 + turn, "trained": 7}

    monkeypatch.setattr(critics, "_process", process)
    case = Iteration(TINY, critics.torch.float32, 8, 5, 8)
    rows = critics.main(tmp_path, case, ["shared", "separate"])
    assert turns == [("shared", 0), ("separate", 0), ("shared", 1), ("separate", 1)]
    assert rows == critics.main(tmp_path, case, ["shared", "separate"])
    assert len(turns) == 4
    assert (rows[0]["seconds"], rows[0]["peak_bytes"], rows[0]["trained"]) == (1.5, 11, 7)


def test_a_process_of_its_own_measures(tmp_path: Path) -> None:
    case = Iteration(TINY, critics.torch.float32, 8, 5, 8)
    case.write(tmp_path, 2)
    work = case.work(tmp_path, critics.torch.device("cpu"), 2)
    found = critics._process(tmp_path, "shared", 0, work)
    assert (
        found == critics._process(tmp_path, "shared", 0, work) == json.loads((tmp_path / "shared_0.json").read_text())
    )
    assert found["trained"] > 0


def test_the_peak_is_that_of_later_steps(tmp_path: Path) -> None:
    timings = JsonLines(tmp_path / "timings.jsonl")
    for step, update in ((1, 90.0), (2, 20.5), (3, 30.25)):
        timings.write({"step": step, "seconds/update": 99.0, "peak_mb/update": update, "peak_mb/generate": 1.0})
    assert critics.peak(timings) == 30_250_000
