"""One command for a bare machine with a GPU: `python -m benchmarks gpu` builds, tests and measures in 8 minutes.

It needs a checkout, torch, triton, transformers, pybind11 and pytest, and neither network nor installation: the
extension is built into the checkout, and the two links in `tests/typing/twinhead` make `import twinhead` work.
Everything goes to one folder: a log per step, `tests.xml`, NAME_cuda.json of every benchmark, and `summary.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOTAL = 8 * 60.0  # seconds
MARGIN = 15.0  # of a benchmark's time, for a case that has begun
MEASURED = ("kernels", "generate", "train", "ppo")


@dataclass(frozen=True)
class Step:
    """A command that may take so many seconds, and no more than are left."""

    name: str
    command: Sequence[str]
    seconds: float
    share: float = 1.0  # of the time that is left: its command is told as {minutes}


def main(device: str, output: Path) -> None:
    """Run every step, whether or not the one before succeeded. Raises SystemExit if one of them failed."""
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    start, summary = time.monotonic(), {}
    for step in steps(device, output):
        left = step.share * (TOTAL - (time.monotonic() - start))
        command = [word.format(minutes=f"{max(0.0, (left - MARGIN) / 60):.2f}") for word in step.command]
        summary[step.name] = run(step.name, command, min(step.seconds, left), output / f"{step.name}.log")
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"{step.name:10} {summary[step.name]['seconds']:6.1f} s  {summary[step.name]['end']}", flush=True)
    print(f"everything is in {output}")
    if any(step["end"] != "done" for step in summary.values()):
        raise SystemExit(1)


def steps(device: str, output: Path) -> list[Step]:
    """Build, tests (those that need CUDA first), compute-sanitizer where it is installed, benchmarks."""
    python, cuda = sys.executable, device == "cuda"
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["tests/kernels/test_cuda.py", "tests/test_cuda_engine.py", *(["tests/kernels"] if cuda else [])]
    found = [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 180),
        Step("tests", [*pytest, f"--junitxml={output / 'tests.xml'}", "--durations=10", *tests], 200),
    ]
    if cuda and (sanitizer := shutil.which("compute-sanitizer")):
        watched = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *pytest, "tests/kernels/test_cuda.py"]
        found.append(Step("sanitizer", watched, 60))
    options = ["--device", device, "--minutes", "{minutes}", "--results", str(output), *([] if cuda else ["--quick"])]
    for others, name in reversed(list(enumerate(reversed(MEASURED)))):  # equal shares; what one leaves is the others'
        found.append(Step(name, [python, "-m", "benchmarks", name, *options], TOTAL, 1 / (1 + others)))
    return found


def run(name: str, command: Sequence[str], seconds: float, log: Path) -> dict[str, str | float]:
    """One command in the checkout; its output goes to `log`, its end is "done", "exit N" or "out of time"."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "typing"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as lines:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            end = f"exit {code}" if code else "done"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers and workers that it started end with it
            process.wait()
            end = "out of time"
    return {"end": end, "seconds": round(time.monotonic() - start, 1), "command": " ".join(command)}
