"""The pictures of a report: small multiples of curves and dots, labelled where they end, as PNG files or inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

# A colour belongs to a stage, or to a kind of score, in every picture and table. Each is (on white, on black): Okabe
# and Ito's palette, which colour-blind people can tell apart, darkened or lightened until it can be read as text.
COLOURS = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#646c76", "#9aa3ad"),
    "grid": ("#e3e6ea", "#31363d"),
    "pretrain": ("#7a5c99", "#b79bd6"),
    "sft": ("#0072b2", "#56b4e9"),
    "reward": ("#a8508a", "#de8fbf"),
    "ppo": ("#c85200", "#f0813a"),
    "ppo_ptx": ("#00805e", "#2fc39a"),
    "dpo": ("#4d7300", "#a3c24f"),
    "grpo": ("#b3264a", "#f2849c"),
    "gold": ("#9a6a00", "#e6a817"),
}
WIDTH, HEIGHT = 4.4, 3.0  # inches of one panel
TOP, BOTTOM = 0.62, 0.52  # inches above and below its axes
LINE_HEIGHT = 11.0  # points between two labels
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "svg.hashsalt": "twinhead",  # the same data gives the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": COLOURS["muted"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"][0],
    "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"][0],
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. NaN in `y` is a gap; `low` and `high` bound a band around it."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: str = "ink"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    y: float
    label: str
    colour: str = "muted"


@dataclass(frozen=True)
class Note:
    """A marked point and what it is."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    side: str = "center"  # of the text: center, or left where the point is near the left border


class Panel(Protocol):
    """One small picture with a title of its own."""

    margins: ClassVar[tuple[float, float]]  # inches left and right of its axes

    @property
    def title(self) -> str: ...

    def draw(self, axes: Axes) -> None: ...


