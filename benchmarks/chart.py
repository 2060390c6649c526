"""The pictures of the kernels: one per operation, one panel per case, everybody's time on one scale with the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.contender import OURS
from benchmarks.kernels import duration
from twinhead.engine.pictures import COLOURS, LINE_HEIGHT, Picture, save

OUR_SHADE, PEER_SHADE, LIMIT_SHADE = COLOURS["ppo"][0], COLOURS["ink"][0], COLOURS["muted"][0]


@dataclass(frozen=True)
class Timings:
    """One case: a dot per provider, the fastest on top, a line from quartile to quartile, and the limit."""

    title: str
    case: str
    limit: tuple[str, float]  # name, milliseconds
    rows: Sequence[dict[str, Any]]
    margins: ClassVar[tuple[float, float]] = (1.6, 1.25)  # names on the left, times and memory on the right

    def draw(self, axes: Axes) -> None:
        rows = sorted(self.rows, key=lambda row: row["milliseconds"])
        heights = range(len(rows), 0, -1)
        axes.set_xscale("log")
        axes.set_yticks(heights, [row["provider"] for row in rows])
        for height, tick, row in zip(heights, axes.get_yticklabels(), rows, strict=True):
            ours = row["provider"] in OURS.values()
            shade = OUR_SHADE if ours else PEER_SHADE
            tick.set(color=shade, fontweight="bold" if ours else "normal")
            axes.plot(
                row["quartiles"], [height, height], color=shade, linewidth=2.4, alpha=0.45, solid_capstyle="round"
            )
            axes.plot([row["milliseconds"]], [height], "o", color=shade, markersize=5.5)
            axes.annotate(
                _written(row), (1, height), (6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                color=shade, va="center", annotation_clip=False,
            )  # fmt: skip
        self._draw_limit(axes)
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.set_ylabel(self.case, rotation=0, ha="left", va="bottom")
        self._scale(axes)

    def _draw_limit(self, axes: Axes) -> None:
        name, at = self.limit
        axes.axvline(at, color=LIMIT_SHADE, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        axes.annotate(
            f"dashed: the limit, {name}, {duration(at)}", (0, 0), (-110, -LINE_HEIGHT - 16), xycoords="axes fraction",
            textcoords="offset points", color=LIMIT_SHADE, va="center", annotation_clip=False,
        )  # fmt: skip

    def _scale(self, axes: Axes) -> None:
        times = [self.limit[1], *(value for row in self.rows for value in row["quartiles"])]
        low, high = min(times) / 1.3, max(times) * 1.3
        axes.set_xlim(low, high)
        ticks = [t for t in _round_numbers(1) if low <= t <= high]
        if len(ticks) < 2:
            ticks = [t for t in _round_numbers(1, 2, 5) if low <= t <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 3)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: _round(t)))
        axes.grid(axis="y", visible=False)


def main(found: dict[str, Any], results: Path) -> list[Path]:
    """Write `kernels_<device>_<op>.png` for every operation that was timed."""
    panels: dict[str, list[Timings]] = {}
    for case in found["cases"]:
        rows = [row for row in case["rows"] if "milliseconds" in row]
        if rows:
            limit = (case["limit"]["name"], case["limit"]["milliseconds"])
            panels.setdefault(case["op"], []).append(Timings(case["op"], case["title"], limit, rows))
    device = found["device"]
    return [save(Picture(f"kernels_{device}_{op}", op, parts), results) for op, parts in panels.items()]


def _written(row: dict[str, Any]) -> str:
    memory = row["peak_bytes"]
    return duration(row["milliseconds"]) + ("" if memory is None else f" · {memory / 2**20:,.0f} MiB")


def _round_numbers(*first: int) -> list[float]:
    return [digit * 10.0**power for power in range(-5, 7) for digit in first]


def _round(milliseconds: float) -> str:
    value, unit = (milliseconds / 1e3, "s") if milliseconds >= 1e3 else (milliseconds, "ms")
    return f"{value:g} {unit}" if milliseconds >= 1 else f"{1e3 * milliseconds:g} µs"
