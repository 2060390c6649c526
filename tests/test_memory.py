"""The peak of this process is what it has held since it was asked to forget."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from twinhead.engine import memory
from twinhead.engine.memory import Memory

SIZE, PAGE = 128 * 2**20, 4096


@pytest.mark.skipif(not memory.REFERENCES.exists(), reason="needs Linux: a process that can set its peak back")
def test_a_peak_is_what_was_held_since_the_restart() -> None:
    used = Memory("cpu")
    used.restart()
    held = mmap.mmap(-1, SIZE)  # new pages, whatever this process has freed and kept before
    held[::PAGE] = bytes(SIZE // PAGE)
    assert used.peak > 0.9 * SIZE
    held.close()
    assert used.peak > 0.9 * SIZE
    used.restart()
    assert used.peak < 64e6


def test_without_linux_the_peak_is_that_of_the_whole_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "REFERENCES", tmp_path / "none" / "none")
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: lives.pop(0))
    lives = [type("Usage", (), {"ru_maxrss": size}) for size in (1000, 3000, 3000)]
    used = Memory("cpu")
    assert used.peak == 2000 * 1024
    used.restart()
    assert used.peak == 2000 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the device's own account of its memory")
def test_a_gpu_counts_its_tensors() -> None:
    used = Memory("cuda")
    used.restart()
    before = used.peak
    held = torch.ones(2**20, device="cuda")
    assert used.peak - before == held.nbytes
