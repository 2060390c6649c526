"""The best checkpoint so far by one of the evaluation's numbers, and whether waiting for a better one still pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


class Best:
    """Which step's weights did best. Its attributes are JSON, so that a resumed run goes on comparing."""

    def __init__(self, measure: str, patience: int) -> None:
        self.measure, self.patience = measure, patience
        self.value: float | None = None
        self.step, self.since = 0, 0  # of the best value, and evaluations after it

    def improved(self, step: int, line: Mapping[str, float]) -> bool:
        """Whether a line of metrics sets a record; lines without an evaluation do not count.

        Raises ValueError where the evaluation has no such number. NaN is no record.
        """
        measured = {name: value for name, value in line.items() if name.startswith("eval")}
        if not self.measure or not measured:
            return False
        if self.measure not in measured:
            raise ValueError(f"best_by: expected one of {', '.join(measured)}, got {self.measure!r}")
        value = measured[self.measure]
        if math.isnan(value) or (self.value is not None and value <= self.value):
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        return True

    def settled(self, step: int, line: Mapping[str, float], save: Callable[[], None]) -> bool:
        """Save what sets a record; whether the last `patience` evaluations (0: any number) brought nothing better."""
        if self.improved(step, line):
            save()
        return 0 < self.patience <= self.since
