"""What a critic costs: a PPO step with each arrangement of it, at a size where time and memory can be told apart.

    python -m benchmarks.critics ARRANGEMENT REPORT.json < work.json

is a process that trains with one of them; processes take turns, so that none has the quiet minutes. Time is that of the
CPU, which neighbours disturb less.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.iterations import Iteration
from benchmarks.machine import ROOT
from benchmarks.shapes import Shape
from benchmarks.trainers import OPTIONS, POLICY, PROMPTS, REWARD, Work
from twinhead.engine import checkpoint, ppo
from twinhead.engine.metrics import JsonLines

CASE = Iteration(Shape(4096, tied=True), torch.float32, batch=16)
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "detached": {"critic": "detached"},
    "branch of 2 layers": {"critic": "branch", "branch_layers": 2},
    "separate": {"critic": "separate"},
}
ROUNDS, STEPS = 2, 3  # processes of each; steps of a process, the first of which has no time


def main(runs: Path, case: Iteration = CASE, arrangements: Sequence[str] = tuple(ARRANGEMENTS)) -> list[dict[str, Any]]:
    """One row per arrangement, measured once and kept in `runs`."""
    file = runs / "critics.json"
    if not file.is_file():
        folder = runs / "critics"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / PROMPTS).is_file():
            case.write(folder, STEPS)
        seen: dict[str, list[Mapping[str, Any]]] = {name: [] for name in arrangements}
        for turn in range(ROUNDS):
            for name in arrangements:
                seen[name].append(_process(folder, name, turn, case.work(folder, torch.device("cpu"), STEPS)))
        rows = [{"critic": name, "case": case.title, **_median(found)} for name, found in seen.items()]
        checkpoint.write_file(file, json.dumps(rows, indent=1) + "\n")
    rows = json.loads(file.read_text(encoding="utf-8"))
    return list(rows)


def train(work: Work, name: str, output: Path) -> dict[str, Any]:
    """What a process measures: CPU seconds of every step but the first, peak bytes, and weights."""
    folder, laps = Path(work.folder), list[float]()

    def lap(_: Any) -> dict[str, float]:
        laps.append(time.process_time())
        return {}

    run = ppo.train(
        ppo.Config(
            model=str(folder / POLICY), reward_model=str(folder / REWARD), prompts=str(folder / PROMPTS),
            output_dir=str(output), device=work.device, dtype=work.dtype, steps=work.iterations, epochs=work.epochs,
            rollouts_per_step=work.batch, minibatches=work.minibatches, max_prompt_tokens=work.prompt,
            max_new_tokens=work.response, tokens_per_micro=work.micro * (work.prompt + work.response), eval_every=1,
            **OPTIONS | ARRANGEMENTS[name],
        ),
        evaluate=lap,
    )  # fmt: skip
    spent = [after - before for before, after in pairwise(laps)]
    return {"seconds": spent, "peak_bytes": peak(run.timings), "trained": trained(output)}


def peak(timings: JsonLines) -> int:
    """The most bytes that any phase of any step but the first held beyond the process's imports."""
    megabytes = [
        value for line in timings for key, value in line.items() if key.startswith("peak_mb/") and line["step"] > 1
    ]
    return int(max(megabytes) * 1e6)


def trained(output: Path) -> int:
    """Weights of the policy and its critic, as they stand in a finished run's folder."""
    files = [path for path in output.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(output))]
    return sum(map(_weights, files))


def _weights(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118


def _process(folder: Path, name: str, turn: int, work: Work) -> dict[str, Any]:
    """A process of its own, so that no arrangement finds another's memory; what it wrote is its measurement."""
    report = folder / f"{name.replace(' ', '_')}_{turn}.json"
    if not report.is_file():
        command = [sys.executable, "-m", "benchmarks.critics", name, str(report.resolve())]
        told = json.dumps(asdict(replace(work, folder=str(folder.resolve()))))
        subprocess.run(command, input=told, check=True, cwd=ROOT, text=True, env=os.environ)
    spent: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return spent


def _median(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over all processes' steps, and the highest peak."""
    return {
        "seconds": statistics.median([step for one in found for step in one["seconds"]]),
        "peak_bytes": max(one["peak_bytes"] for one in found),
        "trained": found[0]["trained"],
    }


if __name__ == "__main__":
    chosen, written = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        found = train(Work(**json.load(sys.stdin)), chosen, Path(scratch))
    checkpoint.write_file(Path(written), json.dumps(found) + "\n")
