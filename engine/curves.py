"""The curves of a run: what its log says, as panels that can be drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from twinhead.engine.metrics import JsonLines
from twinhead.engine.pictures import Curves, Level, Line

MANY, BINS = 150, 60  # a curve of more than MANY points is drawn as the means of BINS equal parts
FAMILIES = {
    "pretrain": "pre-trained",
    "sft": "SFT",
    "reward": "reward model",
    "dpo": "DPO",
    "grpo": "GRPO",
    "ppo": "PPO",
    "ppo_ptx": "PPO + mix",
}

# Panels of a run, in reading order: title, unit (a "share" is shown in percent), metrics and the labels of their lines.
PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Loss", "nats", {"loss": "training", "eval/loss": "held out"}),
    (
        "Accuracy on preferences",
        "share of pairs",
        {"accuracy": "training", "eval/micro": "held out", "eval/accuracy": "held out"},
    ),
    ("Score", "mean per response", {"objective/score": "score", "objective/rlhf_reward": "less KL cost"}),
    ("KL from the reference", "nats per response", {"objective/kl": "KL"}),
    ("Win rate", "share of prompts", {"eval/win_rate": "win rate"}),
    ("Gold score", "mean per response", {"eval/gold": "gold"}),
    ("Variety and endings", "share of responses", {"rollout/distinct": "distinct", "rollout/eos_rate": "ended"}),
    ("Length of responses", "tokens", {"rollout/length_mean": "mean"}),
    ("Language-model loss", "nats per token", {"policy/ptx_loss": "mix", "eval/lm_loss": "held out"}),
    ("Entropy", "nats per token", {"policy/entropy": "entropy"}),
    ("Critic's explained variance", "1: all variance of the returns", {"value/explained_variance": "explained"}),
    ("Clipped tokens", "share of tokens", {"policy/clipfrac": "policy", "policy/vf_clipfrac": "value"}),
    ("KL of a step's updates", "nats per token", {"policy/approx_kl_k3": "KL"}),
    ("Sampler against trainer", "largest |ratio − 1|", {"policy/first_ratio_gap": "gap"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm", "policy/grad_norm": "norm"}),
    ("Learning rate", "per update", {"learning_rate": "rate", "policy/learning_rate": "rate"}),
]


@dataclass(frozen=True)
class Log:
    """What a run's folder says about the run."""

    stage: str
    config: dict[str, Any]
    versions: dict[str, str]
    records: list[dict[str, Any]]
    timings: list[dict[str, Any]]

    def line(self, name: str, label: str, colour: str, start: float = math.nan) -> Line | None:
        """A metric over steps, a gap where it was not finite; None where it never was. `start`: its value at step 0.

        Metrics <name>_low and <name>_high, where they are, bound a band around it.
        """
        rows = [record for record in self.records if name in record]
        x = [float(row["step"]) for row in rows]
        y, low, high = ([finite(row.get(name + bound)) for row in rows] for bound in ("", "_low", "_high"))
        if not any(map(math.isfinite, y)):
            return None
        line = Line(x=x, y=y, low=low, high=high, label=label, colour=colour, dots=len(x) <= BINS // 2)
        if len(x) > MANY:
            return _binned(line)
        if math.isfinite(start):
            return replace(line, x=[0.0, *x], y=[start, *y], low=[math.nan, *low], high=[math.nan, *high])
        return line

    def path(self, name: str, label: str, colour: str, start: float = math.nan) -> Line | None:
        """A metric over the KL of the same evaluation, in the order of training. `start`: its value at KL 0."""
        pairs = [(0.0, start), *((finite(r.get("eval/kl")), finite(r.get(name))) for r in self.records)]
        known = [(max(kl, 0.0), value) for kl, value in pairs if math.isfinite(kl) and math.isfinite(value)]
        x, y = [kl for kl, _ in known], [value for _, value in known]
        return Line(x=x, y=y, label=label, colour=colour, dots=True) if known else None


def read(folder: Path) -> Log:
    """The log of a run; without records where the folder holds none."""
    first, *records = [*JsonLines(folder / "metrics.jsonl")] or [{}]
    timings = [*JsonLines(folder / "timings.jsonl")]
    return Log(first.get("stage", "run"), first.get("config", {}), first.get("versions", {}), records, timings)


def finite(value: Any) -> float:
    """The number that was logged; NaN for null (which is how a log writes NaN) and for what is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def stage(key: str) -> tuple[str, str]:
    """A stage's name for people, and its colour: ppo_ptx_25 is "PPO + mix 25" in the colour ppo_ptx."""
    family = re.sub(r"_\d+$", "", key)
    iteration = key.removeprefix(family).replace("_", " ")
    return FAMILIES.get(family, family.replace("_", " ")) + iteration, family if family in FAMILIES else "ink"


def over_steps(log: Log, title: str, unit: str, metrics: Mapping[str, str]) -> list[Curves]:
    """A panel with those of `metrics` (name -> label) that a run has logged; none if it has logged none."""
    colour = stage(log.stage)[1]
    lines = [line for metric in metrics.items() if (line := log.line(*metric, colour))]
    return panel(title, "step", unit, [replace(line, colour="ink") if k else line for k, line in enumerate(lines)])


def panel(
    title: str, x_label: str, unit: str, lines: Sequence[Line | None], levels: Sequence[Level] = ()
) -> list[Curves]:
    """A panel of the lines that there are; none if there are none."""
    kept = [line for line in lines if line is not None]
    return [Curves(title, x_label, unit, kept, levels, share=unit.startswith("share"))] if kept else []


def _binned(line: Line) -> Line:
    """Means of equal parts of a long line, inside a band of their ranges."""
    parts = [slice(k * len(line.x) // BINS, (k + 1) * len(line.x) // BINS) for k in range(BINS)]
    values = [[value for value in line.y[part] if math.isfinite(value)] or [math.nan] for part in parts]
    x, y = [fmean(line.x[part]) for part in parts], [fmean(part) for part in values]
    return replace(line, x=x, y=y, low=[min(part) for part in values], high=[max(part) for part in values])
