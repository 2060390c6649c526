"""Folders are written whole or not at all, whatever goes wrong and wherever it does."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests.toys import files
from twinhead.engine import checkpoint

OLD = {"config.json": b"old config", "weights": b"old weights"}
NEW = {"config.json": b"new config", "extra/part": b"new part", "weights": b"new weights"}
FLAT = {"added": b"new", "config.json": b"new config", "weights": b"new weights"}


class Crash(BaseException):
    """A power cut, as far as a test can play one: nothing of ours catches it."""


def fill(content: dict[str, bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, data in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return write


def broken(error: BaseException) -> Callable[[Path], None]:
    """Writes a part, then fails."""

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise error

    return write


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    fill(OLD)(folder)
    return folder


def test_a_new_folder(tmp_path: Path) -> None:
    checkpoint.write_folder(tmp_path / "run" / "checkpoint-1", fill(NEW))
    assert files(tmp_path) == {f"run/checkpoint-1/{name}": data for name, data in NEW.items()}


def test_a_folder_replaces_another_as_a_whole(old: Path) -> None:
    checkpoint.write_folder(old, fill(FLAT))
    assert files(old.parent) == {f"checkpoint-1/{name}": data for name, data in FLAT.items()}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_disk_that_refuses_leaves_what_there_was(error: Exception, old: Path) -> None:
    with pytest.raises(OSError, match=r"^could not write .*checkpoint-1: .*; earlier checkpoints are intact$") as told:
        checkpoint.write_folder(old, broken(error))
    assert str(error) in str(told.value)
    assert [path.name for path in old.parent.iterdir()] == ["checkpoint-1"]
    assert files(old) == OLD


def test_a_bug_is_not_taken_for_a_full_disk(old: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        checkpoint.write_folder(old, broken(ZeroDivisionError()))
    assert files(old) == OLD


def test_a_crash_leaves_nothing_that_the_next_attempt_minds(old: Path) -> None:
    for _ in range(2):
        with pytest.raises(Crash):
            checkpoint.write_folder(old, broken(Crash()))
        assert files(old) == OLD
        assert checkpoint.found(old.parent) == {}
    checkpoint.write_folder(old, fill(FLAT))
    assert files(old.parent) == {f"checkpoint-1/{name}": data for name, data in FLAT.items()}


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    rename = Path.rename

    def synced(path: Path) -> None:
        steps.append(path.relative_to(tmp_path).as_posix())

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "_sync_entry", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.write_folder(tmp_path / "c", fill({"a": b"1", "b/c": b"2"}))
    assert steps == [".c.tmp/a", ".c.tmp/b", ".c.tmp/b/c", ".c.tmp", ".c.tmp -> c", "."]


# -- merge_folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(old: Path) -> Path:
    """A folder with a model and things that are none of the model's."""
    (old / "metrics.jsonl").write_bytes(b"metrics")
    (old / "checkpoint-5").mkdir()
    (old / "checkpoint-5" / "weights").write_bytes(b"5")
    return old


OTHER = {"checkpoint-5/weights": b"5", "metrics.jsonl": b"metrics"}


def test_a_merge_replaces_its_own_files_only(run: Path) -> None:
    checkpoint.merge_folder(run, fill(FLAT))
    assert files(run) == FLAT | OTHER
    assert not (run / ".export").exists()


def test_a_merge_that_the_disk_refuses_leaves_what_there_was(run: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*; earlier checkpoints are intact"):
        checkpoint.merge_folder(run, broken(OSError(errno.ENOSPC, "No space left on device")))
    assert files(run) == OLD | OTHER


@pytest.mark.parametrize("survived", range(4))
def test_a_merge_that_crashes_leaves_no_config_over_mixed_files(
    survived: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, iter(range(9))

    def crashing(source: Any, target: Any) -> None:
        if next(calls) == survived:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        if survived < len(FLAT):
            with pytest.raises(Crash):
                checkpoint.merge_folder(run, fill(FLAT))
            assert not (run / "config.json").exists()
        else:
            checkpoint.merge_folder(run, fill(FLAT))
    checkpoint.merge_folder(run, fill(FLAT))
    assert files(run) == FLAT | OTHER


# -- write_file --------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "rows.jsonl"
    checkpoint.write_file(target, "alt — é\n")
    assert target.read_text(encoding="utf-8") == "alt — é\n"

    def half(self: Path, content: str, encoding: str) -> int:
        self.write_bytes(content.encode(encoding)[:3])
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(Crash):
            checkpoint.write_file(target, "new words")
    assert target.read_text(encoding="utf-8") == "alt — é\n"
    checkpoint.write_file(target, "new words")
    assert files(tmp_path) == {"rows.jsonl": b"new words"}


# -- finding and removing ----------------------------------------------------------------------------------------------


def make(folder: Path, state: bool = True) -> None:
    folder.mkdir(parents=True)
    if state:
        checkpoint.save_state(folder, {}, {})


def test_found_counts_whole_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-x",
        "checkpoint-7b",
        ".checkpoint-8.tmp",
    ):
        make(tmp_path / name)
    make(tmp_path / "checkpoint-11", state=False)
    make(tmp_path / "sub" / "checkpoint-12")
    (tmp_path / "checkpoint-13").write_text("a file")
    assert checkpoint.found(tmp_path) == {n: tmp_path / f"checkpoint-{n}" for n in (9, 10, 100)}
    assert list(checkpoint.found(tmp_path)) == [9, 10, 100]
    assert checkpoint.found(tmp_path / "nowhere") == {}


def test_what_is_being_removed_is_no_checkpoint_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "checkpoint-3")

    def crash(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(Crash):
            checkpoint.remove(tmp_path / "checkpoint-3")
    assert checkpoint.found(tmp_path) == {}
    make(tmp_path / "checkpoint-3")
    checkpoint.remove(tmp_path / "checkpoint-3")
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint-8.tmp", ".checkpoint-3.old", "checkpoint-4", "tensorboard", ".hidden"):
        make(tmp_path / name)
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "checkpoint-4", "tensorboard"]


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    tensors = {"a.exp_avg": torch.randn(3, 5).T, "b.step": torch.tensor(7.0), "c": torch.randn(4, dtype=torch.bfloat16)}
    state = {"optimizer": {"num_steps": 3}, "kl": {"coef": 0.1 + 0.2}}
    checkpoint.save_state(tmp_path, tensors, state)
    found, counters = checkpoint.load_state(tmp_path)
    assert counters == state
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_room_is_measured_where_the_run_writes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    checkpoint.ensure_room(tmp_path, free // 2)
    with pytest.raises(OSError, match=r"a checkpoint needs \d+ MB, but only \d+ MB are free on this disk$") as told:
        checkpoint.ensure_room(tmp_path, 2 * free)
    assert str(told.value).startswith(str(tmp_path))