@dataclass(frozen=True)
class Curves:
    """Lines over a common x axis, each labelled at its end with its name and last value."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    notes: Sequence[Note] = ()
    share: bool = False  # y lies in 0..1 and reads as a percentage
    root: bool = False  # x is drawn on a square-root scale
    margins: ClassVar[tuple[float, float]] = (0.52, 1.22)  # on the right stand the labels

    def draw(self, axes: Axes) -> None:
        for line in self.lines:
            _draw_line(axes, line)
        for level in self.levels:
            axes.axhline(level.y, color=COLOURS[level.colour][0], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        axes.margins(x=0.02, y=0.1)
        axes.set_xlabel(self.x_label, loc="left")
        axes.set_ylabel(self.y_label, rotation=0, ha="left", va="bottom")
        self._scale(axes)
        for note in self.notes:
            _draw_note(axes, note)
        self._label_ends(axes)

    def _scale(self, axes: Axes) -> None:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if max(map(abs, axes.get_ylim())) >= 0.001:
            plain = ScalarFormatter(useOffset=False)
            plain.set_scientific(False)
            axes.yaxis.set_major_formatter(plain)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", "−")))
        axes.grid(axis="x", visible=False)
        if self.share:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
            axes.set_ylim(0, max(0.01, axes.get_ylim()[1]))
            if axes.get_ylim()[1] > 0.5:
                axes.set_ylim(0, 1.03)
                axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        if self.root:
            far = max((v for line in self.lines for v in line.x if math.isfinite(v)), default=1.0)
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            axes.set_xlim(0, max(far, 0.01) * 1.04)
            axes.xaxis.set_major_locator(FixedLocator(_root_ticks(far)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))

    def _label_ends(self, axes: Axes) -> None:
        """Write every name beside the last point of its line, moved apart where two would overlap."""
        ends = [(y, line.label, line.colour) for line in self.lines for y in _last(line)]
        ends += [(level.y, level.label, level.colour) for level in self.levels]
        points_per_unit = 72 * (HEIGHT - TOP - BOTTOM) / np.ptp(axes.get_ylim())
        wanted = [y * points_per_unit for y, _, _ in ends]
        for (y, label, colour), height, place in zip(ends, wanted, spread(wanted, LINE_HEIGHT), strict=True):
            axes.annotate(
                f"{label} {number(y, self.share)}".strip(), (1, y), (5, place - height), va="center",
                xycoords=axes.get_yaxis_transform(), textcoords="offset points", color=COLOURS[colour][0],
                annotation_clip=False,
            )  # fmt: skip


@dataclass(frozen=True)
class Dots:
    """One value per row, rows from top to bottom, each with its value written beside the dot."""

    title: str
    x_label: str
    rows: Sequence[tuple[str, str, float]]  # (name, colour, value)
    margins: ClassVar[tuple[float, float]] = (1.25, 1.0)  # on the left stand the names

    def draw(self, axes: Axes) -> None:
        heights = range(len(self.rows), 0, -1)
        axes.set_yticks(heights, [name for name, _, _ in self.rows])
        for height, tick, (_, colour, value) in zip(heights, axes.get_yticklabels(), self.rows, strict=True):
            shade = COLOURS[colour][0]
            tick.set_color(shade)
            axes.plot([value], [height], "o", color=shade, markersize=7)
            axes.annotate(number(value), (value, height), (8, 0), textcoords="offset points", color=shade, va="center")
        axes.set_ylim(0.4, len(self.rows) + 0.6)
        axes.margins(x=0.1)
        axes.set_xlabel(self.x_label, loc="left")
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


@dataclass(frozen=True)
class Picture:
    """Panels that belong together, and what to know to read them."""

    name: str  # of its file
    title: str
    panels: Sequence[Panel]
    caption: str = ""


def figure(panels: Sequence[Panel]) -> Figure:
    """All panels in one figure, row by row, three in a row."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    wide, high = WIDTH * columns, HEIGHT * rows
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(wide, high), facecolor=COLOURS["paper"][0])
        for index, panel in enumerate(panels):
            x, y = WIDTH * (index % columns), HEIGHT * (rows - 1 - index // columns)
            before, after = panel.margins
            width, height = WIDTH - before - after, HEIGHT - TOP - BOTTOM
            axes = drawn.add_axes(((x + before) / wide, (y + BOTTOM) / high, width / wide, height / high))
            panel.draw(axes)
            left = (0.08 - before) / width  # title and unit stand flush left above the axes, where they are read first
            axes.set_title(
                panel.title, loc="left", x=left, y=1 + 0.34 / height, pad=0, fontsize=10.5, fontweight="bold"
            )
            axes.yaxis.set_label_coords(left, 1 + 0.13 / height)
    return drawn


def save(picture: Picture, folder: Path) -> Path:
    """Write folder/<name>.png, two pixels per CSS pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture.name}.png"
    with matplotlib.rc_context(STYLE):
        figure(picture.panels).savefig(path, dpi=192)
    return path


def svg(panel: Panel, name: str) -> str:
    """One panel as an <svg> element that takes its colours from the page (variables --ink, --sft, ...).

    `name` keeps its ids apart from those of the page's other pictures.
    """
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure([panel]).savefig(text, format="svg", transparent=True, metadata=metadata)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].strip().replace("xlink:href", "href")
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r' (?:width|height)="[\d.]+pt"| xmlns(?::xlink)?="[^"]*"| version="1.1"', "", drawn)
    for variable, (on_white, _) in COLOURS.items():
        drawn = drawn.replace(on_white, f"var(--{variable})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)


def over_optimisation(points: Sequence[dict[str, float]], title: str) -> Figure:
    """Proxy and gold score against the square root of KL, with gold's interior maximum marked (Gao et al. 2022).

    A point has step, kl (nats), proxy (the reward model that is optimised) and gold (the judge that it stands for).
    """
    kept = sorted((p for p in points if all(_finite(p.get(k)) for k in ("kl", "proxy", "gold"))), key=lambda p: p["kl"])
    if not kept:
        raise ValueError(f"over_optimisation: expected points with kl, proxy and gold, got {len(points)} without them")
    kl = [max(p["kl"], 0.0) for p in kept]  # an estimate: it can fall below 0 by chance
    proxy, gold = ([p[name] for p in kept] for name in ("proxy", "gold"))
    top = max(range(len(kept)), key=gold.__getitem__)
    side = "left" if kl[top] < 0.1 * kl[-1] else "center"
    words = f"maximum {number(gold[top])}\nat KL {number(kl[top])}"
    peak = [Note(x=kl[top], y=gold[top], text=words, colour="gold", side=side)]
    panel = Curves(
        title=title,
        x_label="KL from the start of PPO, nats per answer (square-root scale)",
        y_label="mean score",
        lines=[
            Line(x=kl, y=proxy, label="reward model", colour="reward", dots=True),
            Line(x=kl, y=gold, label="gold judge", colour="gold", dots=True),
        ],
        notes=peak if 0 < top < len(kept) - 1 else [],
        root=True,
    )
    return figure([panel])


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of those wanted and as near to them as equal shifts allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # [sum of (wanted - offset), size]: neighbours that touch share one shift
    for index in order:
        groups.append([wanted[index], 1.0])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] + gap * groups[-2][1] > groups[-1][0] / groups[-1][1]:
            (total, size), (before, count) = groups.pop(), groups.pop()
            groups.append([before + total - size * count * gap, count + size])
    placed = [total / size + k * gap for total, size in groups for k in range(int(size))]
    places = dict(zip(order, placed, strict=True))
    return [places[i] for i in range(len(wanted))]


def number(value: float, share: bool = False) -> str:
    """Two or three significant digits, without an exponent where that is readable; a dash for NaN and infinity."""
    if not math.isfinite(value):
        return "–"
    if share:
        return f"{100 * value:.0f}%"
    size = math.floor(math.log10(abs(value))) if value else 0
    written = f"{value:.{max(0, (2 if size >= 0 else 1) - size)}f}" if -5 < size < 5 else f"{value:.1e}"
    return written.replace("-", "−")


def _draw_line(axes: Axes, line: Line) -> None:
    shade = COLOURS[line.colour][0]
    lonely = sum(map(math.isfinite, line.y)) == 1
    if any(map(math.isfinite, line.low)):
        axes.fill_between(line.x, line.low, line.high, color=shade, alpha=0.16, linewidth=0)
    axes.plot(
        line.x, line.y, color=shade, linewidth=1.8, solid_capstyle="round",
        marker="o" if line.dots or lonely else None, markersize=4, clip_on=False,
    )  # fmt: skip


def _draw_note(axes: Axes, note: Note) -> None:
    """A ring, and its text below it."""
    shade = COLOURS[note.colour][0]
    axes.plot(
        [note.x], [note.y], "o", color=shade, markersize=8, markerfacecolor=COLOURS["paper"][0], markeredgewidth=1.8,
        clip_on=False, zorder=3,
    )  # fmt: skip
    below = axes.get_xaxis_transform()  # x in data, y as a share of the panel: the foot of the panel is free of curves
    stem = {"arrowstyle": "-", "color": shade, "linewidth": 0.8, "shrinkB": 6}
    axes.annotate(
        note.text,
        (note.x, note.y),
        (note.x, 0.03),
        textcoords=below,
        color=shade,
        ha=note.side,
        va="bottom",
        arrowprops=stem,
    )


def _last(line: Line) -> Sequence[float]:
    """The last value of a line, or none."""
    return [y for y in line.y if math.isfinite(y)][-1:]


def _root_ticks(far: float) -> list[float]:
    """At most seven squares of round numbers in 0..far: evenly spaced on a square-root scale."""
    steps = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    step = next((s for s in steps if math.sqrt(far) / s < 7), steps[-1])
    return [round((k * step) ** 2, 4) for k in range(int(math.sqrt(far) / step) + 1)]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
