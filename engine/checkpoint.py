"""Folders that exist whole or not at all: written aside, synced, renamed; with everything that exact resume needs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `target`, sync it to disk, and rename it into place.

    Raises OSError with one sentence when the disk refuses; what stood at `target` before is then untouched.
    """
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        _sync(aside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"could not write {target}: {error}; earlier checkpoints are intact") from error
    if target.exists():
        remove(target)
    aside.rename(target)
    _sync_entry(target.parent)


def write_file(target: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    aside = target.with_name(f".{target.name}.tmp")
    aside.write_text(content, encoding="utf-8")
    _sync_entry(aside)
    aside.replace(target)


def merge_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Like write_folder, but into a folder that holds other files: each file is replaced whole, config.json last.

    A folder without config.json is not a checkpoint to anyone, so a crash in between leaves nothing half-valid.
    """
    staged = target / ".export"
    write_folder(staged, write)
    (target / "config.json").unlink(missing_ok=True)
    for file in sorted(staged.iterdir(), key=lambda f: f.name == "config.json"):
        if file.is_dir():  # one of a crash in between has to go first
            shutil.rmtree(target / file.name, ignore_errors=True)
        os.replace(file, target / file.name)
    staged.rmdir()
    _sync_entry(target)


def save_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Optimizer tensors and everything else that is not a weight."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What save_state wrote."""
    return load_file(folder / OPTIMIZER), json.loads((folder / STATE).read_text(encoding="utf-8"))


def found(folder: Path) -> dict[int, Path]:
    """step -> checkpoint-<step> folder, in ascending order; a folder still being written has another name."""
    named = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*") if (p / STATE).is_file()}
    return dict(sorted((int(match[1]), path) for path, match in named.items() if match))


def remove(folder: Path) -> None:
    """Delete a checkpoint; it stops being one before its files go."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete what a crash left half-written or half-removed beside the checkpoints."""
    for rest in folder.glob(".checkpoint-*"):
        shutil.rmtree(rest)


def ensure_room(folder: Path, num_bytes: int) -> None:
    """Raise OSError when a checkpoint of this size would not fit beside the one that it replaces."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder}: a checkpoint needs {num_bytes / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free on this disk"
        )


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
