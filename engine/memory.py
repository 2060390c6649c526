"""Memory: how much this process took at most since it was last asked, beyond what its libraries take."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory:
    """On CUDA, the bytes of PyTorch's tensors on the device; on a CPU, those of the process's pages in memory.

    The latter counts from when this object was made: what was imported before is not in it. Linux lets a process set
    its peak back; where it does not, the peak is that of the whole life so far.
    """

    def __init__(self, device_type: str) -> None:
        self.on_cuda = device_type == "cuda" and torch.cuda.is_available()
        self.before = 0 if self.on_cuda else _kilobytes("VmRSS")

    def restart(self) -> None:
        """Forget the peak: from here on it is that of what is held now, or of what will be."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget()

    @property
    def peak(self) -> int:
        """Bytes."""
        if self.on_cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * max(0, _kilobytes("VmHWM") - self.before)


def _kilobytes(name: str) -> int:
    """A line of Linux's account of this process; elsewhere the largest that it ever was."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def _forget() -> None:
    try:
        REFERENCES.write_text("5")  # proc(5): sets the peak resident set size back to the present one
    except OSError:  # not Linux, or a container that may not: the peak stays that of the whole life
        return
