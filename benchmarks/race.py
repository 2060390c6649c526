"""A race of whole programs: everybody passes the gate, then runs in turn; a table and a JSON file say how it went."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.kernels import duration, reason
from benchmarks.machine import surroundings
from benchmarks.peers import Missing
from benchmarks.timing import Run, interleaved, peak_memory

OURS = "twinhead"  # what our own contenders' names begin with
SECONDS = {"cpu": 10.0, "cuda": 4.0}  # of rounds per case
LEAST = 3  # rounds


class Wrong(Exception):
    """What the gate found in an answer that it refuses."""


@dataclass(frozen=True)
class Entrant:
    """What is timed, and its gate: figures about the answer, `tokens` and `error` among them, or Wrong."""

    run: Run
    check: Callable[[], dict[str, float]]
    close: Callable[[], None] | None = None  # ends what runs on between calls; the next call starts it again

    @contextmanager
    def awake(self) -> Iterator[None]:
        """What runs on between calls is there within, and does not take its share of the machine from others after."""
        if self.close is None:
            yield
            return
        self.run()
        try:
            yield
        finally:
            self.close()


Maker = Callable[[], Entrant]


class Titled(Protocol):
    """One row of the README."""

    @property
    def title(self) -> str: ...


class Case(Titled, Protocol):
    """One on which everybody runs in this process."""

    @property
    def steps(self) -> int | None:
        """Steps in which everybody does the work; None where that differs."""

    def entrants(self, device: torch.device) -> Mapping[str, Maker]:
        """The contenders by name, ours first; a maker may raise Missing."""


@dataclass(frozen=True)
class Race:
    """A command of `python -m benchmarks`: its cases, the columns of its table, and who counts as 1."""

    name: str
    cases: Sequence[Case]
    columns: Sequence[str]
    baseline: str


class Record:
    """A JSON file that is written again after every case, so that whoever is stopped keeps what was measured."""

    def __init__(self, path: Path, found: dict[str, Any], minutes: float | None = None) -> None:
        """After `minutes` no further case is begun, and the file lists what was left out."""
        self.path, self.found, self.console = path, found | {"left_out": []}, Console()
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        key: str,
        cases: Sequence[Titled],
        measure: Callable[[Any], dict[str, Any]],
        show: Callable[[dict[str, Any], Console], None],
    ) -> None:
        """Measure the cases into the file's list `key`, and show each."""
        rows = self.found[key] = []
        for case in cases:
            if time.monotonic() > self.deadline:
                self.found["left_out"].append(case.title)
                self.console.print(f"no time left for {case.title}")
            else:
                rows.append(measure(case))
                show(rows[-1], self.console)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def end(self) -> None:
        """Raise SystemExit if one of our own answers was wrong or failed."""
        lists = (value for key, value in self.found.items() if isinstance(value, list) and key != "left_out")
        cases = [case for found in lists for case in found if isinstance(case, dict)]
        if broken := [f"{c['title']}: {r['name']}" for c in cases for r in c["rows"] if ours_broke(r)]:
            raise SystemExit("not what it should be:\n" + "\n".join(broken))


def run(race: Race, device: str, quick: bool, results: Path, minutes: float | None = None) -> None:
    """Measure every case, print a table for each, and rewrite `results`/NAME_DEVICE.json after each.

    After `minutes` no further case is begun; the JSON lists what was left out. Raises SystemExit at the end if one of
    our own answers was wrong or failed.
    """
    found = {**surroundings(device), "quick": quick, "columns": list(race.columns), "baseline": race.baseline}
    record = Record(results / f"{race.name}_{device}.json", found, minutes)
    seconds = 0.0 if quick else SECONDS[device]
    record.add("cases", race.cases, lambda case: measure(case, race.baseline, torch.device(device), seconds), show)
    record.end()


