"""What to use when: methods, KL coefficients, mitigations and critics beside each other, as a page with pictures.

Arms are trained where they have not been yet (arms.py), their points written to comparison.json, and the tables of
comparison.md filled in between their marks. What is said around the tables was written by a reader of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import critics, gallery
from benchmarks.arms import (
    ARMS,
    CRITICS,
    HACKABLE,
    METHODS,
    MITIGATIONS,
    SWEEP,
    TRUSTED,
    UNBOUND,
    Budget,
    Point,
    Trial,
)
from benchmarks.gallery import Found, alike
from benchmarks.machine import surroundings
from benchmarks.quality import fall
from benchmarks.readme import filled
from twinhead.engine.checkpoint import write_file

SPENT = {
    "ppo": "{answers} answers scored, {updates} updates",
    "grpo": "{answers} answers scored, {updates} updates",
    "dpo": "the reward model's rankings, {updates} updates",
}
JUDGES = {
    TRUSTED: "trusted: 6000 rankings, SFT trunk", HACKABLE: "hackable: 300 noisy rankings, 1 × 32",
    "weak_2": "the same, drawn again", "weak_3": "the same, drawn a third time",
    "larger": "the same rankings, 2 × 64, random start", "grown": "the same rankings, 2 × 64, SFT trunk",
}  # fmt: skip
ABSENT = "not measured"
QUOTED = {
    "sft": "SFT", "ppo": "PPO, trusted", "weak_ppo": "PPO, hackable", "weak_grpo": "GRPO, hackable",
    "weak_dpo": "DPO, hackable",
}  # fmt: skip


def main(seeds: Sequence[int], runs: Path, results: Path, budget: Budget | None = None) -> None:
    """Measure what has not been for every seed; write JSON, pictures and the page's tables into `results`."""
    found = measure(seeds, runs, budget or Budget())
    results.mkdir(parents=True, exist_ok=True)
    write_file(results / "comparison.json", json.dumps(found, indent=1) + "\n")
    write(results)
    Console().print(f"{results / 'comparison.md'}: {len(found['arms'])} arms, seeds {', '.join(map(str, seeds))}")


def measure(seeds: Sequence[int], runs: Path, budget: Budget) -> dict[str, Any]:
    """Every arm of every seed, what its reward models are worth, and what the critics cost."""
    arms: Found = {name: {} for name in ARMS}
    accuracies, answers = {}, {}
    for seed in seeds:
        trial = Trial(runs, seed, budget)
        for name, arm in ARMS.items():
            arms[name][str(seed)] = trial.measured(name, arm)
        accuracies[str(seed)] = trial.accuracies()
        answers[str(seed)] = {name: trial.answer(name) for name in QUOTED if Path(trial.task.path(name)).is_dir()}
    where = surroundings("cpu")
    costs = {"critic_costs": critics.main(runs)}
    return where | {"budget": asdict(budget), "arms": arms, "reward_accuracy": accuracies, "answers": answers} | costs


def write(results: Path) -> None:
    """Pictures, and the page's tables, from comparison.json and, where it is, quality_sorting.json."""
    found = json.loads((results / "comparison.json").read_text(encoding="utf-8"))
    arms: Found = found["arms"]
    tables = {
        "methods": methods(arms), "optimisation": optimisation(arms), "sweep": sweep(arms),
        "mitigations": mitigations(arms), "judges": judges(found["reward_accuracy"]), "critics": critic_rows(arms),
        "costs": costs(found["critic_costs"]), "where": [where(found)], "answers": quoted(found["answers"]),
    }  # fmt: skip
    sorting = results / "quality_sorting.json"
    if sorting.is_file():
        tables["sorting"] = sorted_digits(json.loads(sorting.read_text(encoding="utf-8")))
    page = results / "comparison.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else blank(tables)
    write_file(page, filled(text, tables, str(page), str(results)))
    gallery.main(arms, results)


def blank(tables: Mapping[str, Sequence[str]]) -> str:
    """A page that says nothing yet."""
    marks = (f"<!-- {name} table -->\n<!-- /{name} table -->\n" for name in tables)
    return "\n".join(["# Comparison\n", *marks])


def methods(arms: Found) -> list[str]:
    """The trusted reward model: every method at the end of its budget, and the SFT model that they start from."""
    heads = ("method", "spent", "win rate against SFT", "gold", "proxy", "KL (nats)", "distinct", "EOS")
    lines = _head(heads)
    if start := arms.get("ppo"):
        lines.append(_line("SFT", "–", *_numbers(_at(start, 0))))
    for name, arm in METHODS.items():
        seeds = arms.get(name, {})
        if not seeds:
            lines.append(_line(arm.title, ABSENT, *[""] * (len(heads) - 2)))
        elif name == "best_of":
            for i, point in enumerate(next(iter(seeds.values()))):
                spent = f"{point['step']} scored for each answer that is given, nothing trained"
                lines.append(_line(f"best of {point['step']}", spent, *_numbers(_at(seeds, i))))
        else:
            last = _at(seeds, -1)
            spent = SPENT[name].format(**{key: f"{last[0].get(key, 0):,}" for key in ("answers", "updates")})
            lines.append(_line(arm.title, spent, *_numbers(last)))
    return lines


def optimisation(arms: Found) -> list[str]:
    """The hackable reward model, nothing in the way: where gold is highest, and where everything ends."""
    heads = ("method", "highest gold", "at KL", "gold at the end", "at KL", "proxy at the end", "win rate at the end")
    lines = _head(heads)
    for name, arm in UNBOUND.items():
        seeds = arms.get(name, {})
        best, last = [fall(points)[0] for points in seeds.values()], _at(seeds, -1)
        cells = (
            _spread(best, "gold"), _spread(best, "kl"), _spread(last, "gold"), _spread(last, "kl"),
            _spread(last, "proxy"), _spread(last, "win_rate"),
        )  # fmt: skip
        lines.append(_line(arm.title, *cells))
    return lines


