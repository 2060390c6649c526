"""Reports: what they show of a run and of the demonstration, and that it can be read."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from twinhead.engine import curves, milestones, page, pictures, ppo, report
from twinhead.engine.curves import BINS, MANY
from twinhead.engine.pictures import COLOURS, Curves, Level, Line, number, over_optimisation, spread
from twinhead.engine.run import Run

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
CONFIG = {"output_dir": "runs/x", "seed": 0, "device": "auto", "learning_rate": 1e-5, "adam_eps": 1e-5, "model": "m"}
STEPS = 25
HUMP = [  # kl, proxy, gold
    (0.0, -0.24, 0.28), (0.9, 0.87, 1.01), (2.9, 1.65, 1.39), (7.4, 2.33, 1.49), (12.9, 2.8, 1.24), (47.0, 3.83, -2.1),
]  # fmt: skip


def write_log(folder: Path, stage: str, records: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    """A run's folder, as twinhead.engine.run writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"stage": stage, "config": CONFIG | (config or {}), "versions": VERSIONS}]
    lines += [{"step": step, **record} for step, record in enumerate(records, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    timings = [
        {"step": step, "seconds/generate": 0.25, "seconds/update": 0.75, "peak_rss_mb": 700 + step}
        for step in range(1, len(records) + 1)
    ]
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings), encoding="utf-8")
    return folder


def evaluation(share: float, lm_loss: float) -> dict[str, float]:
    """What a checkpoint measures when it has gone `share` of its way."""
    wins = 0.5 + 0.4 * share
    return {
        "win_rate": wins, "win_rate_low": wins - 0.05, "win_rate_high": wins + 0.04, "kl": 9.0 * share,
        "gold": 2.45 + 1.5 * share, "reward": 2.5 * share, "distinct": 1.0 - 0.3 * share, "eos_rate": 0.95,
        "lm_loss": lm_loss, "ppl": 12.0,
    }  # fmt: skip


