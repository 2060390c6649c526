"""The report of a run, and of the demonstration: one HTML file that needs nothing else, and a table for the terminal."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from twinhead.engine import page, pictures
from twinhead.engine.config import RunConfig
from twinhead.engine.metrics import JsonLines
from twinhead.engine.page import Html
from twinhead.engine.pictures import COLOURS, Curves, Dots, Level, Line, Note, Picture, number, over_optimisation

__all__ = ["over_optimisation", "table", "write_demo", "write_run"]

MANY, BINS = 150, 60  # a curve of more than MANY points is drawn as the means of BINS equal parts
FAMILIES = {"pretrain": "pre-trained", "sft": "SFT", "reward": "reward model", "ppo": "PPO", "ppo_ptx": "PPO + mix"}
LEARNT = ("training", "held out")
SHARES = ("win_rate", "win_rate_low", "distinct", "eos_rate")
LISTED = ("seed", "learning_rate")  # options that are listed even where they have the default that all stages share

# Panels of a run, in reading order: title, unit (a "share" is shown in percent), metrics and the labels of their lines.
PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Loss", "nats", {"loss": "training", "eval/loss": "held out"}),
    ("Accuracy of the reward model", "share of pairs", {"accuracy": "training", "eval/micro": "held out"}),
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
# Columns of the stages: name in results.json, heading, what it is.
COLUMNS = [
    ("win_rate", "win rate", "share of held-out prompts on which the judge prefers the answer to one of the SFT model"),
    ("win_rate_low", "at least", "lower end of Wilson's 95% interval of the win rate"),
    ("gold", "gold", "mean score by the judge, a program that the training never sees"),
    ("reward", "reward", "mean score by the reward model, which PPO maximises"),
    ("kl", "KL", "nats per answer from the SFT model"),
    ("distinct", "distinct", "share of answers that differ from all others"),
    ("eos_rate", "ended", "share of answers that stop by themselves"),
    ("lm_loss", "LM loss", "nats per token of held-out plain text"),
    ("ppl", "ppl", "held-out perplexity"),
    ("max_ratio_gap", "gap", "largest |ratio − 1| of sampler and trainer at a first update"),
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
        """A metric over steps, with gaps where it was not finite; None where it never was. `start`: its value at step 0.

        Metrics <name>_low and <name>_high, where they are, bound a band around it.
        """
        rows = [r for r in self.records if name in r]
        x = [float(r["step"]) for r in rows]
        y, low, high = ([_number(r.get(name + bound)) for r in rows] for bound in ("", "_low", "_high"))
        if not any(map(math.isfinite, y)):
            return None
        if len(x) > MANY:
            bins = [slice(k * len(x) // BINS, (k + 1) * len(x) // BINS) for k in range(BINS)]
            known = [[value for value in y[span] if math.isfinite(value)] or [math.nan] for span in bins]
            x, y, low, high = [fmean(x[span]) for span in bins], [*map(fmean, known)], [*map(min, known)], [*map(max, known)]
        if math.isfinite(start):
            x, y, low, high = [0.0, *x], [start, *y], [math.nan, *low], [math.nan, *high]
        return Line(x=x, y=y, label=label, colour=colour, low=low, high=high, dots=len(x) <= BINS // 2)


def read(folder: Path) -> Log:
    """The log of a run; without records where the folder holds none."""
    first, *records = [*JsonLines(folder / "metrics.jsonl")] or [{}]
    timings = [*JsonLines(folder / "timings.jsonl")]
    return Log(first.get("stage", "run"), first.get("config", {}), first.get("versions", {}), records, timings)


def write_run(folder: Path) -> Path:
    """Write folder/report.html: options, learning curves, last values, seconds per phase and peak memory.

    Raises ValueError if the folder holds no metrics.
    """
    log = read(folder)
    if not log.records:
        raise ValueError(f"report: expected a run's folder, with at least one step in metrics.jsonl, got {folder}")
    seen = {name for record in log.records for name in record} - {"step"}
    main = {name: label for _, _, metrics in PANELS for name, label in metrics.items()}
    rest = sorted(n for n in seen if n not in main and n.removesuffix("_low").removesuffix("_high") not in main)
    binned = "Every point is the mean of several steps, every band their range." if len(log.records) > MANY else ""
    chosen = {name: value for name, value in log.config.items() if not _is_shared_default(name, value)}
    return _write(
        folder,
        f"{_stage(log.stage)[0]}: {folder.resolve().name}",
        page.element("p", f"{log.records[-1]['step']} steps. {_versions(log.versions)}"),
        page.section("Options", _words(chosen), page.details("All options", _words(log.config))),
        page.section(
            "Learning curves",
            _figure(Picture("curves", "", [panel for entry in PANELS for panel in curves(log, *entry)], binned)),
            page.details(
                "All other curves",
                _figure(Picture("others", "", [panel for n in rest for panel in curves(log, n, "", {n: ""})], binned)),
            ),
        ),
        page.section("Last values", _last_values(log, sorted(seen))),
        page.section("Time and memory", *_costs(log)),
    )


def curves(log: Log, title: str, unit: str, metrics: Mapping[str, str]) -> list[Curves]:
    """A panel with those of these metrics that the run logged, or none."""
    shades = [_stage(log.stage)[1], *["ink"] * len(metrics)]
    return _panel(title, "step", unit, [log.line(*item, shade) for item, shade in zip(metrics.items(), shades)])


def write_demo(folder: Path) -> Path:
    """Write folder/report.html and folder/pictures/*.png of the demonstration whose runs lie in `folder`.

    Runs, numbers and samples that are not there are left out. Raises ValueError without results.json.
    """
    results = _json(folder / "results.json")
    if not results:
        raise ValueError(f"report: expected a demonstration's folder, with results.json, got {folder}")
    samples = _json(folder / "samples.json")
    logs = {name: log for name in FAMILIES if (log := read(folder / name)).records}
    drawn = [picture for picture in demo_pictures(results, logs) if picture.panels]
    for picture in drawn:
        pictures.save(picture, folder / "pictures")
    return _write(
        folder,
        "Learning from feedback to write docstrings",
        *(page.element("p", sentence) for sentence in story(results)),
        page.section("The stages", *_stages(results)),
        *(page.section(picture.title, _figure(picture)) for picture in drawn),
        page.section("The same held-out prompts, answered by every stage", _cards(samples)),
        page.section("Limits", page.bullets(limits(results, samples))),
        page.section("How it was run", page.element("p", circumstances(results))),
    )


def demo_pictures(results: Mapping[str, Any], logs: Mapping[str, Log]) -> list[Picture]:
    """What the demonstration shows, in reading order; a panel without data is left out."""
    tuned = {family: logs[family] for family in ("ppo", "ppo_ptx") if family in logs}
    human = _level(_number(results.get("human_gold")), "human", "ink")
    before = [
        *_level(_result(results, "sft", "lm_loss"), "SFT", "sft"),
        *_level(_result(results, "pretrain", "lm_loss"), "pre-trained", "pretrain"),
    ]

    def over_steps(name: str, title: str, unit: str, levels: Sequence[Level] = ()) -> list[Curves]:
        start = _result(results, "sft", name)
        lines = [log.line(f"eval/{name}", FAMILIES[family], family, start) for family, log in tuned.items()]
        return _panel(title, "PPO iteration", unit, lines, levels)

    def over_kl(name: str, title: str, levels: Sequence[Level] = ()) -> list[Curves]:
        start = _result(results, "sft", name)
        lines = [_path(log, f"eval/{name}", family, start) for family, log in tuned.items()]
        notes = [Note(0, start, "SFT", "sft")] if math.isfinite(start) else []
        return _panel(title, "KL from the SFT model, nats per answer", "mean score", lines, levels, notes)

    learnt = [
        panel
        for family, title, unit, name, held_out in LEARNT
        if family in logs
        for panel in curves(logs[family], title, unit, {name: "training", held_out: "held out"})
    ]
    scores = [
        *over_kl("reward", "Score by the reward model"),
        *over_kl("gold", "Score by the judge (gold)", human),
    ]
    answers = [
        *over_steps("win_rate", "Answers preferred to the SFT model's", "share of prompts", SAME),
        *over_steps("distinct", "Answers that differ from all others", "share of answers"),
        *over_steps("eos_rate", "Answers that stop by themselves", "share of answers"),
    ]
    plain_text = [
        *_loss_by_stage(results),
        *over_steps("lm_loss", "Loss on held-out text, during PPO", "nats per token", before),
    ]
    drawn = {"learning": learnt, "scores": scores, "answers": answers, "plain_text": plain_text}
    return [Picture(name, *CAPTIONS[name][:1], panels, CAPTIONS[name][1]) for name, panels in drawn.items() if panels]


def _loss_by_stage(results: Mapping[str, Any]) -> list[Dots]:
    rows = [(*_stage(key), _result(results, key, "lm_loss")) for key in results.get("stages", {})]
    known = [row for row in rows if math.isfinite(row[2])]
    return [Dots("Loss on held-out text, by stage", "nats per token", known)] if known else []


def story(results: Mapping[str, Any]) -> list[str]:
    """What happened, in three sentences; an unknown number shows as a dash."""
    stages = results.get("stages", {})
    first = next((key for key in stages if re.fullmatch(r"ppo_\d+", key)), "")
    last = {_stage(key)[1]: key for key in stages}

    def value(key: str, name: str) -> str:
        return number(_result(results, key, name), name in SHARES)

    sentences = [
        "A small language model read the documentation of Python's standard library (pre-training), imitated pairs of "
        "a function's signature and its docstring (SFT), and was then trained by PPO to please a reward model, which "
        "had learned from a judge's rankings of answers and orders "
        f"{number(_number(results.get('reward_accuracy')), True)} of held-out pairs as the judge does."
    ]
    if first:
        sentences.append(
            f"After {first.removeprefix('ppo_')} PPO iterations the judge prefers its answer to the SFT model's on "
            f"{value(first, 'win_rate')} of held-out prompts (50% would be no difference; the 95% interval begins at "
            f"{value(first, 'win_rate_low')}), {value(first, 'distinct')} of its answers differ from all others, and it is "
            f"{value(first, 'kl')} nats per answer away from the SFT model."
        )
    if "ppo" in last:
        mixed = f"; where pre-training text was mixed into every update ({_stage(last['ppo_ptx'])[0]}) it is {value(last['ppo_ptx'], 'lm_loss')}" if "ppo_ptx" in last else ""
        sentences.append(
            f"The loss on held-out plain text was {value('pretrain', 'lm_loss')} nats per token after pre-training, "
            f"{value('sft', 'lm_loss')} after SFT and {value(last['ppo'], 'lm_loss')} after PPO ({_stage(last['ppo'])[0]}){mixed}."
        )
    return sentences


def limits(results: Mapping[str, Any], samples: Mapping[str, Any]) -> list[str]:
    """What the numbers do not say."""
    alike = [
        f"{count} of the {len(answers)} answers of {_stage(key)[0]} below begin with “{opening}”"
        for key, answers in samples.get("answers", {}).items()
        if key.startswith("ppo")
        for opening, count in Counter(" ".join(answer.split()[:2]) for answer in answers).most_common(1)
    ]
    return [
        "The model is tiny, and much of its English is broken. The numbers show how the algorithms behave, not how well "
        "docstrings can be written.",
        "The judge is a program, and it can be gamed: when this demonstration was designed, the policy collapsed towards "
        "“Get the …” after about 15 iterations while its score passed that of human docstrings, "
        f"{number(_number(results.get('human_gold')))}. So look at the distinct answers and at the samples, not at the "
        "score alone." + f" In this run, {', '.join(alike)}." * bool(alike),
        "The mix also sees more pre-training text than plain PPO does: a part of its lower loss is simply more training.",
        "This is one seed. The intervals are over prompts, not over repetitions of the training.",
    ]


def circumstances(results: Mapping[str, Any]) -> str:
    """Seed, versions and minutes, in a few words."""
    minutes = {name: value for name, value in results.get("minutes", {}).items() if value is not None}
    spent = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in minutes.items())
    quick = "The quick form: fewer iterations than the whole demonstration, so the numbers are rougher. "
    versions = {"python": results.get("python"), **results.get("versions", {})}
    return (
        quick * bool(results.get("quick"))
        + f"Seed {results.get('seed')}. {_versions(versions)}"
        + f" Minutes: {spent}; {number(sum(minutes.values()))} together." * bool(minutes)
    )


def table(results: Mapping[str, Any]) -> Table:
    """The stages of a demonstration, one row each, for the terminal."""
    heads, rows = _stage_rows(results)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        made.add_column(head, justify="right" if index else "left", no_wrap=not index)
    for _, cells in rows:
        made.add_row(*cells)
    return made


def _stage_rows(results: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads, and (colour, cells) of every stage and of human answers; columns without a number are left out."""
    stages = results.get("stages", {})
    columns = [column for column in COLUMNS if any(math.isfinite(_result(results, key, column[0])) for key in stages)]
    rows = []
    for key in stages:
        label, colour = _stage(key)
        cells = [number(_result(results, key, name), name in SHARES) for name, _, _ in columns]
        rows.append((colour, [label, *cells]))
    if results.get("human_gold") is not None:
        rows.append(("ink", ["human", *(number(results["human_gold"]) if n == "gold" else "" for n, _, _ in columns)]))
    return ["stage", *(head for _, head, _ in columns)], rows


def _stages(results: Mapping[str, Any]) -> list[Html]:
    heads, rows = _stage_rows(results)
    notes = [f"{head}: {meaning}" for _, head, meaning in COLUMNS if head in heads]
    tinted = [[page.element("b", label, style=f"color: var(--{colour})"), *cells] for colour, (label, *cells) in rows]
    return [page.table(heads, tinted), page.element("p", f"{'; '.join(notes)}.", class_="notes")]


def _cards(samples: Mapping[str, Any]) -> Html:
    """One card per prompt: how people and every stage answered it."""
    answers = {"human": samples.get("human", []), **samples.get("answers", {})}
    cards = []
    for index, prompt in enumerate(samples.get("prompts", [])):
        rows = []
        for key, given in answers.items():
            if index < len(given):
                label, colour = _stage(key)
                rows.append([page.element("b", label, style=f"color: var(--{colour})"), given[index]])
        cards.append(page.element("div", page.element("h3", prompt), page.table((), rows, "words")))
    return page.element("div", *cards, class_="cards")


def _last_values(log: Log, names: Sequence[str]) -> Html:
    last = {name: record for record in log.records for name in names if name in record}
    rows = [[name, number(last[name][name]), str(last[name]["step"])] for name in names]
    return page.table(("metric", "value", "step"), rows)


def _costs(log: Log) -> list[Html]:
    spent: Counter[str] = Counter()
    for record in log.timings:
        spent.update({name.removeprefix("seconds/"): s for name, s in record.items() if name.startswith("seconds/")})
    total, steps = sum(spent.values()), max(len(log.timings), 1)
    rows = [
        [phase, number(seconds), number(1000 * seconds / steps), number(seconds / total, True)]
        for phase, seconds in [*spent.most_common(), ("together", total)]
        if total
    ]
    peak = max((record.get("peak_rss_mb") or 0 for record in log.timings), default=0)
    memory = f"Peak memory of the process: {peak} MB."
    return [page.table(("phase", "seconds", "ms per step", "share"), rows), page.element("p", memory * bool(peak))]


def _words(options: Mapping[str, Any]) -> Html:
    return page.table((), [[name, _short(value)] for name, value in options.items()], "words")


def _short(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(row, dict) for row in value):
        return f"{len(value)} rows"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _is_shared_default(name: str, value: Any) -> bool:
    default = next((f.default for f in fields(RunConfig) if f.name == name), MISSING)
    return default is not MISSING and value == default and name not in LISTED


def _versions(versions: Mapping[str, str | None]) -> str:
    known = [f"{name} {version}" for name, version in versions.items() if version]
    return f"Versions: {', '.join(known)}." * bool(known)


def _panel(
    title: str, x_label: str, unit: str, lines: Sequence[Line | None], levels: Sequence[Level] = (), notes: Sequence[Note] = ()
) -> list[Curves]:
    kept = [line for line in lines if line is not None]
    return [Curves(title, x_label, unit, kept, levels, notes, share=unit.startswith("share"))] if kept else []


def _path(log: Log, name: str, family: str, start: float) -> Line | None:
    """A metric over the KL of the same evaluation, in the order of training, from the SFT model on."""
    points = [(0.0, start), *((_number(r.get("eval/kl")), _number(r.get(name))) for r in log.records)]
    known = [(max(kl, 0.0), value) for kl, value in points if math.isfinite(kl) and math.isfinite(value)]
    x, y = [kl for kl, _ in known], [value for _, value in known]
    return Line(x=x, y=y, label=FAMILIES[family], colour=family, dots=True) if known else None


def _level(value: float | None, label: str, colour: str) -> list[Level]:
    return [Level(value, label, colour)] if value is not None and math.isfinite(value) else []


def _stage(key: str) -> tuple[str, str]:
    """The name of a stage for people, and its colour: ppo_ptx_25 is "PPO + mix, iteration 25" in the colour ppo_ptx."""
    family, iteration = re.fullmatch(r"(.*?)(?:_(\d+))?", key).groups()
    label = FAMILIES.get(family, family.replace("_", " "))
    return f"{label}, iteration {iteration}" if iteration else label, family if family in FAMILIES else "ink"


def _result(results: Mapping[str, Any], key: str, name: str) -> float:
    return _number(results.get("stages", {}).get(key, {}).get(name))


def _number(value: Any) -> float:
    """The number that was logged; NaN for null and for what is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _figure(picture: Picture) -> Html:
    drawn = [Html(pictures.svg(panel, f"{picture.name}-{index}")) for index, panel in enumerate(picture.panels)]
    return page.figure(drawn, picture.caption)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(folder: Path, title: str, *parts: Html) -> Path:
    path = folder / "report.html"
    path.write_text(page.document(title, COLOURS, *parts), encoding="utf-8")
    return path
