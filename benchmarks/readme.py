"""The README's tables, generated from the JSON files in benchmarks/results: no figure is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, chart
from benchmarks.contender import COMPILED, EAGER, OURS
from benchmarks.kernels import duration
from benchmarks.providers import OPS
from benchmarks.quality import fall

UNMEASURED = "not yet measured on GPU"


def main(readme: Path, results: Path) -> None:
    """Replace the text between `<!-- NAME table -->` and `<!-- /NAME table -->` for every result that exists.

    The kernels' pictures are drawn again too: a GPU machine may have been without matplotlib. Raises ValueError if a
    result has no place in the README.
    """
    text = readme.read_text(encoding="utf-8")
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    tables = {name: table(found[name]) for name, table in (("demo", demo), ("quality", quality)) if name in found}
    measured = {device: found.get(f"kernels_{device}") for device in ("cpu", "cuda")}
    if any(measured.values()):
        tables["kernels"] = kernels(measured, found.get("kernels_cpu_kept"))
    for name, written in (("generate", race), ("train", race), ("ppo", iterations)):
        if any(timed := [found.get(f"{name}_{device}") for device in ("cpu", "cuda")]):
            tables[name] = written(timed)
    text = filled(text, tables, str(readme), str(results))
    readme.write_text(text, encoding="utf-8")
    for part in filter(None, measured.values()):
        chart.main(part, results)


def filled(text: str, tables: Mapping[str, Sequence[str]], page: str, source: str) -> str:
    """The page's text with the lines of every table between its marks.

    Raises ValueError if a table has no place in it.
    """
    for name, lines in tables.items():
        start, end = f"<!-- {name} table -->", f"<!-- /{name} table -->"
        if start not in text or end not in text:
            raise ValueError(f"expected {start} and {end} in {page}, where the table of {source} goes")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = "\n".join([before + start, *lines, end]) + after
    return text


def demo(results: dict[str, Any]) -> list[str]:
    """One row per stage of the demo."""
    names = {"pretrain": "pre-trained", "sft": "SFT"}
    lines = [
        "| stage | win rate against SFT (95% from) | gold | reward | KL (nats) | distinct | held-out LM loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, found in results["stages"].items():
        kind, _, step = stage.rpartition("_")
        name = names.get(stage) or f"{'PPO-ptx' if kind == 'ppo_ptx' else 'PPO'}, iteration {step}"
        numbers = (f"{found[key]:.2f}" for key in ("gold", "reward", "kl", "distinct", "lm_loss"))
        lines.append(f"| {name} | {found['win_rate']:.2f} ({found['win_rate_low']:.2f}) | {' | '.join(numbers)} |")
    human, accuracy, rows = results["human_gold"], results["reward_accuracy"], results["rows"]
    return [
        *lines,
        "",
        f"Seed {results['seed']}, Python {results['python']}, {rows['demonstrations.jsonl']} demonstrations. "
        f"Docstrings written by people score {human:.2f}; the reward model orders {accuracy:.0%} of held-out pairs as "
        "the labeler did.",
    ]


def quality(results: dict[str, Any]) -> list[str]:
    """One row per seed and reward model of task A."""
    lines = [
        "| reward model | seed | accuracy | iteration | win rate | gold | proxy | KL (nats) | EOS |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, found in results["healthy"].items():
        lines.append(_row("healthy, kl_coef 0.05", seed, found["reward_accuracy"], found["curve"][-1]))
    for seed, found in results["weak"].items():
        best, _, _ = fall(found["curve"])
        lines.append(_row("weak, kl_coef 0: highest gold", seed, found["reward_accuracy"], best))
        lines.append(_row("weak, kl_coef 0: end", seed, found["reward_accuracy"], found["curve"][-1]))
        lines.append(_row("weak, kl_coef 0.05", seed, found["reward_accuracy"], found["kl_0.05"][-1]))
    return lines


def _row(name: str, seed: str, accuracy: float, point: dict[str, float]) -> str:
    numbers = " | ".join(f"{point[key]:.2f}" for key in ("win_rate", "gold", "proxy", "kl", "eos_rate"))
    return f"| {name} | {seed} | {accuracy:.2f} | {point['step']} | {numbers} |"


def kernels(measured: dict[str, dict[str, Any] | None], kept: dict[str, Any] | None) -> list[str]:
    """One row per case: ours beside eager, torch.compile and the fastest other; what was not measured says so.

    `kept` is the same on the CPU with freed memory kept: how many times faster we are there stands in brackets.
    """
    lines = [
        "| function | case | ours | of the limit | eager | torch.compile | fastest other | memory, ours / eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    again = {(case["op"], case["title"]): case for case in kept["cases"]} if kept is not None else {}
    notes = []
    for device, found in measured.items():
        if found is None:
            first = {case.op: case.title for case in reversed(cases.cases(device))}
            lines += [f"| `{op}` | {first[op]} | {UNMEASURED} | | | | | |" for op in OPS]
            continue
        for case in sorted(found["cases"], key=lambda case: OPS.index(case["op"])):
            lines.append(_kernel(case, again.get((case["op"], case["title"])) if device == "cpu" else None))
        notes.append(_where(found, "torch"))
    return [*lines, "", *notes]


def race(measured: Sequence[dict[str, Any] | None]) -> list[str]:
    """One row per case: everybody's tokens per second, and our memory beside the baseline's; CPU first, then CUDA."""
    first = next(filter(None, measured))
    columns, baseline = first["columns"], first["baseline"]
    ours = columns[0]
    heads = ["tokens per second", *columns, f"{ours} / {baseline}", "a step", f"MiB, {ours} / {baseline}"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for found in measured:
        if found is None:
            lines.append(f"| {UNMEASURED} |{' |' * (len(heads) - 1)}")
        else:
            lines += [_raced(case, columns, baseline) for case in found["cases"]]
    return [*lines, "", *(_where(found, "torch", "transformers") for found in filter(None, measured))]


def _raced(case: dict[str, Any], columns: Sequence[str], baseline: str) -> str:
    timed = {row["name"]: row for row in case["rows"] if "milliseconds" in row}
    ours, theirs = timed.get(columns[0]), timed.get(baseline)
    speeds = [f"{timed[name]['tokens_per_second']:,.0f}" if name in timed else "–" for name in columns]
    step = None if ours is None else ours["step_milliseconds"]
    cells = [
        case["title"], f"**{speeds[0]}**", *speeds[1:], f"{ours['speedup']:.2f}" if ours and theirs else "–",
        "–" if step is None else duration(step), " / ".join(map(_mebibytes, (ours, theirs))),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def iterations(measured: Sequence[dict[str, Any] | None]) -> list[str]:
    """One row per case: both sides' tokens per second, phases and memory; CPU first, then CUDA; then how cost grows."""
    ours, theirs = next(filter(None, measured))["columns"]
    heads = [
        "response tokens per second", ours, theirs, f"{ours} / {theirs}", f"{ours}: generate + examine + update",
        f"{theirs}: the same", f"MiB, {ours} / {theirs}",
    ]  # fmt: skip
    lines, notes = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)], []
    for found in measured:
        if found is None:
            lines.append(f"| {UNMEASURED} |{' |' * (len(heads) - 1)}")
            continue
        lines += [_iteration(case, ours, theirs) for case in found["cases"]]
        notes += [*map(_growth, found["scaling"]), _where(found, "torch", "transformers"), ""]
    return [*lines, "", *notes[:-1]]


