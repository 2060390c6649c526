"""Numbers of a run: sums that stay on the device until asked for, and the JSONL file that is the truth about them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinhead.engine import ranks

KEPT = ("_max", "_gap")


class Sums:
    """Running sums of statistics over micro-batches, minibatches and ranks; nothing leaves the device before take().

    Names that end in "_max" or "_gap" keep their maximum instead.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], whole: bool = False) -> None:
        """Add one more share of every statistic; `whole`: it is that of all ranks, each of which adds it here."""
        for name, value in values.items() if not whole or ranks.rank() == 0 else ():
            share = torch.as_tensor(value, dtype=torch.float64).detach()
            if name not in self._totals:
                self._totals[name] = share
            elif name.endswith(KEPT):
                self._totals[name] = torch.maximum(self._totals[name], share)
            else:
                self._totals[name] = self._totals[name] + share

    def take(self, count: int = 1, prefix: str = "") -> dict[str, float]:
        """The sums over all ranks divided by `count`, and the maxima as they are, in one transfer."""
        found, *others = ranks.gathered(self._values())
        if others:
            together = Sums()
            for share in (found, *others):
                together.add(share)
            found = together._values()
        return {prefix + name: value if name.endswith(KEPT) else value / count for name, value in found.items()}

    def _values(self) -> dict[str, float]:
        names = list(self._totals)
        values = torch.stack([self._totals[n] for n in names]).tolist() if names else []
        return dict(zip(names, values, strict=True))


class JsonLines:
    """Append-only records, one JSON object per line, each on disk before the next step begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({k: _plain(v) for k, v in record.items()}, ensure_ascii=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error}") from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records that were written whole: a line cut by a crash is not one."""
        if self.path.exists():
            *whole, _ = self.path.read_bytes().split(b"\n")
            yield from map(json.loads, whole)

    def keep_until(self, step: int) -> None:
        """Forget every record after `step`: a resumed run writes them again."""
        kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in self if r.get("step", 0) <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(self.path)


def _plain(value: Any) -> Any:
    """Strict JSON has no NaN and no infinity: both become null."""
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
