"""The pictures of the comparison: every seed as a line or a dot, and their mean as a thicker line where x is shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from benchmarks.arms import CRITICS, METHODS, MITIGATIONS, SWEEP, UNBOUND, Arm, Point
from twinhead.engine.pictures import BOTTOM, COLOURS, HEIGHT, LINE_HEIGHT, TOP, Picture, save, spread

Found = dict[str, dict[str, list[Point]]]  # arm -> seed -> points
KL = "KL from the SFT model, nats per answer (square-root scale)"
METHOD_COLOURS = ("ppo", "grpo", "dpo", "sft")
CRITIC_COLOURS = ("ppo", "sft", "ppo_ptx", "grpo", "pretrain")


@dataclass(frozen=True)
class Bundle:
    """What the seeds of one arm have in common: a name, a colour, and a curve each."""

    label: str
    colour: str
    seeds: Sequence[Sequence[tuple[float, float]]]  # of each its (x, y)

    @property
    def mean(self) -> list[tuple[float, float]]:
        """Over the seeds at every x; none where they differ in x, as policies do in how far they went."""
        at = {tuple(x for x, _ in points) for points in self.seeds}
        return [tuple(np.mean(points, axis=0)) for points in zip(*self.seeds, strict=True)] if len(at) == 1 else []

    @property
    def end(self) -> float:
        """The mean over seeds of the last y."""
        return float(np.mean([points[-1][1] for points in self.seeds]))


@dataclass(frozen=True)
class Paths:
    """Bundles of curves over one axis, each labelled where its mean ends."""

    title: str
    x_label: str
    y_label: str
    bundles: Sequence[Bundle]
    root: bool = False  # x is drawn on a square-root scale
    ticks: Sequence[str] = ()  # names of x = 0, 1, ..., for what is no quantity
    limits: tuple[float, float] | None = None  # of y; None: what is drawn
    dots: bool = False
    margins: ClassVar[tuple[float, float]] = (0.52, 1.22)
    level: float | None = field(default=None)  # a dashed line to compare with

    def draw(self, axes: Axes) -> None:
        """Draw all bundles, then scales and labels."""
        for bundle in self.bundles:
            shade = COLOURS[bundle.colour][0]
            mean, marker = bundle.mean, "o" if self.dots else None
            width, alpha = (0.8, 0.45) if mean else (1.3, 0.8)
            for points in bundle.seeds:
                x, y = zip(*points, strict=True)
                axes.plot(
                    x, y, color=shade, linewidth=width, alpha=alpha, marker=None if mean else marker, markersize=2.5
                )
            if mean:
                x, y = zip(*mean, strict=True)
                axes.plot(
                    x, y, color=shade, linewidth=2.0, marker=marker, markersize=4, solid_capstyle="round", zorder=2.5
                )
        if self.level is not None:
            axes.axhline(self.level, color=COLOURS["muted"][0], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
        axes.margins(x=0.03, y=0.08)
        if self.limits is not None:
            axes.set_ylim(*self.limits)
        axes.set_xlabel(self.x_label, loc="left")
        axes.set_ylabel(self.y_label, rotation=0, ha="left", va="bottom")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.grid(axis="x", visible=False)
        self._scale(axes)
        self._label(axes)

    def _scale(self, axes: Axes) -> None:
        if self.ticks:
            axes.xaxis.set_major_locator(FixedLocator(range(len(self.ticks))))
            axes.set_xticklabels(self.ticks)
        elif self.root:
            far = max(x for bundle in self.bundles for points in bundle.seeds for x, _ in points)
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
            axes.set_xlim(0, far * 1.04)
            step = next(s for s in (0.25, 0.5, 1, 2, 5, 10) if np.sqrt(far) / s < 7)
            axes.xaxis.set_major_locator(FixedLocator([(k * step) ** 2 for k in range(int(np.sqrt(far) / step) + 1)]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    def _label(self, axes: Axes) -> None:
        low, high = axes.get_ylim()
        per_unit = 72 * (HEIGHT - TOP - BOTTOM) / (high - low)
        ends = [(min(max(bundle.end, low), high), bundle) for bundle in self.bundles]
        wanted = [y * per_unit for y, _ in ends]
        for (y, bundle), height, place in zip(ends, wanted, spread(wanted, LINE_HEIGHT), strict=True):
            axes.annotate(
                bundle.label, (1, y), (5, place - height), va="center", xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", color=COLOURS[bundle.colour][0], annotation_clip=False,
            )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """One row per arm: a ring per seed at its best, a dot at its end."""

    title: str
    x_label: str
    rows: Sequence[tuple[str, Sequence[float], Sequence[float]]]  # name, best of every seed, end of every seed
    margins: ClassVar[tuple[float, float]] = (1.75, 0.2)

    def draw(self, axes: Axes) -> None:
        """Draw the rows from top to bottom."""
        heights = range(len(self.rows), 0, -1)
        axes.set_yticks(heights, [name for name, _, _ in self.rows])
        shade, best = COLOURS["gold"][0], COLOURS["muted"][0]
        for height, (_, highest, last) in zip(heights, self.rows, strict=True):
            axes.plot(highest, [height] * len(highest), "o", color=best, markerfacecolor="none", markersize=6)
            axes.plot(last, [height] * len(last), "o", color=shade, markersize=5, alpha=0.85)
        axes.set_ylim(0.4, len(self.rows) + 0.6)
        axes.set_xlabel(self.x_label, loc="left")
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", visible=False)


def main(found: Found, results: Path) -> list[Path]:
    """Draw what there is into `results`; the files' paths."""
    pictures = [frontier(found), over_optimisation(found), sweep(found), mitigations(found), critics(found)]
    return [save(picture, results) for picture in pictures if picture.panels]