def sweep(arms: Found) -> list[str]:
    """PPO against the hackable reward model, at the end of its budget and at its best, by coefficient."""
    lines = _head(("kl_coef", "win rate", "gold at the end", "highest gold", "proxy", "KL (nats)", "distinct"))
    shared = alike(arms, SWEEP)
    for name, arm in SWEEP.items():
        seeds = shared.get(name, {})
        last, best = _at(seeds, -1), [fall(points)[0] for points in seeds.values()]
        ends = [_spread(last, key) for key in ("win_rate", "gold", "proxy", "kl", "distinct")]
        lines.append(_line(arm.title, *ends[:2], _spread(best, "gold"), *ends[2:]))
    return lines


def mitigations(arms: Found) -> list[str]:
    """PPO against the hackable reward model, with one thing changed in each row."""
    heads = ("changed", "win rate", "gold at the end", "highest gold", "KL (nats)", "distinct", "tokens")
    lines, shared = _head(heads), alike(arms, MITIGATIONS)
    for name, arm in MITIGATIONS.items():
        seeds = shared.get(name, {})
        last, best = _at(seeds, -1), [fall(points)[0] for points in seeds.values()]
        ends = [_spread(last, key) for key in ("win_rate", "gold")]
        rest = [_spread(last, "kl"), _spread(last, "distinct"), _spread(last, "length", 1)]
        lines.append(_line(arm.title, *ends, _spread(best, "gold"), *rest))
    return lines


def judges(accuracies: Mapping[str, Mapping[str, float]]) -> list[str]:
    """How many held-out pairs each reward model orders as the labeler did."""
    lines = _head(("reward model", "learnt from", "held-out accuracy"))
    for name, origin in JUDGES.items():
        seen = [{"accuracy": found[name]} for found in accuracies.values() if name in found]
        lines.append(_line(f"`{name}`", origin, _spread(seen, "accuracy")))
    return lines


def critic_rows(arms: Found) -> list[str]:
    """The critics' worth: what the policy earns, and what share of the returns' variance is foreseen."""
    heads = ("critic", "win rate", "gold", "KL (nats)", "gold a third of the way",
             "explained variance: first contest", "half-way", "end")  # fmt: skip
    lines = _head(heads)
    for name, arm in CRITICS.items():
        seeds = arms.get(name, {})
        last = _at(seeds, -1)
        third, middle = (_at(seeds, max(1, (len(_first(seeds)) - 1) * part // 6)) for part in (2, 3))
        seen = [_spread(points, "explained_variance") for points in (_at(seeds, 1), middle, last)]
        ends = [_spread(last, key) for key in ("win_rate", "gold", "kl")]
        lines.append(_line(arm.title, *ends, _spread(third, "gold"), *seen))
    return lines


def costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The critics' price at a larger size: medians of steps, and peak memory of a process."""
    lines = _head(("critic", "weights trained", "CPU time of a step", "peak memory, MiB"))
    for row in rows:
        weights, memory = f"{row['trained'] / 1e6:.1f} M", f"{row['peak_bytes'] / 2**20:,.0f}"
        lines.append(_line(row["critic"], weights, f"{row['seconds']:.2f} s", memory))
    return lines


def sorted_digits(found: Mapping[str, Any]) -> list[str]:
    """Task C: the share of right answers before and after practice."""
    lines = _head(("start", "digits", "method", "steps", "seeds", "sampled", "greedy", "KL (nats)"))
    for name, seeds in found.items():
        if name in ("task", "versions"):
            continue
        for key, method in (("curve", "GRPO"), ("ppo", "PPO")):
            runs = [run for run in seeds.values() if run.get(key)]
            if runs:
                last = [run[key][-1] for run in runs]
                ends = [
                    f"{_spread([run['sft'] for run in runs], kind, 3)} to {_spread(last, kind, 3)}"
                    for kind in ("sampled", "greedy")
                ]
                about = (name, str(runs[0]["digits"]), method, str(last[0]["step"]), str(len(runs)))
                lines.append(_line(*about, *ends, _spread(last, "kl")))
    return lines


def quoted(answers: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What the policies of the first seed say to one prompt."""
    said = next(iter(answers.values()), {})
    return [*_head(("policy", "answer")), *(_line(QUOTED[name], f"`{answer}`") for name, answer in said.items())]


def where(found: Mapping[str, Any]) -> str:
    """The machine, versions, commit and date."""
    seeds = next(iter(found["arms"].values()))
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"Seeds {', '.join(seeds)}. {found['machine']['cpu']}, {versions}, commit {found['commit']}, {found['date']}."
    )


def _first(seeds: Mapping[str, Sequence[Point]]) -> Sequence[Point]:
    return next(iter(seeds.values()), [])


def _at(seeds: Mapping[str, Sequence[Point]], place: int) -> list[Point]:
    """The point at that place of every seed's curve."""
    return [points[place] for points in seeds.values() if -len(points) <= place < len(points)]


def _numbers(points: Sequence[Point]) -> list[str]:
    return [_spread(points, key) for key in ("win_rate", "gold", "proxy", "kl", "distinct", "eos_rate")]


def _spread(points: Sequence[Mapping[str, float]], key: str, digits: int = 2) -> str:
    """The mean over seeds, and the lowest and the highest of them."""
    values = [point[key] for point in points if key in point]
    if not values:
        return "–"
    mean, low, high = (
        f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no minus before a zero
        for value in (sum(values) / len(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(*columns), "|" + "---|" * len(columns)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