def fitting(steps: int, held_out: str, value: float) -> list[dict[str, float]]:
    rng = random.Random(0)
    records = [{"loss": 3 + 3 * math.exp(-9 * i / steps) + rng.gauss(0, 0.1), "accuracy": 0.7} for i in range(steps)]
    for record in records[steps // 4 - 1 :: steps // 4]:
        record[held_out] = value
    return records


def tuning(lm_loss: float, steps: int = STEPS, every: int = 5) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        records.append({"objective/score": step / steps, "objective/kl": 9.0 * step / steps, "rollout/distinct": 0.9})
        if step % every == 0:
            found = evaluation(step / steps, 3.95 + (lm_loss - 3.95) * step / steps)
            records[-1] |= {f"eval/{name}": value for name, value in found.items()}
    return records


def demo(
    folder: Path, families: tuple[str, ...] = ("ppo", "ppo_ptx"), quick: bool = False, early: bool = False
) -> Path:
    """The folder that `twinhead demo` leaves, with made-up numbers; `early`: with the runs before PPO."""
    shown, steps, every = ((2, 4), 4, 2) if quick else ((10, 25), STEPS, 5)
    if early:
        write_log(folder / "pretrain", "pretrain", fitting(200, "eval/loss", 3.1))
        write_log(folder / "sft", "sft", fitting(80, "eval/loss", 2.5))
        write_log(folder / "reward", "reward", fitting(40, "eval/micro", 0.79))
    ends = {"ppo": 4.55, "ppo_ptx": 3.15}
    unknown = dict.fromkeys(evaluation(0, 0))
    stages = {
        "pretrain": unknown | {"lm_loss": 3.145, "max_ratio_gap": None},
        "sft": evaluation(0, 3.949) | {"kl": -3.1e-7, "max_ratio_gap": None},
    }
    for family in families:
        write_log(folder / family, "ppo", tuning(ends[family], steps, every))
        for step in shown:
            stages[f"{family}_{step}"] = evaluation(step / steps, ends[family]) | {"max_ratio_gap": 4.2e-6}
    prompts = ["join(paths)", 'a<b>&"c"', "$x_1$"]
    results = {
        "seed": 0, "quick": quick, "python": "3.11.7", "human_gold": 3.84, "reward_accuracy": 0.79,
        "minutes": {"pretrain": 0.6, "ppo": 1.4}, "stages": stages,
    }  # fmt: skip
    samples = {
        "prompts": prompts,
        "human": ["Join paths.", "Über <script>alert('x')</script> & co.", "第三个。"],
        "answers": {stage: [f"Get the {stage} {k}." for k in range(3)] for stage in stages},
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return folder


class Reader(HTMLParser):
    """Reads a page as a strict browser would: every element is closed, in order, and every id stands once."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = demo(tmp_path_factory.mktemp("demo"), early=True)
    report.write_demo(folder)
    return folder


def test_a_run_is_told_whole(tmp_path: Path) -> None:
    records = tuning(4.55)
    records[3]["reward/style"] = 0.5
    folder = write_log(tmp_path / "first", "ppo", records, {"prompts": [{"prompt": "a"}] * 7, "kl_coef": 0.05})
    path = report.write_run(folder)
    read = Reader(path)
    assert path == folder / "report.html"
    assert "25 steps. Versions: python 3.11.7, torch 2.13.0." in read.text
    assert "7 rows" in read.text
    for title in ("Score", "KL from the reference", "Win rate", "Language-model loss"):
        assert title in read.texts
    assert "reward/style" in read.texts  # nobody foresaw this metric
    assert "Peak memory of the process: 725 MB." in read.text
    assert re.search(r"update 18\.8 0\.75 75% generate 6\.25 0\.25 25% together 25\.0 1\.00 100%", read.text)
    assert not [link for link in read.links if not link.startswith("#")]


def test_epochs_have_their_losses_and_perplexity(tmp_path: Path) -> None:
    """The table of an SFT run: training loss over the epoch, held-out loss and PPL at its end."""
    ends = [(1.75, 5.75), (1.52, 4.57), (1.58, 4.86)]
    records = [{"loss": loss} for loss in (1.90, 1.82, 1.74, 1.5, 1.4, 1.45, 1.3, 1.2, 1.13)]
    for record, (loss, ppl) in zip(records[2::3], ends, strict=True):
        record |= {"eval/loss": loss, "eval/ppl": ppl}
    folder = write_log(tmp_path, "sft", records)
    heads, rows = milestones.table(curves.read(folder))
    assert heads == ["step", "epoch", "training loss", "held-out loss", "PPL"]
    assert rows == [
        ["3", "1", "1.82", "1.75", "5.75"],
        ["6", "2", "1.45", "1.52", "4.57"],
        ["9", "3", "1.21", "1.58", "4.86"],
    ]
    assert "step epoch training loss held-out loss PPL 3 1 1.82 1.75 5.75" in Reader(report.write_run(folder)).text


def test_evaluations_of_ppo_are_rows(tmp_path: Path) -> None:
    heads, rows = milestones.table(curves.read(write_log(tmp_path, "ppo", tuning(4.55))))
    assert heads == ["step", "score", "gold", "KL, nats", "win rate", "distinct", "ended", "LM loss", "PPL"]
    assert [row[0] for row in rows] == ["5", "10", "15", "20", "25"]
    assert rows[-1] == ["25", "2.50", "3.95", "9.00", "90% (85% to 94%)", "70%", "95%", "4.55", "12.0"]


def test_a_run_without_evaluations_has_a_few_rows_of_means(tmp_path: Path) -> None:
    """Length, endings and variety are watched also where nobody evaluates."""
    records = [
        {"objective/score": float(i), "objective/kl": 1.0, "rollout/length_mean": 7.0, "rollout/eos_rate": 0.5}
        for i in range(40)
    ]
    records[3]["objective/score"] = None
    heads, rows = milestones.table(curves.read(write_log(tmp_path / "long", "grpo", records)))
    assert heads == ["step", "score", "KL, nats", "length", "ended"]
    assert [row[0] for row in rows] == [str(4 * k) for k in range(1, 11)]
    assert rows[0] == ["4", "1.00", "1.00", "7.00", "50%"]
    assert rows[1][1] == "5.50"
    short = milestones.table(curves.read(write_log(tmp_path / "short", "grpo", records[:3])))[1]
    assert [row[:2] for row in short] == [["1", "0.00"], ["2", "1.00"], ["3", "2.00"]]
    assert milestones.table(curves.read(write_log(tmp_path / "novel", "novel", [{"x": 1.0}]))) == ([], [])
    assert "Milestones" not in Reader(report.write_run(tmp_path / "novel")).text


def test_panels_fit_the_stage(tmp_path: Path) -> None:
    log = curves.read(write_log(tmp_path, "sft", [{"loss": 2.0, "grad_norm": 1.0}, {"loss": 1.5, "eval/loss": 1.8}]))
    titles = [panel.title for entry in curves.PANELS for panel in curves.over_steps(log, *entry)]
    assert titles == ["Loss", "Gradient norm"]
    [loss] = curves.over_steps(log, *curves.PANELS[0])
    assert [(line.label, line.colour) for line in loss.lines] == [("training", "sft"), ("held out", "ink")]


def test_options_with_their_default_stand_below(tmp_path: Path) -> None:
    config = dataclasses.asdict(ppo.Config(model="m", prompts="p.jsonl", steps=1, learning_rate=1e-5, num_slots=8))
    folder = tmp_path / "known"
    folder.mkdir()
    Run(ppo.Config(**config | {"output_dir": str(folder)}), "ppo").log(1, {"loss": 1.0})
    chosen, every = Reader(report.write_run(folder)).text.split("All options")
    chosen = chosen[chosen.index("Options") :]
    assert re.fullmatch(
        r"Options output_dir \S+ learning_rate 1e-05 model m prompts p\.jsonl steps 1 num_slots 8 ", chosen
    )
    assert "adam_eps 1e-05" in every
    assert "reward_functions []" in every


def test_options_of_an_unknown_stage_are_all_shown(tmp_path: Path) -> None:
    read = Reader(report.write_run(write_log(tmp_path, "novel", [{"loss": 1.0}])))
    assert "seed 0 device auto learning_rate 1e-05 adam_eps 1e-05 model m" in read.text
    assert "All options" not in read.text


def test_null_is_a_gap_and_a_dash(tmp_path: Path) -> None:
    records = [{"loss": 3.0, "bad": None}, {"loss": None, "bad": None}, {"loss": 2.0, "bad": None}, {"loss": None}]
    folder = write_log(tmp_path, "sft", records)
    log = curves.read(folder)
    line = log.line("loss", "", "ink")
    assert line is not None
    assert line.x == [1, 2, 3, 4]
    assert [*line.y[::2], *map(math.isnan, line.y[1::2])] == [3.0, 2.0, True, True]
    assert log.line("bad", "", "ink") is None
    assert curves.over_steps(log, "Bad", "", {"bad": ""}) == []
    assert "loss – 4" in Reader(report.write_run(folder)).text


def test_a_long_curve_is_means_inside_their_range(tmp_path: Path) -> None:
    count = BINS * 10
    assert count > MANY
    records = [{"loss": float(step % 10)} for step in range(count)]
    line = curves.read(write_log(tmp_path, "sft", records)).line("loss", "", "ink")
    assert line is not None
    assert line.x == [10 * k + 5.5 for k in range(BINS)]
    assert (set(line.y), set(line.low), set(line.high)) == ({4.5}, {0.0}, {9.0})


@pytest.mark.parametrize("text", [None, "", '{"stage": "sft", "config": {}, "versions": {}}\n{"step": 1, "lo'])
def test_a_folder_without_metrics_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"^expected a run's folder, with at least one step"):
        report.write_run(tmp_path)
    with pytest.raises(ValueError, match=r"expected a demonstration's folder, with results\.json"):
        report.write_demo(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_demonstration_is_one_file_and_its_pictures(shown: Path) -> None:
    read = Reader(shown / "report.html")
    assert not [link for link in read.links if not link.startswith("#")]
    assert read.tags.count("svg") == 3 + 2 + 3 + 2
    drawn = sorted(path.name for path in (shown / "pictures").iterdir())
    assert drawn == ["answers.png", "learning.png", "plain_text.png", "scores.png"]
    assert all((shown / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_the_story_tells_the_numbers(shown: Path) -> None:
    first, second, third = report.story(json.loads((shown / "results.json").read_text()))
    assert "orders 79% of held-out pairs" in first
    assert "After 10 iterations of PPO" in second
    assert "on 66% of held-out prompts" in second
    assert "88% of its answers are different ones, and it is 3.60 nats" in second
    assert "3.15 nats per token after pre-training, 3.95 after SFT, and 4.55 at the end of PPO; with" in third
    assert third.endswith("it was 3.15.")


def test_samples_are_shown_as_they_are(shown: Path) -> None:
    source, read = (shown / "report.html").read_text(encoding="utf-8"), Reader(shown / "report.html")
    assert "script" not in read.tags
    assert "<b>&" not in source
    for text in ('a<b>&"c"', "$x_1$", "Über <script>alert('x')</script> & co.", "第三个。", "Get the ppo_ptx_25 2."):
        assert text in read.texts
    assert "3 of the 3 answers of PPO + mix 25 above begin with “Get the”" in read.text


def test_the_same_stage_has_the_same_colour_everywhere(shown: Path) -> None:
    results = json.loads((shown / "results.json").read_text())
    logs = {name: curves.read(shown / name) for name in ("pretrain", "sft", "reward", "ppo", "ppo_ptx")}
    panels = [panel for picture in report.demo_pictures(results, logs) for panel in picture.panels]
    colours = {line.label: line.colour for panel in panels if isinstance(panel, Curves) for line in panel.lines}
    assert (colours["PPO"], colours["PPO + mix"]) == ("ppo", "ppo_ptx")
    assert [panel.lines[0].colour for panel in panels[:3]] == ["pretrain", "sft", "reward"]
    assert [(name, colour) for name, colour, _ in panels[8].rows][1:3] == [("SFT", "sft"), ("PPO 10", "ppo")]
    source = (shown / "report.html").read_text()
    assert 'style="color: var(--ppo_ptx)">PPO + mix 25</b>' in source


def test_curves_start_at_the_sft_model(shown: Path) -> None:
    results = json.loads((shown / "results.json").read_text())
    scores, answers, plain = report.demo_pictures(results, {"ppo": curves.read(shown / "ppo")})
    gold, wins, loss = scores.panels[1], answers.panels[0], plain.panels[1]
    assert (gold.lines[0].x[0], gold.lines[0].y[0], gold.lines[0].x[-1]) == (0.0, 2.45, 9.0)
    assert [(level.label, level.y) for level in gold.levels] == [("SFT", 2.45), ("human", 3.84)]
    assert (wins.lines[0].x, wins.lines[0].y[0]) == ([0, 5, 10, 15, 20, 25], 0.5)
    assert (wins.lines[0].low[-1], wins.lines[0].high[-1]) == (pytest.approx(0.85), pytest.approx(0.94))
    assert [(level.label, level.y) for level in loss.levels] == [("pre-trained", 3.145), ("SFT", 3.949)]


def test_without_the_mix(tmp_path: Path) -> None:
    read = Reader(report.write_demo(demo(tmp_path, families=("ppo",))))
    assert "PPO + mix" not in read.text
    assert "4.55 at the end of PPO." in read.text


def test_the_quick_form_says_so(tmp_path: Path, shown: Path) -> None:
    read = Reader(report.write_demo(demo(tmp_path, quick=True)))
    assert "The quick form" in read.text
    assert "PPO + mix 4" in read.texts
    assert "After 2 iterations of PPO" in read.text
    assert "The quick form" not in Reader(shown / "report.html").text


def test_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    unknown = {"seed": 0, "human_gold": None, "stages": {"sft": {"gold": None}, "ppo_3": {}}}
    (tmp_path / "results.json").write_text(json.dumps(unknown))
    read = Reader(report.write_demo(tmp_path))
    assert "svg" not in read.tags
    assert "on – of held-out prompts" in read.text
    assert not (tmp_path / "pictures").exists()


def test_the_terminal_shows_the_stages(shown: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(json.loads((shown / "results.json").read_text())))
    lines = {re.split(r"\s{2,}", line.strip())[0]: line.split() for line in console.export_text().splitlines()}
    assert "…" not in str(lines)
    assert lines["pre-trained"][1:] == ["–"] * 7 + ["3.15", "–"]
    assert lines["SFT"][1:6] == "50% 45% 2.45 0.00 0.00".split()
    assert lines["PPO + mix 25"][4:] == "90% 85% 3.95 2.50 9.00 70% 95% 3.15 4.2e−06".split()
    assert lines["human"][1:] == ["3.84"]


def test_the_same_folder_gives_the_same_file(shown: Path) -> None:
    path = shown / "report.html"
    before = path.read_bytes()
    settings = dict(matplotlib.rcParams)
    assert report.write_demo(shown).read_bytes() == before
    assert dict(matplotlib.rcParams) == settings


def texts(figure: Figure) -> Iterator[tuple[str, Any]]:
    """Everything written in a figure, with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        ticks = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
        ticks += [label for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
        for text in [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label, *ticks]:
            if text.get_text():
                yield text.get_text(), text.get_window_extent(canvas.get_renderer())


def test_nothing_is_cut_off_or_written_over(shown: Path) -> None:
    results = json.loads((shown / "results.json").read_text())
    logs = {name: curves.read(shown / name) for name in ("pretrain", "sft", "reward", "ppo", "ppo_ptx")}
    drawn = [pictures.figure(picture.panels) for picture in report.demo_pictures(results, logs)]
    for figure in [*drawn, over_optimisation(points(HUMP), "Weak reward model, no KL penalty, seed 1")]:
        written = list(texts(figure))
        assert len(written) > 10
        for name, box in written:
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
            assert inside, f"{name!r} is cut off"
        for index, (name, box) in enumerate(written):
            for other, its_box in written[index + 1 :]:
                assert not box.shrunk(0.9, 0.8).overlaps(its_box.shrunk(0.9, 0.8)), f"{name!r} lies over {other!r}"


def test_labels_of_equal_ends_are_moved_apart() -> None:
    lines = [Line(x=[0, 1], y=[0, 1.0], label=name) for name in "abc"]
    figure = pictures.figure([Curves("t", "x", "y", lines, [Level(1.0, "level")])])
    boxes = sorted((box for name, box in texts(figure) if name.endswith(" 1.00")), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(low.y1 < high.y0 + 2 for low, high in pairwise(boxes))


def test_spread_keeps_order_and_distance() -> None:
    assert spread([5.0, 0.0, 30.0], 4) == [5.0, 0.0, 30.0]
    assert spread([1.0, 1.0], 10) == [-4.0, 6.0]
    rng = random.Random(0)
    for _ in range(200):
        wanted = [rng.uniform(0, 50) for _ in range(rng.randrange(1, 7))]
        placed = spread(wanted, 7.0)
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        assert all(placed[b] - placed[a] > 7.0 - 1e-9 for a, b in pairwise(order))
        assert sum(placed) == pytest.approx(sum(wanted))  # as a whole they have not moved


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0.00"), (3.949, "3.95"), (-0.1, "−0.10"), (12.345, "12.3"), (1234.5, "1234"), (0.0123, "0.012"),
        (4.2e-6, "4.2e−06"), (1e7, "1.0e+07"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, written: str) -> None:
    assert number(value) == written


def test_names_with_special_characters(tmp_path: Path) -> None:
    name = "score/$a_b$ <i>&"
    folder = write_log(tmp_path, "ppo", [{name: 1.0}, {name: 2.0}], {"note": "<i>&"})
    read = Reader(report.write_run(folder))
    assert read.texts.count(name) == 2  # the title of its panel, and its row in the table
    assert "i" not in read.tags
    assert "<i>&" in read.texts


def points(rows: list[tuple[float, float, float]]) -> list[dict[str, float]]:
    return [
        {"step": step, "kl": kl, "proxy": proxy, "gold": gold, "win_rate": 0.5}
        for step, (kl, proxy, gold) in enumerate(rows)
    ]


def test_over_optimisation_marks_the_interior_maximum() -> None:
    figure = over_optimisation(points(HUMP), "A weak reward model")
    assert isinstance(figure, Figure)
    [axes] = figure.axes
    written = [text.get_text() for text in axes.texts]
    assert written == ["maximum 1.49\nat KL 7.40", "reward model 3.83", "gold judge −2.10"]
    place = axes.transAxes.inverted().transform(axes.transData.transform([(0, 0), (10, 0), (40, 0)]))[:, 0]
    assert place[2] - place[0] == pytest.approx(2 * (place[1] - place[0]))  # four times the KL, twice as far
    assert "nats" in axes.get_xlabel()


def test_over_optimisation_without_a_hump_marks_nothing() -> None:
    rising = [(-0.001, 0.0, 0.0), (1.0, 1.0, 0.5), (4.0, 2.0, 1.0)]
    [axes] = over_optimisation(points(rising), "A good one").axes
    assert [text.get_text() for text in axes.texts] == ["reward model 2.00", "gold judge 1.00"]
    assert axes.lines[0].get_xdata()[0] == 0.0
    with pytest.raises(ValueError, match="expected points with kl, proxy and gold, got 1 without them"):
        over_optimisation([{"step": 0, "kl": None, "proxy": 1.0, "gold": 1.0}], "Empty")


def test_pictures_take_the_colours_of_the_page() -> None:
    drawn = pictures.svg(Curves("t", "x", "y", [Line(x=[0, 1], y=[0, 1], label="a", colour="ppo")]), "here")
    assert "var(--ppo)" in drawn
    assert "var(--ink)" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read_as_text(mode: int) -> None:
    def luminance(colour: str) -> float:
        parts = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for name in COLOURS.keys() - {"paper", "grid"}:
        dark, light = sorted([luminance(COLOURS[name][mode]), luminance(COLOURS["paper"][mode])])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name  # WCAG 2.2, level AA


def test_a_page_escapes_whatever_is_not_markup() -> None:
    bold = page.element("b", "1 < 2", style='"&')
    assert bold == '<b style="&quot;&amp;">1 &lt; 2</b>'
    assert page.bullets(["<i>", bold]) == f"<ul><li>&lt;i&gt;</li>\n<li>{bold}</li></ul>"
    assert page.section("Empty", page.table(("a",), [])) == ""