def _iteration(case: dict[str, Any], ours: str, theirs: str) -> str:
    timed = {row["name"]: row for row in case["rows"] if "milliseconds" in row}
    sides = [timed.get(ours), timed.get(theirs)]
    speeds = ["–" if row is None else f"{row['tokens_per_second']:,.0f}" for row in sides]
    phases = ["–" if row is None else " + ".join(map(duration, row["phases"].values())) for row in sides]
    ratio = "–" if None in sides else f"{timed[ours]['speedup']:.2f}"
    cells = [case["title"], f"**{speeds[0]}**", speeds[1], ratio, *phases, " / ".join(map(_mebibytes, sides))]
    return f"| {' | '.join(cells)} |"


def _growth(scaling: dict[str, Any]) -> str:
    sizes = [row["size"] for row in scaling["rows"]]
    ratio = "–" if scaling["ratio"] is None else f"{scaling['ratio']:.2f}"
    costs = [f"{row['microseconds_per_token']:,.0f}" for row in scaling["rows"] if "milliseconds" in row]
    where = f"{scaling['axis']} {', '.join(map(str, sizes))}"
    return f"A response token at {where} costs us {', '.join(costs)} µs: {ratio} times from end to end."


def _where(found: dict[str, Any], *packages: str) -> str:
    """The machine, versions, commit and date of a result."""
    machine, versions = found["machine"], found["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    named = ", ".join(f"{package} {versions[package]}" for package in packages)
    shrunk = " Small shapes: these show that everything runs, and measure nothing." * found["quick"]
    return f"{where}, {named}, commit {found['commit']}, {found['date']}.{shrunk}"


def _kernel(case: dict[str, Any], again: dict[str, Any] | None) -> str:
    timed, kept = _timed(case), {} if again is None else _timed(again)
    ours = _ours(timed)
    peers = [name for name in timed if name not in (EAGER, COMPILED, *OURS.values())]
    best = min(peers, key=lambda name: timed[name]["milliseconds"], default="")

    def beside(name: str) -> str:
        ratio = f" ({kept[name]['milliseconds'] / _ours(kept)['milliseconds']:.1f})" if name in kept else ""
        return f"{_time(timed.get(name))}{ratio}"

    memory = " / ".join(_mebibytes(row) for row in (ours, timed.get(EAGER)))
    cells = [
        f"`{case['op']}`", case["title"], f"**{_time(ours)}**", f"{ours['of_limit']:.0%}" if ours else "–",
        beside(EAGER), beside(COMPILED), f"{best} {beside(best)}" if best else "–", f"{memory} MiB",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _timed(case: dict[str, Any]) -> dict[str, Any]:
    """The rows that have a time, by provider."""
    return {row["provider"]: row for row in case["rows"] if "milliseconds" in row}


def _ours(timed: dict[str, Any]) -> Any:
    """The row of our fastest kind of backend; None where none was timed."""
    return next((timed[OURS[backend]] for backend in ("triton", "cpu", "torch") if OURS[backend] in timed), None)


def _time(row: dict[str, Any] | None) -> str:
    return duration(row["milliseconds"]) if row else "–"


def _mebibytes(row: dict[str, Any] | None) -> str:
    return "–" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
