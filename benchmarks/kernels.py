"""How fast are the kernels: every operation beside torch, torch.compile and the peers; a wrong answer has no time.

For each case: the gate (float64), then interleaved rounds of all that passed together with the limit, then the peak
memory of each. What is written: `kernels_<device>.json`, rewritten after every case, and a picture per operation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import cases, gate, providers
from benchmarks.cases import Case, Problem
from benchmarks.contender import EAGER, OURS
from benchmarks.machine import surroundings
from benchmarks.peers import Missing
from benchmarks.timing import Run, Times, interleaved, keep_freed_memory, peak_memory

LIMIT = "limit"
SECONDS = {"cpu": 15.0, "cuda": 4.0}  # of rounds per case


def main(
    device: str,
    ops: Sequence[str],
    quick: bool,
    results: Path,
    minutes: float | None = None,
    keep_memory: bool = False,
) -> None:
    """Measure the cases of `ops` (none: all), print a table for each, write JSON and pictures into `results`.

    With `keep_memory` see keep_freed_memory; its results stand apart, in kernels_DEVICE_kept.json, without pictures.
    After `minutes` no further case is begun; the JSON lists what was left out. Raises SystemExit for an unknown name,
    and at the end if one of our own answers was wrong or failed.
    """
    if unknown := set(ops) - set(providers.OPS):
        raise SystemExit(f"no function {', '.join(sorted(unknown))}, expected some of {', '.join(providers.OPS)}")
    if keep_memory:
        keep_freed_memory()
    start, console = time.monotonic(), Console()
    chosen = [case for case in cases.cases(device, quick) if not ops or case.op in ops]
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"kernels_{device}{'_kept' if keep_memory else ''}.json"
    found: dict[str, Any] = {**surroundings(device), "quick": quick, "cases": [], "left_out": []}
    for case in chosen:
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            found["left_out"].append({"op": case.op, "title": case.title})
            console.print(f"no time left for {case.op}, {case.title}")
        else:
            found["cases"].append(measure(case, torch.device(device), 0.5 if quick else SECONDS[device]))
            show(found["cases"][-1], console)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not keep_memory:
        draw(found, results, console)
    if broken := [
        f"{c['op']}, {c['title']}: {r['provider']}" for c in found["cases"] for r in c["rows"] if ours_broke(r)
    ]:
        raise SystemExit("not what it should be:\n" + "\n".join(broken))


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """One case: a row for every provider, with its times or with the reason why there are none."""
    torch.compiler.reset()  # a limit on recompilations counts over all cases
    problem = case.problem(device)
    limit = case.limit(problem)
    passed, rows = _pass_gate(case, problem)
    times = interleaved({LIMIT: limit.run, **passed}, device, seconds=seconds)
    bound = limit.share * times[LIMIT].median
    for row in rows:
        if (run := passed.get(row["provider"])) is not None:
            row |= _measured(times[row["provider"]], bound, peak_memory(run, device))
    return {"op": case.op, "title": case.title, "limit": {"name": limit.name, "milliseconds": bound}, "rows": rows}


def _pass_gate(case: Case, problem: Problem) -> tuple[dict[str, Run], list[dict[str, Any]]]:
    """Those whose answer is right, ready to be timed, and a row for everybody."""
    expected = gate.exact(case, problem)
    passed: dict[str, Run] = {}
    rows = []
    for name, make in providers.providers(case.op).items():
        row: dict[str, Any] = {"provider": name}
        rows.append(row)
        try:
            call = make(problem)
            run = gate.asked(call, problem)
            row["error"] = gate.error(case, problem, call, run(), expected)
        except Missing as reason:
            row["not_run"] = str(reason)
        except Exception as failure:  # noqa: BLE001  a contender can fail in any way: its row says how
            unavailable = name in OURS.values() and isinstance(failure, ValueError) and "backend" in str(failure)
            first = next(iter(str(failure).splitlines()), "")
            row["not_run" if unavailable else "failed"] = (
                str(failure) if unavailable else f"{type(failure).__name__}: {first}"
            )
        else:
            if row["error"] <= gate.tolerance(problem):
                passed[name] = run
            else:
                row["failed"] = f"wrong: error {row['error']:.1e}, expected at most {gate.tolerance(problem):.0e}"
    return passed, rows


def _measured(times: Times, bound: float, memory: int | None) -> dict[str, Any]:
    return {
        "milliseconds": times.median,
        "quartiles": [times.low, times.high],
        "rounds": times.rounds,
        "of_limit": bound / times.median,
        "peak_bytes": memory,
    }


def ours_broke(row: dict[str, Any]) -> bool:
    """Whether a row of ours holds a wrong answer or a failure, rather than a backend that is not there."""
    return row["provider"] in OURS.values() and "failed" in row


def table(measured: dict[str, Any]) -> Table:
    """A row per provider that was timed; spread: half the interquartile range; speedup: eager's time by its own."""
    limit = measured["limit"]
    caption = f"limit: {limit['name']}, {duration(limit['milliseconds'])}"
    shown = Table(caption=caption, box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in ("median", "spread", "speedup", "of limit", "MiB", "error"):
        shown.add_column(heading, justify="right", no_wrap=True)
    eager = next(row for row in measured["rows"] if row["provider"] == EAGER).get("milliseconds")
    for row in measured["rows"]:
        if "milliseconds" not in row:
            continue
        low, high = row["quartiles"]
        memory = row["peak_bytes"]
        shown.add_row(
            row["provider"], duration(row["milliseconds"]), f"±{(high - low) / 2 / row['milliseconds']:.0%}",
            f"{eager / row['milliseconds']:.2f}" if eager else "–", f"{row['of_limit']:.0%}",
            "–" if memory is None else f"{memory / 2**20:.1f}", f"{row['error']:.0e}",
            style="bold" if row["provider"] in OURS.values() else "",
        )  # fmt: skip
    return shown


def show(measured: dict[str, Any], console: Console) -> None:
    """The table of a case, and below it everybody who has no time."""
    console.print(f"{measured['op']}: {measured['title']}", style="bold")
    console.print(table(measured))
    for row in measured["rows"]:
        if "milliseconds" not in row:
            console.print(f"  {row['provider']}: {reason(row)}", style="red" if "failed" in row else "dim")
    console.print()


def reason(row: dict[str, Any]) -> str:
    """Why a row has no time."""
    return str(row.get("failed") or row["not_run"])


def duration(milliseconds: float) -> str:
    """Three digits in the unit that fits: "85.3 µs", "4.12 ms", "1.30 s"."""
    scale, unit = next(((s, u) for s, u in ((1e3, "s"), (1.0, "ms")) if milliseconds >= s), (1e-3, "µs"))
    value = milliseconds / scale
    return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {unit}"


def draw(found: dict[str, Any], results: Path, console: Console) -> None:
    """A picture per operation, where matplotlib and the engine's other dependencies are installed."""
    try:
        from benchmarks import chart
    except ImportError as missing:
        console.print(f"no pictures: {missing}; `python -m benchmarks readme` draws them from the JSON elsewhere")
    else:
        chart.main(found, results)
