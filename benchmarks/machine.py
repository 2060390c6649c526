"""The machine, the versions and the commit that a measurement belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def surroundings(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit that the numbers belong to."""
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    names = ("torch", "triton", "numpy", "transformers")
    return {
        "device": device,
        "machine": machine,
        "versions": {"python": platform.python_version()} | {name: v for name in names if (v := _version(name))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with "+" if files differ from it; None outside a repository or without git."""
    try:
        git = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return git[0] + "+" * bool(git[1])
