"""One run: its folder, log, timers, progress bar, and the checkpoints that it resumes from."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from twinhead.engine import checkpoint, ranks
from twinhead.engine.config import RunConfig
from twinhead.engine.memory import Memory
from twinhead.engine.metrics import JsonLines
from twinhead.engine.optim import Optimizer

# Options that change neither the weights nor the metrics: a run may be resumed under other values of them.
FREE = ("save_every", "keep_checkpoints", "tensorboard", "output_dir", "offload", "shard_optimizer")


class Savable(Protocol):
    """A policy, a reward model or a tokenizer."""

    def save_pretrained(self, folder: Path) -> None: ...


class Run:
    """A training run under `config.output_dir`. Opening one that exists goes on where it stopped.

    metrics.jsonl holds what the algorithm computed (the first line is the resolved configuration), timings.jsonl how
    long it took: so the former is the same, line by line, whether or not the run was interrupted. The first rank alone
    writes; the others read what it wrote, so all must see the folder.
    """

    def __init__(self, config: RunConfig, stage: str) -> None:
        self.config, self.stage = config, stage
        self.dir = Path(config.output_dir)
        ranks.join(config.device_type)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir: expected a folder, got {config.output_dir!r} ({error})") from error
        self.metrics = JsonLines(self.dir / "metrics.jsonl")
        self.timings = JsonLines(self.dir / "timings.jsonl")
        self._seconds: dict[str, float] = {}
        self._memory = Memory(config.device_type)
        self._peaks: dict[str, int] = {}  # bytes of every phase, in this step and
        self._highest: dict[str, int] = {}  # in any
        self._planned: Mapping[str, int] = {}
        self._models: tuple[Savable, ...] = ()
        self._optimizer: Optimizer | None = None
        self._state: Mapping[str, Any] = {}
        self.start = ranks.first(self._open)
        self._events = _event_writer(self.dir) if config.tensorboard and ranks.rank() == 0 else None
        self._progress: tuple[Progress, Any] | None = None

    def _open(self) -> int:
        """Compare with the run that is already here, or write the first line of a new one; the steps that it took."""
        header = json.loads(json.dumps(_header(self.config, self.stage), default=str))
        checkpoint.sweep(self.dir)
        lines = list(self.metrics)
        checkpoints = checkpoint.found(self.dir)
        start = max(checkpoints, default=0)
        begun = bool(checkpoints) or self.finished
        if not lines and begun:
            raise ValueError(f"output_dir: {self.dir} holds checkpoints but no metrics.jsonl; choose another")
        if len(lines) < 2 and not begun:  # what failed before its first step holds nobody to its options
            self.metrics.keep_until(-1)
            self.metrics.write(header)
            return start
        earlier = lines[0]
        theirs, ours = earlier["config"], header["config"]
        for name in ours if earlier["stage"] == self.stage else ("stage",):
            there, here = (earlier["stage"], self.stage) if name == "stage" else (theirs.get(name), ours[name])
            if there != here and name not in FREE:
                raise ValueError(
                    f"output_dir: {self.dir} holds a run with {name} = {there!r}, but {here!r} was asked for; "
                    "choose another folder, or the same options to resume it"
                )
        if not self.finished:
            self.metrics.keep_until(start)
            self.timings.keep_until(start)
        return start

    @property
    def finished(self) -> bool:
        """The final checkpoint stands in the run's folder."""
        return (self.dir / "config.json").is_file()

    @property
    def resume_from(self) -> Path | None:
        """The newest checkpoint folder, from which models are to be loaded instead of from the configuration."""
        return checkpoint.found(self.dir).get(self.start)

    def track(self, *models: Savable, optimizer: Optimizer, **state: Any) -> None:
        """What checkpoints hold: models and tokenizer, the optimizer, and small objects whose __dict__ is JSON.

        On a resumed run the optimizer and the state are put back here; models are loaded from `resume_from`.
        """
        self._models, self._optimizer, self._state = models, optimizer, state
        weights = sum(p.nbytes for model in models if isinstance(model, nn.Module) for p in model.parameters())
        learning = sum(p.nbytes for p in optimizer.parameters.values())
        checkpoint.ensure_room(self.dir, weights + 2 * learning)
        if self.resume_from is not None:
            tensors, saved = checkpoint.load_state(self.resume_from)
            optimizer.restore(tensors, saved["optimizer"])
            for name, item in state.items():
                vars(item).update(saved[name])

    def steps(self, total: int) -> Iterator[int]:
        """Steps 1..total that are still to do, under a progress bar; a checkpoint follows where one is due."""
        name, note = TextColumn(f"[bold]{self.stage}"), TextColumn("{task.fields[note]}")
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        with Progress(*columns, console=_console()) as progress:
            task = progress.add_task(self.stage, total=total, completed=self.start, note="")
            self._progress = (progress, task)
            for step in range(self.start + 1, total + 1):
                yield step
                progress.advance(task)
                every = self.config.save_every
                if step == total or (every and step % every == 0):
                    self.save(step)

    def say(self, sentence: str) -> None:
        """Tell the person at the terminal something that is no metric."""
        console = self._progress[0].console if self._progress is not None else _console()
        console.print(f"[bold]{self.stage}[/]  {escape(sentence)}", highlight=False)

    def seed(self, purpose: str, step: int = 0) -> int:
        """An independent seed for every purpose and step: nothing of a random state has to be saved."""
        return zlib.crc32(f"{self.config.seed}/{purpose}/{step}".encode())

    def expect(self, peaks: Mapping[str, int]) -> None:
        """Planned bytes of every phase, to stand beside the measured ones; what is held by now belongs to libraries."""
        self._planned, self._memory = peaks, Memory(self.config.device_type)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of this block, and the most memory that it held, to the step's timings."""
        began = time.perf_counter()
        self._memory.restart()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began
            peak = self._memory.peak
            for peaks in (self._peaks, self._highest):
                peaks[phase] = max(peaks.get(phase, 0), peak)

    def log(self, step: int, values: Mapping[str, float], note: str = "") -> None:
        """Write one line of metrics and one of timings; `note` stands beside the progress bar."""
        ranks.first(partial(self._record, step, values))
        self._seconds, self._peaks = {}, {}
        if self._progress is not None:
            progress, task = self._progress
            progress.update(task, note=note)

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.write({"step": step, **values})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        seconds = {f"seconds/{phase}": round(value, 4) for phase, value in self._seconds.items()}
        memory = {f"peak_mb/{phase}": size / 1e6 for phase, size in self._peaks.items()}
        memory |= {f"planned_mb/{phase}": self._planned[phase] / 1e6 for phase in self._peaks if phase in self._planned}
        self.timings.write(
            {"step": step, **seconds, **{name: round(mb, 1) for name, mb in memory.items()}, "peak_rss_mb": peak}
        )
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(name, value, step)

    def skip(self, step: int, values: Mapping[str, float], reason: str) -> None:
        """Log a step that updated nothing, and count it. Raises ValueError after 10 in a row."""
        skipped = ranks.first(self._skipped)
        self.log(step, {**values, "guard/nonfinite_batches": skipped + 1}, note=f"skipped: {reason}")
        if skipped + 1 >= 10:
            raise ValueError(f"step {step}: 10 batches in a row were skipped, the last one for {reason}")

    def _skipped(self) -> int:
        """How many of the last steps in a row were skipped."""
        skipped = 0
        for record in reversed(list(self.metrics)):
            if "guard/nonfinite_batches" not in record:
                break
            skipped += 1
        return skipped

    def save(self, step: int) -> None:
        """checkpoint-<step>, whole or not at all; the oldest ones beyond keep_checkpoints go."""
        assert self._optimizer is not None, "track() comes before the first checkpoint"
        ranks.first(partial(self._save, step, self._optimizer.state()))

    def _save(self, step: int, learned: tuple[dict[str, Tensor], dict[str, int]]) -> None:
        checkpoint.write_folder(self.dir / f"checkpoint-{step}", partial(self._write_checkpoint, *learned))
        for old in list(checkpoint.found(self.dir).values())[: -self.config.keep_checkpoints]:
            checkpoint.remove(old)

    def save_best(self) -> None:
        """The models as they are now, in the folder best/, whole or not at all."""
        ranks.first(partial(checkpoint.write_folder, self.dir / "best", self._write_models))

    def finish(self) -> Run:
        """Write the final models into the run's folder itself, where from_pretrained finds them."""
        ranks.first(partial(checkpoint.merge_folder, self.dir, self._write_models))
        if self._planned:
            seen = [
                (phase, size / 1e6, self._planned[phase] / 1e6)
                for phase, size in self._highest.items()
                if phase in self._planned
            ]
            both = ", ".join(f"{phase} {took:.0f} ({planned:.0f})" for phase, took, planned in seen)
            self.say(f"peak memory in MB, measured (planned): {both}")
        if self._events is not None:
            self._events.close()
        return self

    def _write_models(self, folder: Path) -> None:
        for model in self._models:
            model.save_pretrained(folder)

    def _write_checkpoint(self, tensors: dict[str, Tensor], counters: dict[str, int], folder: Path) -> None:
        self._write_models(folder)
        checkpoint.save_state(folder, tensors, {"optimizer": counters, **{k: vars(v) for k, v in self._state.items()}})


def _header(config: RunConfig, stage: str) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    options = {f.name: _recorded(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return {"stage": stage, "config": options, "versions": versions}


def _recorded(value: Any) -> Any:
    """Rows handed over in memory are known by their number and a checksum; everything else is recorded as it is."""
    if isinstance(value, list):
        return f"{len(value)} rows in memory, crc32 {zlib.crc32(json.dumps(value, default=str).encode()):08x}"
    return value


def _console() -> Console:
    """Where the first rank speaks, and the others are quiet."""
    return Console(stderr=True, quiet=ranks.rank() > 0)


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: expected its package, got none (pip install 'twinhead[tensorboard]')") from error
    return SummaryWriter(str(folder / "tensorboard"))