def measure(case: Case, baseline: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """One case: a row for everybody, with times, tokens per second and peak memory, or the reason why there are none.

    speedup: tokens per second by those of `baseline`.
    """
    torch.compiler.reset()  # a limit on recompilations counts over all cases
    passed: dict[str, Entrant] = {}
    rows = []
    with ExitStack() as ends:
        for name, make in case.entrants(device).items():
            rows.append({"name": name} | _gated(name, make, passed, ends))
        runs, awake = {name: who.run for name, who in passed.items()}, {name: who.awake for name, who in passed.items()}
        times = interleaved(runs, device, seconds=seconds, least=LEAST, around=awake)
        ends.close()
        for row in rows:
            if (taken := times.get(row["name"])) is not None:
                row |= {"milliseconds": taken.median, "quartiles": [taken.low, taken.high], "rounds": taken.rounds}
                row["tokens_per_second"] = 1e3 * row["tokens"] / taken.median
                row["step_milliseconds"] = None if case.steps is None else taken.median / case.steps
                row["peak_bytes"] = _peak(passed[row["name"]], device)
    speed = next((row["tokens_per_second"] for row in rows if row["name"] == baseline and "milliseconds" in row), None)
    for row in rows:
        if "milliseconds" in row:
            row["speedup"] = None if speed is None else row["tokens_per_second"] / speed
    passed.clear()
    gc.collect()  # models of a case that is over
    return {"title": case.title, "steps": case.steps, "rows": rows}


def _peak(entrant: Entrant, device: torch.device) -> int | None:
    """What it holds at most, with what it keeps between calls."""
    try:
        return peak_memory(entrant.run, device)
    finally:
        if entrant.close is not None:
            entrant.close()


def _gated(name: str, make: Maker, passed: dict[str, Entrant], ends: ExitStack) -> dict[str, Any]:
    """Let a contender through the gate into `passed`: the figures of its answer, or what is wrong with it."""
    try:
        entrant = make()
        if entrant.close is not None:
            ends.callback(entrant.close)
        figures = entrant.check()
        if entrant.close is not None:
            entrant.close()
    except Missing as missing:
        return {"not_run": str(missing)}
    except Wrong as wrong:
        return {"failed": f"wrong: {wrong}"}
    except Exception as failure:  # noqa: BLE001  a contender can fail in any way: its row says how
        return {"failed": f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"}
    passed[name] = entrant
    return figures


def ours_broke(row: dict[str, Any]) -> bool:
    """Whether a row of ours holds a wrong answer or a failure."""
    return row["name"].startswith(OURS) and "failed" in row


def table(measured: dict[str, Any]) -> Table:
    """A row for everybody who was timed: the median of a step, or of everything where steps differ; spread: half the
    interquartile range."""
    by_step = measured["steps"] is not None
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for heading in ("a step" if by_step else "median", "spread", "tokens/s", "speedup", "MiB", "error", "equal"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in measured["rows"]:
        if "milliseconds" not in row:
            continue
        low, high = row["quartiles"]
        speedup, memory, equal = (row.get(key) for key in ("speedup", "peak_bytes", "equal"))
        shown.add_row(
            row["name"], duration(row["step_milliseconds" if by_step else "milliseconds"]),
            f"±{(high - low) / 2 / row['milliseconds']:.0%}", f"{row['tokens_per_second']:,.0f}",
            "–" if speedup is None else f"{speedup:.2f}", "–" if memory is None else f"{memory / 2**20:,.1f}",
            f"{row['error']:.0e}", "–" if equal is None else f"{equal:.1%}",
            style="bold" if row["name"].startswith(OURS) else "",
        )  # fmt: skip
    return shown


def show(measured: dict[str, Any], console: Console) -> None:
    """The table of a case, and below it everybody who has no time."""
    console.print(measured["title"], style="bold")
    console.print(table(measured))
    excuses(measured, console)


def excuses(measured: dict[str, Any], console: Console) -> None:
    """Why who has no time has none."""
    for row in measured["rows"]:
        if "milliseconds" not in row:
            console.print(f"  {row['name']}: {reason(row)}", style="red" if "failed" in row else "dim")
    console.print()
