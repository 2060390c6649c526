"""Milestones: a run as the table that papers print, with a row for every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from twinhead.engine.curves import Log, finite
from twinhead.engine.pictures import number

ROWS = 10  # of a run that never evaluated
IN_EPOCHS = ("pretrain", "sft", "reward", "dpo")  # stages that evaluate where an epoch ends
SHARES = ("accuracy", "held-out accuracy", "win rate", "distinct", "ended")
# Heading -> metrics, the first of which that a run has logged is shown.
COLUMNS: dict[str, tuple[str, ...]] = {
    "training loss": ("loss",),
    "held-out loss": ("eval/loss",),
    "accuracy": ("accuracy",),
    "held-out accuracy": ("eval/micro", "eval/accuracy"),
    "score": ("eval/reward", "objective/score"),
    "gold": ("eval/gold",),
    "KL, nats": ("eval/kl", "objective/kl"),
    "win rate": ("eval/win_rate",),
    "distinct": ("eval/distinct", "rollout/distinct"),
    "length": ("eval/length", "rollout/length_mean"),
    "ended": ("eval/eos_rate", "rollout/eos_rate"),
    "LM loss": ("eval/lm_loss",),
    "PPL": ("eval/ppl",),
}
NOTE = "What is not an evaluation is a mean over the steps since the row above."


def table(log: Log) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: one for every evaluation, or where there is none, ROWS of them evenly spaced; none of no column.

    An evaluation is shown as it was, everything else as its mean over the steps since the row above.
    """
    logged = {name for record in log.records for name in record}
    columns = {head: next((n for n in names if n in logged), "") for head, names in COLUMNS.items()}
    columns = {head: name for head, name in columns.items() if name}
    if not columns:
        return [], []
    ends = [i for i, record in enumerate(log.records) if any(name.startswith("eval/") for name in record)]
    evaluated = bool(ends)
    ends = ends or sorted({len(log.records) * (k + 1) // ROWS - 1 for k in range(ROWS)} - {-1})
    in_epochs = evaluated and log.stage in IN_EPOCHS
    rows = []
    for count, end in enumerate(ends, 1):
        since = log.records[ends[count - 2] + 1 if count > 1 else 0 : end + 1]
        cells = [_cell(head, name, since) for head, name in columns.items()]
        rows.append([str(log.records[end]["step"]), *([str(count)] if in_epochs else []), *cells])
    return ["step", *(["epoch"] if in_epochs else []), *columns], rows


def _cell(head: str, name: str, since: Sequence[Mapping[str, Any]]) -> str:
    share = head in SHARES
    if not name.startswith("eval/"):
        known = [value for record in since if math.isfinite(value := finite(record.get(name)))]
        return number(fmean(known) if known else math.nan, share)
    last = since[-1]
    low, high = (finite(last.get(name + bound)) for bound in ("_low", "_high"))
    interval = f" ({number(low, share)} to {number(high, share)})" if math.isfinite(low + high) else ""
    return number(finite(last.get(name)), share) + interval
