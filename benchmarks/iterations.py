"""How fast is a whole PPO iteration: `twinhead.engine.ppo` beside TRL's last PPO trainer, each in its own process.

Processes take turns: ours, TRL, ours, TRL. The gate: both sides learn from the same number of tokens in the same number
of optimizer steps, from the same weights, and their losses are finite. What else is told: how our cost grows with the
response, the batch and the vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks import race, shapes
from benchmarks.kernels import duration
from benchmarks.machine import ROOT, surroundings
from benchmarks.peers import TRL_TRAINER, Missing
from benchmarks.race import Record, Wrong
from benchmarks.rollouts import HALF_BILLION
from benchmarks.shapes import EOS, FIRST_WORD, PAD, Shape
from benchmarks.timing import summary
from benchmarks.trainers import PHASES, POLICY, PROMPTS, REWARD, Work

OURS, THEIRS = race.OURS, TRL_TRAINER.label
NAMES = {OURS: "twinhead", THEIRS: "trl"}  # as benchmarks.trainers calls them
PROCESSES, ITERATIONS = 2, 6  # of every trainer; iterations of each process, the first of which has no time
WORD = "<{}>".format  # no word is part of another
PATIENCE = 1800.0  # seconds for a process
TINY = Shape(64, hidden=32, inner=48, layers=2, heads=4, groups=2)
# Of the weights at full length: the usual 0.02 at a width of 256. Those of Shape, which make lengths geometric, are too
# wide for bfloat16 in 24 layers: two equal passes differ.
SPREAD = 0.32
# How far EOS's row of the head is stretched, by vocabulary: mean lengths near 20 of 64 (TINY: 5 of 16).
EOS_SCALES = {64: 12.0, 4096: 3.3, 32000: 4.8}
RAGGED = (0.15, 0.5)  # mean length over the longest possible one
ENTROPY = 0.02  # relative: the same weights, however they are sampled
KL = {torch.float32: 0.01, torch.bfloat16: 2.0}  # nats per sequence between two equal policies


@dataclass(frozen=True)
class Iteration:
    """Prompts of one length; responses that are all as long as can be, or end at EOS by themselves."""

    shape: Shape
    dtype: torch.dtype
    batch: int = 32
    prompt: int = 32
    response: int = 64
    ragged: bool = False
    micro: int = 8  # sequences in one pass of training: with TRL faster than 16, in less memory

    @property
    def title(self) -> str:
        lengths = f"{self.prompt} + {'up to ' * self.ragged}{self.response} tokens"
        return f"{self.shape.title}, batch {self.batch}, {lengths}, {shapes.name(self.dtype)}"

    def write(self, folder: Path, iterations: int) -> None:
        """The checkpoints of the policy and the reward model, and prompts for so many iterations."""
        shape, scale, words = replace(self.shape, spread=SPREAD), 1.0, self._tokenizer()
        if self.ragged:
            shape, scale = self.shape, EOS_SCALES[self.shape.vocabulary]
        models = {POLICY: shape.model(self.dtype, torch.device("cpu"), scale), REWARD: shape.judge(self.dtype)}
        for name, model in models.items():
            model.save_pretrained(folder / name)
            words.save_pretrained(folder / name)
        # one batch more than is used: with the last one, TRL's accelerator would step after every micro-batch
        prompts = self.shape.sequences([self.prompt] * self.batch * (iterations + 1))
        lines = [json.dumps({"prompt": " ".join(map(WORD, ids))}) for ids in prompts]
        (folder / PROMPTS).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def work(self, folder: Path, device: torch.device, iterations: int) -> Work:
        """What both trainers are told."""
        return Work(
            str(folder), device.type, shapes.name(self.dtype), self.batch, self.prompt, self.response,
            min(self.micro, self.batch // Work.minibatches), iterations, torch.get_num_threads(),
        )  # fmt: skip

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """One word per token. Where responses are to be of full length, EOS lies beyond what the model can say."""
        words = {WORD(i): i for i in range(self.shape.vocabulary)}
        model = Tokenizer(WordLevel(words, unk_token=WORD(FIRST_WORD)))
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = (WORD(EOS), WORD(PAD)) if self.ragged else ("</s>", "</s>")
        return PreTrainedTokenizerFast(
            tokenizer_object=model, unk_token=WORD(FIRST_WORD), eos_token=special[0], pad_token=special[1]
        )


@dataclass(frozen=True)
class Scaling:
    """Our own iterations as one of their sizes grows."""

    axis: str
    points: Sequence[tuple[int, Iteration]]

    @property
    def title(self) -> str:
        return f"cost against {self.axis}"


def main(device: str, quick: bool, results: Path, minutes: float | None = None) -> None:
    """Measure every case on `device` and write ppo_DEVICE.json into `results`, again after each.

    After `minutes` no further case is begun. Raises SystemExit at the end if one of our own was wrong or failed.
    """
    where = torch.device(device)
    found = {**surroundings(device), "quick": quick, "columns": [OURS, THEIRS]}
    record = Record(results / f"ppo_{device}.json", found, minutes)
    counts = (1, 3) if quick else (PROCESSES, ITERATIONS)
    record.add("cases", cases(where, quick), partial(measure, device=where, counts=counts), show)
    record.add("scaling", scalings(quick), partial(grow, device=where, iterations=counts[1]), show_growth)
    record.end()


def cases(device: torch.device, quick: bool) -> list[Iteration]:
    """Two vocabularies, both kinds of lengths; bfloat16 where it is fast; on a GPU a real shape first."""
    if quick:
        return [Iteration(TINY, torch.float32, 8, 5, 16, ragged=ragged) for ragged in (False, True)]
    real = Iteration(HALF_BILLION, torch.bfloat16, batch=64, prompt=512, response=512, micro=4)
    grid = [
        Iteration(Shape(vocabulary, tied=True), dtype, ragged=ragged)
        for dtype in shapes.dtypes(device)
        for vocabulary in (4096, 32000)
        for ragged in (False, True)
    ]
    return [real, *grid] if device.type == "cuda" else grid


def scalings(quick: bool) -> list[Scaling]:
    """One size at a time, doubled three times (the vocabulary: by four and two) about the smaller case."""
    base = Iteration(TINY, torch.float32, 8, 5, 16) if quick else Iteration(Shape(4096, tied=True), torch.float32)
    responses, batches = ((8, 16), (4, 8)) if quick else ((32, 64, 128, 256), (8, 16, 32, 64))
    vocabularies = (64, 128) if quick else (1024, 4096, 16384, 32768)
    return [
        Scaling("response", [(n, replace(base, response=n)) for n in responses]),
        Scaling("batch", [(n, replace(base, batch=n)) for n in batches]),
        Scaling("vocabulary", [(n, replace(base, shape=replace(base.shape, vocabulary=n))) for n in vocabularies]),
    ]


def measure(case: Iteration, device: torch.device, counts: tuple[int, int]) -> dict[str, Any]:
    """A row for each side: times, phases, tokens per second and peak memory, or the reason why there are none.

    counts: processes of each side, and iterations of each process. speedup: tokens per second by those of TRL.
    """
    processes, iterations = counts
    reports: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in reports}
    with tempfile.TemporaryDirectory() as folder:
        case.write(Path(folder), iterations)
        for _ in range(processes):
            for name in reports:
                if len(rows[name]) == 1:
                    rows[name] |= _played(NAMES[name], case, Path(folder), device, iterations, reports[name])
    for name, found in reports.items():
        if len(rows[name]) == 1:
            rows[name] |= judged(case, found)
    if all("milliseconds" in row for row in rows.values()):
        ours, theirs = (rows[name] for name in (OURS, THEIRS))
        if words := unlike(case, ours["entropy"], theirs["entropy"]):
            rows = {name: {"name": name, "failed": f"wrong: {words}"} for name in rows}
        else:
            ours["speedup"], theirs["speedup"] = ours["tokens_per_second"] / theirs["tokens_per_second"], 1.0
    return {"title": case.title, "rows": list(rows.values())}


def _played(
    trainer: str, case: Iteration, folder: Path, device: torch.device, iterations: int, reports: list[dict[str, Any]]
) -> dict[str, Any]:
    """Add the report of one more process to `reports`; what is returned says why there is none."""
    try:
        reports.append(play(trainer, case.work(folder, device, iterations)))
    except Missing as missing:
        return {"not_run": str(missing)}
    except RuntimeError as failure:
        return {"failed": str(failure)}
    return {}


def play(trainer: str, work: Work) -> dict[str, Any]:
    """The trainers.Report of one process. Raises Missing as the process did, RuntimeError where it failed."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "benchmarks.trainers", trainer, report.name]
        # transformers looks for accelerate, which TRL needs, when it is imported, and never again
        needs = [str(TRL_TRAINER.folder / "needs")] if trainer == NAMES[THEIRS] else []
        paths = os.pathsep.join([*needs, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            ran = subprocess.run(
                command, input=json.dumps(asdict(work)), cwd=ROOT, capture_output=True, check=False, text=True,
                timeout=PATIENCE, env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"no end after {PATIENCE:.0f} seconds") from late
        if ran.returncode:
            raise RuntimeError(next(iter(ran.stderr.strip().splitlines()[::-1]), f"exit {ran.returncode}"))
        found = json.loads(Path(report.name).read_text(encoding="utf-8"))
    if "missing" in found:
        raise Missing(found["missing"])
    return found


def judged(case: Iteration, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one side, if what its processes did was the work of the case."""
    try:
        for report in reports:
            gate(case, report)
    except Wrong as wrong:
        return {"failed": f"wrong: {wrong}"}
    seconds = [lasted for report in reports for lasted in report["seconds"]]
    tokens = [count for report in reports for count in report["tokens"][1:]]  # the first iteration has no time
    phases = [spent for report in reports for spent in report["phases"]]
    peaks = [report["peak_bytes"] for report in reports if report["peak_bytes"] is not None]
    taken = summary(seconds)
    return {
        "milliseconds": taken.median, "quartiles": [taken.low, taken.high], "rounds": taken.rounds,
        "phases": {name: 1e3 * statistics.median(spent[name] for spent in phases) for name in PHASES},
        "tokens": statistics.mean(tokens),
        "tokens_per_second": statistics.median(n / lasted for n, lasted in zip(tokens, seconds, strict=True)),
        "peak_bytes": max(peaks, default=None), "entropy": reports[0]["entropy"],
    }  # fmt: skip


def gate(case: Iteration, report: Mapping[str, Any]) -> None:
    """Raise Wrong unless every iteration of the report did the work of the case."""
    most, updates = case.batch * case.response, Work.epochs * Work.minibatches
    low, high = (RAGGED[0] * most, RAGGED[1] * most) if case.ragged else (most, most)
    for number, (tokens, steps) in enumerate(zip(report["tokens"], report["optimizer_steps"], strict=True), 1):
        if not low <= tokens <= high:
            raise Wrong(f"iteration {number} has {tokens} response tokens, expected {low:.0f} to {high:.0f}")
        if steps != updates:
            raise Wrong(f"iteration {number} took {steps} optimizer steps, expected {updates}")
    if not all(map(math.isfinite, report["losses"])):
        raise Wrong("a loss is not finite")
    if not abs(report["kl"]) <= KL[case.dtype]:
        raise Wrong(f"{report['kl']:.2g} nats between policy and reference before the first update, expected none")


def unlike(case: Iteration, ours: float, theirs: float) -> str:
    """What tells that the two sides had different policies; nothing where they had not.

    At full length alone: TRL's entropy of ragged responses counts the padding.
    """
    if case.ragged or abs(ours / theirs - 1) <= ENTROPY:
        return ""
    return f"entropy {ours:.3f} nats per token here and {theirs:.3f} there, expected the same policy"


def grow(scaling: Scaling, device: torch.device, iterations: int) -> dict[str, Any]:
    """What a response token costs us at each size; ratio: at the largest by at the smallest. 1 is linear."""
    points: list[dict[str, Any]] = []
    for size, case in scaling.points:
        with tempfile.TemporaryDirectory() as folder:
            case.write(Path(folder), iterations)
            reports: list[dict[str, Any]] = []
            trouble = _played(NAMES[OURS], case, Path(folder), device, iterations, reports)
        found = trouble or judged(case, reports)
        if "milliseconds" in found:
            found["microseconds_per_token"] = 1e6 / found["tokens_per_second"]
        points.append({"name": OURS, "size": size, **found})
    costs = [point.get("microseconds_per_token") for point in points]
    ratio = costs[-1] / costs[0] if costs[0] and costs[-1] else None
    return {"title": scaling.title, "axis": scaling.axis, "rows": points, "ratio": ratio}


def show(measured: dict[str, Any], console: Console) -> None:
    """The table of a case, and below it who has no time."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=measured["title"], title_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in ("whole", "spread", *PHASES, "tokens/s", "speedup", "MiB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in measured["rows"]:
        if "milliseconds" in row:
            low, high = row["quartiles"]
            speedup, memory = row.get("speedup"), row["peak_bytes"]
            shown.add_row(
                row["name"], duration(row["milliseconds"]), f"±{(high - low) / 2 / row['milliseconds']:.0%}",
                *(duration(row["phases"][name]) for name in PHASES), f"{row['tokens_per_second']:,.0f}",
                "–" if speedup is None else f"{speedup:.2f}", "–" if memory is None else f"{memory / 2**20:,.0f}",
            )  # fmt: skip
    console.print(shown)
    race.excuses(measured, console)


def show_growth(measured: dict[str, Any], console: Console) -> None:
    """What a token costs at each size, in one line."""
    costs = [
        f"{row['size']}: {row['microseconds_per_token']:,.0f} µs" for row in measured["rows"] if "milliseconds" in row
    ]
    ratio = "" if measured["ratio"] is None else f"; largest by smallest {measured['ratio']:.2f}"
    console.print(f"{measured['title']}, per response token: {', '.join(costs)}{ratio}")
    race.excuses(measured, console)