def frontier(found: Found) -> Picture:
    """Gold against KL, all methods in one panel, one panel per reward model."""
    panels = []
    for title, arms in (("Trusted reward model", METHODS), ("Hackable reward model, unbound", UNBOUND)):
        bundles = _bundles(found, arms, "kl", "gold", METHOD_COLOURS)
        if bundles:
            panels.append(Paths(title, KL, "mean gold score, at most 4.5", bundles, root=True))
    return Picture("comparison_frontier", "What a nat buys", panels)


def over_optimisation(found: Found) -> Picture:
    """Proxy and gold against KL on the hackable reward model, one panel per method, all on one scale."""
    shown = {name: arm for name, arm in UNBOUND.items() if found.get(name)}
    scores = [p[key] for name in shown for points in found[name].values() for p in points for key in ("gold", "proxy")]
    panels = []
    for name, arm in shown.items():
        one = {name: arm}
        bundles = [*_bundles(found, one, "kl", "proxy", ("reward",)), *_bundles(found, one, "kl", "gold", ("gold",))]
        named = [
            Bundle(label, bundle.colour, bundle.seeds)
            for label, bundle in zip(("reward model", "gold judge"), bundles, strict=True)
        ]
        limits = (min(scores) - 0.3, max(scores) + 0.3)
        panels.append(Paths(arm.title, KL, "mean score", named, root=True, limits=limits, dots=True))
    return Picture("comparison_over_optimisation", "Over-optimisation", panels)


def alike(found: Found, arms: Iterable[str]) -> Found:
    """The measured ones of these arms, with the seeds that all of them have: rows that can be compared."""
    shown = [name for name in arms if found.get(name)]
    seeds = set.intersection(*({*found[name]} for name in shown)) if shown else set()
    return {name: {seed: found[name][seed] for seed in sorted(seeds)} for name in shown}


def sweep(found: Found) -> Picture:
    """Gold and proxy at the end against the coefficient, and how far the policy went."""
    shown = alike(found, SWEEP)
    panels = []
    if shown:
        ticks = [SWEEP[name].title for name in shown]
        scores = [
            _ends(shown, "proxy", "reward model", "reward"),
            _ends(shown, "gold", "gold judge", "gold"),
        ]
        kl = [_ends(shown, "kl", "KL", "ink")]
        panels = [
            Paths("Scores at the end", "kl_coef", "mean score", scores, ticks=ticks, dots=True, level=0.0),
            Paths("KL at the end", "kl_coef", "nats per answer", kl, ticks=ticks, dots=True),
        ]
    return Picture("comparison_kl_sweep", "KL sweep", panels)


def mitigations(found: Found) -> Picture:
    """Gold at its best and at the end for everything that is said to help."""
    rows = []
    for name, seeds in alike(found, MITIGATIONS).items():
        golds = [[p["gold"] for p in points] for points in seeds.values()]
        rows.append((MITIGATIONS[name].title, [max(gold) for gold in golds], [gold[-1] for gold in golds]))
    told = "gold: dots at the end, rings at the best"
    return Picture("comparison_mitigations", "Mitigations", [Rows("Hackable reward model", told, rows)] if rows else [])


def critics(found: Found) -> Picture:
    """What each arrangement's policy earns, and how much of the returns its critic foresees."""
    gold = _bundles(found, CRITICS, "step", "gold", CRITIC_COLOURS)
    seen = _bundles(found, CRITICS, "step", "explained_variance", CRITIC_COLOURS)
    panels = []
    if gold:
        panels = [
            Paths("Gold score", "PPO step", "mean, at most 4.5", gold),
            Paths("Explained variance", "PPO step", "of returns, 1 is all", seen, level=0.0),
        ]
    return Picture("comparison_critics", "Critics", panels)


def _bundles(found: Found, arms: dict[str, Arm], x: str, y: str, colours: Sequence[str]) -> list[Bundle]:
    bundles = []
    for (name, arm), colour in zip(arms.items(), colours, strict=False):
        curves = [
            [(max(p[x], 0.0), p[y]) for p in points if x in p and y in p] for points in found.get(name, {}).values()
        ]
        if any(curves):
            bundles.append(Bundle(arm.title.partition(",")[0], colour, [curve for curve in curves if curve]))
    return bundles


def _ends(shown: Found, key: str, label: str, colour: str) -> Bundle:
    """The last value of every arm, arm by arm, as one curve per seed."""
    seeds = next(iter(shown.values()))
    curves = [[(float(i), points[seed][-1][key]) for i, points in enumerate(shown.values())] for seed in seeds]
    return Bundle(label, colour, curves)
