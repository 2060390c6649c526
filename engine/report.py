"""The report of a run, and of the demonstration: one HTML file that needs nothing else, and a table to print."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from twinhead.engine import curves, milestones, page, pictures
from twinhead.engine.config import RunConfig
from twinhead.engine.curves import FAMILIES, MANY, PANELS, Log, finite, stage
from twinhead.engine.page import Html
from twinhead.engine.pictures import COLOURS, Curves, Dots, Level, Panel, Picture, number

SHARES = ("win_rate", "win_rate_low", "distinct", "eos_rate")
TERMINAL = 9  # columns that fit into a terminal
# Columns of the stages: name in results.json, heading, what it is.
COLUMNS = [
    ("win_rate", "wins", "share of held-out prompts on which the judge prefers the answer to one of the SFT model"),
    ("win_rate_low", "wins ≥", "lower end of its 95% interval (Wilson)"),
    ("gold", "gold", "mean score by the judge, a program that the training never sees"),
    ("reward", "reward", "mean score by the reward model, which PPO maximises"),
    ("kl", "KL", "nats per answer from the SFT model"),
    ("distinct", "distinct", "different answers, as a share of all"),
    ("eos_rate", "ended", "answers that stop by themselves, as a share of all"),
    ("lm_loss", "LM loss", "nats per token of held-out plain text"),
    ("max_ratio_gap", "gap", "largest |ratio − 1| of sampler and trainer before an iteration's first update"),
    ("ppl", "ppl", "perplexity of held-out human docstrings"),
]
# Pictures of the demonstration: file name, heading, caption.
CAPTIONS = [
    (
        "learning",
        "Before PPO",
        "Where a curve has a band, a point is the mean of several steps and the band their range.",
    ),
    (
        "scores",
        "What PPO maximises, and what that stands for",
        "The reward model has learned from rankings by the judge; PPO sees the reward model only. Every point is an "
        "evaluation on held-out prompts; further right, the policy is further away from the SFT model.",
    ),
    (
        "answers",
        "How the answers change",
        "To win is to be scored above the SFT model's answer to the same held-out prompt by the judge; ties count one "
        "half. Bands are Wilson's 95% intervals.",
    ),
    (
        "plain_text",
        "What becomes of the language model",
        "A rise from one stage to the next is called the alignment tax. With the mix (PPO-ptx), every update also "
        "learns from pre-training text.",
    ),
]


def write_run(folder: Path) -> Path:
    """Write folder/report.html: options, learning curves, last values, seconds per phase and peak memory.

    Raises ValueError if the folder holds no metrics.
    """
    log = curves.read(folder)
    if not log.records:
        raise ValueError(f"expected a run's folder, with at least one step in metrics.jsonl, got {folder}")
    names = sorted({name for record in log.records for name in record} - {"step"})
    shown = {name for _, _, metrics in PANELS for name in metrics}
    shown |= {name + bound for name in shown for bound in ("_low", "_high")}
    main = [panel for entry in PANELS for panel in curves.over_steps(log, *entry)]
    rest = [panel for name in names if name not in shown for panel in curves.over_steps(log, name, "", {name: ""})]
    caption = "Every point is the mean of several steps, every band their range." if len(log.records) > MANY else ""
    usual = _defaults(log.config)
    chosen = {name: value for name, value in log.config.items() if name not in usual or value != usual[name]}
    others = {} if chosen == log.config else log.config
    return _write(
        folder,
        f"{stage(log.stage)[0]}: {'/'.join(folder.resolve().parts[-2:])}",
        page.element("p", f"{log.records[-1]['step']} steps.", _versions(log.versions)),
        page.section("Options", _options(chosen), page.details("All options", _options(others))),
        page.section("Milestones", *_milestones(log)),
        page.section(
            "Learning curves",
            _figure("curves", main, caption),
            page.details("All other curves", _figure("others", rest, caption)),
        ),
        page.section("Last values", _last_values(log, names)),
        page.section("Time and memory", *_costs(log)),
    )


def write_demo(folder: Path) -> Path:
    """Write folder/report.html and folder/pictures/*.png of the demonstration whose runs lie in `folder`.

    Runs, numbers and samples that are not there are left out. Raises ValueError without results.json.
    """
    results = _json(folder / "results.json")
    if not results:
        raise ValueError(f"expected a demonstration's folder, with results.json, got {folder}")
    samples = _json(folder / "samples.json")
    logs = {name: log for name in FAMILIES if (log := curves.read(folder / name)).records}
    drawn = demo_pictures(results, logs)
    for picture in drawn:
        pictures.save(picture, folder / "pictures")
    return _write(
        folder,
        "Learning to write docstrings from feedback",
        *(page.element("p", sentence) for sentence in story(results)),
        page.section("The stages", *_stages(results)),
        *(page.section(picture.title, _figure(picture.name, picture.panels, picture.caption)) for picture in drawn),
        page.section("The same held-out prompts, answered by every stage", _cards(samples)),
        page.section("Limits", page.bullets(limits(results, samples))),
        page.section("How it was run", page.element("p", circumstances(results))),
    )


def demo_pictures(results: Mapping[str, Any], logs: Mapping[str, Log]) -> list[Picture]:
    """What the demonstration shows, in reading order; a panel or picture without data is left out."""
    tuned = {family: logs[family] for family in ("ppo", "ppo_ptx") if family in logs}

    def over_steps(name: str, title: str, unit: str, levels: Sequence[Level] = ()) -> list[Curves]:
        start = _result(results, "sft", name)
        lines = [log.line(f"eval/{name}", FAMILIES[family], family, start) for family, log in tuned.items()]
        return curves.panel(title, "PPO iteration", unit, lines, levels)

    def over_kl(name: str, title: str, levels: Sequence[Level] = ()) -> list[Curves]:
        start = _result(results, "sft", name)
        lines = [log.path(f"eval/{name}", FAMILIES[family], family, start) for family, log in tuned.items()]
        levels = [*_level(start, "SFT", "sft"), *levels]
        return curves.panel(title, "KL from the SFT model, nats per answer", "mean score", lines, levels)

    def learning(family: str, title: str, unit: str, name: str, held_out: str) -> list[Curves]:
        metrics = {name: "training", held_out: "held out"}
        return curves.over_steps(logs[family], title, unit, metrics) if family in logs else []

    human = _level(finite(results.get("human_gold")), "human", "ink")
    before = [level for key in ("pretrain", "sft") for level in _level(_result(results, key, "lm_loss"), *stage(key))]
    panels: list[list[Panel]] = [
        [
            *learning("pretrain", "Pre-training: loss", "nats per token", "loss", "eval/loss"),
            *learning("sft", "SFT: loss", "nats per token", "loss", "eval/loss"),
            *learning("reward", "Reward model: accuracy", "share of pairs", "accuracy", "eval/micro"),
        ],
        [*over_kl("reward", "Score by the reward model"), *over_kl("gold", "Score by the judge (gold)", human)],
        [
            *over_steps("win_rate", "Wins against the SFT model", "share of prompts", [Level(0.5, "even")]),
            *over_steps("distinct", "Different answers", "share of answers"),
            *over_steps("eos_rate", "Answers that stop by themselves", "share of answers"),
        ],
        [
            *_loss_by_stage(results),
            *over_steps("lm_loss", "Loss on held-out text, during PPO", "nats per token", before),
        ],
    ]
    return [
        Picture(name, heading, drawn, caption)
        for (name, heading, caption), drawn in zip(CAPTIONS, panels, strict=True)
        if drawn
    ]


def story(results: Mapping[str, Any]) -> list[str]:
    """What happened, in three sentences; an unknown number shows as a dash."""
    stages = results.get("stages", {})
    first = next((key for key in stages if stage(key)[1] == "ppo"), "ppo_0")
    last = {stage(key)[1]: key for key in stages}
    mixed = last.get("ppo_ptx", "")
    value = partial(_cell, results)
    return [
        "A small language model read the documentation of Python's standard library (pre-training), imitated pairs of "
        "a function's signature and its docstring (SFT), and was then trained by PPO to please a reward model, which "
        "had learned from a judge's rankings of answers and orders "
        f"{number(finite(results.get('reward_accuracy')), True)} of held-out pairs as they were ranked.",
        f"After {first.removeprefix('ppo_')} iterations of PPO the judge prefers its answer to the SFT model's on "
        f"{value(first, 'win_rate')} of held-out prompts (50% would be no difference; the 95% interval begins at "
        f"{value(first, 'win_rate_low')}), {value(first, 'distinct')} of its answers are different ones, and it is "
        f"{value(first, 'kl')} nats per answer away from the SFT model.",
        f"The loss on held-out plain text was {value('pretrain', 'lm_loss')} nats per token after pre-training, "
        f"{value('sft', 'lm_loss')} after SFT, and {value(last.get('ppo', ''), 'lm_loss')} at the end of PPO"
        + f"; with pre-training text mixed into every update it was {value(mixed, 'lm_loss')}" * bool(mixed)
        + ".",
    ]


def limits(results: Mapping[str, Any], samples: Mapping[str, Any]) -> list[str]:
    """What the numbers do not say."""
    alike = [
        f"{count} of the {len(answers)} answers of {stage(key)[0]} above begin with “{opening}”"
        for key, answers in samples.get("answers", {}).items()
        if key.startswith("ppo")
        for opening, count in Counter(" ".join(answer.split()[:2]) for answer in answers).most_common(1)
    ]
    return [
        "The model is tiny, and much of its English is broken. The numbers show how the algorithms behave, not how "
        "well docstrings can be written.",
        "The judge is a program, and it can be gamed: when this demonstration was designed, the policy collapsed "
        "towards “Get the …” after about 15 iterations, while its score passed that of human docstrings "
        f"({number(finite(results.get('human_gold')))}). So look at the share of different answers and at the samples, "
        "not at the score alone." + f" In this run, {'; '.join(alike)}." * bool(alike),
        "The mix also sees more pre-training text than plain PPO does: a part of what it gains is just more training.",
        "This is one seed. The intervals are over prompts, not over repetitions of the training.",
    ]


def circumstances(results: Mapping[str, Any]) -> str:
    """Length, seed, versions and minutes, in a few words."""
    minutes = {name: value for name, value in results.get("minutes", {}).items() if value is not None}
    spent = ", ".join(f"{stage(name)[0]} {number(value)}" for name, value in minutes.items())
    quick = "The quick form: fewer steps than the whole demonstration, which show that it works, not what it learns. "
    return (
        quick * bool(results.get("quick"))
        + f"Seed {results.get('seed')}. {_versions({'python': results.get('python'), **results.get('versions', {})})}"
        + f" Minutes: {spent}; {number(sum(minutes.values()))} together." * bool(minutes)
    )


def table(results: Mapping[str, Any]) -> Table:
    """The stages of a demonstration, one row each, for the terminal."""
    heads, rows = _stage_rows(results, TERMINAL)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for index, head in enumerate(heads):
        made.add_column(head, justify="right" if index else "left", no_wrap=True)
    for _, cells in rows:
        made.add_row(*cells)
    return made


def _stage_rows(results: Mapping[str, Any], most: int | None = None) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads, and (colour, cells) of every stage and of human answers; columns without a number are left out."""
    stages = results.get("stages", {})
    columns = [c for c in COLUMNS[:most] if any(math.isfinite(_result(results, key, c[0])) for key in stages)]
    rows = []
    for key in stages:
        label, colour = stage(key)
        rows.append((colour, [label, *(_cell(results, key, name) for name, _, _ in columns)]))
    human = number(finite(results.get("human_gold")))
    rows.append(("ink", ["human", *(human if name == "gold" else "" for name, _, _ in columns)]))
    return ["stage", *(head for _, head, _ in columns)], rows


def _stages(results: Mapping[str, Any]) -> list[Html]:
    heads, rows = _stage_rows(results)
    notes = [f"{head}: {meaning}" for _, head, meaning in COLUMNS if head in heads]
    tinted = [[page.element("b", label, style=f"color: var(--{colour})"), *cells] for colour, (label, *cells) in rows]
    numbers = "The number of a PPO stage is its iteration; mix: every update also learns from pre-training text."
    return [page.table(heads, tinted), page.element("p", f"{numbers} The columns: {'; '.join(notes)}.", class_="notes")]


def _loss_by_stage(results: Mapping[str, Any]) -> list[Dots]:
    rows = [(*stage(key), _result(results, key, "lm_loss")) for key in results.get("stages", {})]
    known = [row for row in rows if math.isfinite(row[2])]
    return [Dots("Loss on held-out text, by stage", "nats per token", known)] if known else []


def _cards(samples: Mapping[str, Any]) -> Html:
    """One card per prompt: how people and every stage answered it."""
    answers = {"human": samples.get("human", []), **samples.get("answers", {})}
    cards = []
    for index, prompt in enumerate(samples.get("prompts", [])):
        rows = [(*stage(key), given[index]) for key, given in answers.items() if index < len(given)]
        tinted = [(page.element("b", label, style=f"color: var(--{colour})"), answer) for label, colour, answer in rows]
        cards.append(page.element("div", page.element("h3", prompt), page.table((), tinted, "words")))
    return page.element("div", *cards, class_="cards")


def _last_values(log: Log, names: Sequence[str]) -> Html:
    last = {name: record for record in log.records for name in names if name in record}
    rows = [[name, number(finite(last[name][name])), str(last[name]["step"])] for name in names]
    return page.table(("metric", "value", "at step"), rows)


def _milestones(log: Log) -> list[Html]:
    heads, rows = milestones.table(log)
    return [page.table(heads, rows), page.element("p", milestones.NOTE, class_="notes")] if rows else []


def _costs(log: Log) -> list[Html]:
    """Where the time went, and the peak of memory."""
    spent: Counter[str] = Counter()
    for record in log.timings:
        spent.update({name.removeprefix("seconds/"): s for name, s in record.items() if name.startswith("seconds/")})
    total, steps = sum(spent.values()), max(len(log.timings), 1)
    phases = [*spent.most_common(), ("together", total)] if total else []
    rows = [[name, number(s), number(s / steps), number(s / total, True)] for name, s in phases]
    peak = max((record.get("peak_rss_mb") or 0 for record in log.timings), default=0)
    memory = f"Peak memory of the process: {peak} MB." if peak else ""
    return [page.table(("phase", "seconds", "seconds per step", "share"), rows), page.element("p", memory)]


def _options(options: Mapping[str, Any]) -> Html:
    return page.table((), [[name, _short(value)] for name, value in options.items()], "words")


def _short(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(row, dict) for row in value):
        return f"{len(value)} rows"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the stage whose options these are; none if its module is not loaded."""
    waiting = RunConfig.__subclasses__()
    for kind in waiting:
        waiting += kind.__subclasses__()
        if {field.name for field in fields(kind)} == config.keys():
            known = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
            return json.loads(json.dumps(known))
    return {}


def _versions(versions: Mapping[str, str | None]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"Versions: {known}." if known else ""


def _level(value: float, label: str, colour: str) -> list[Level]:
    return [Level(value, label, colour)] if math.isfinite(value) else []


def _result(results: Mapping[str, Any], key: str, name: str) -> float:
    return finite(results.get("stages", {}).get(key, {}).get(name))


def _cell(results: Mapping[str, Any], key: str, name: str) -> str:
    value = _result(results, key, name)
    rounded = value if name == "max_ratio_gap" else round(value, 2) + 0.0  # a KL of -3e-7 is 0, and not -0
    return number(value, True) if name in SHARES else number(rounded)


def _figure(name: str, panels: Sequence[Panel], caption: str) -> Html:
    return page.figure([Html(pictures.svg(panel, f"{name}-{index}")) for index, panel in enumerate(panels)], caption)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(folder: Path, title: str, *parts: Html) -> Path:
    path = folder / "report.html"
    path.write_text(page.document(title, COLOURS, *parts), encoding="utf-8")
    return path
