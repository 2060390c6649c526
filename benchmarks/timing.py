"""Time and memory, side by side: every contender in turn, round after round, so that a busy moment hits all alike."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]
Around = Callable[[], AbstractContextManager[object]]

SAMPLE_SECONDS = 1e-3  # a sample on the CPU repeats a quick call until it lasts this long
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of mallopt(3)
FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache
CLEAR = Path("/proc/self/clear_refs")  # writing 5 forgets the highest resident size (Linux, Documentation/proc.rst)
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Times:
    """What the samples of one contender look like, in milliseconds per call."""

    median: float
    low: float  # lower quartile
    high: float  # upper quartile
    rounds: int


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the rest of the process, as the allocators of GPUs do.

    Otherwise every large result is fresh memory, as in any process that does not ask for this: Linux has to clear it,
    and a virtual machine to get it from its host. Up to 2 ms per MiB were seen.
    """
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(M_MMAP_MAX, 0)
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def interleaved(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    seconds: float,
    least: int = 5,
    most: int = 100,
    around: Mapping[str, Around] | None = None,
) -> dict[str, Times]:
    """Times every run once per round, for about `seconds` and between `least` and `most` rounds.

    around: for runs that need it, what must be entered before their sample and left after it, neither of them timed.
    The order turns by one from round to round. On CUDA a sample is the device time between two events, after a write
    that leaves the second-level cache cold; it hides most of what the host does before the first kernel.
    """
    sample = _device_sample() if device.type == "cuda" else _host_sample
    enter = {name: (around or {}).get(name, nullcontext) for name in runs}
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        with enter[name]():
            repeats[name] = _repeats(run, device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, start, done = list(runs), time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while done < least or (done < most and time.perf_counter() - start < seconds):
            for name in order:
                with enter[name]():
                    samples[name].append(sample(runs[name], repeats[name]))
            order = order[1:] + order[:1]
            done += 1
    finally:
        gc.enable()
    return {name: summary(taken) for name, taken in samples.items()}


def summary(samples: list[float]) -> Times:
    """Median and quartiles of seconds, in milliseconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(1e3 * median, 1e3 * low, 1e3 * high, len(samples))


class HighWater:
    """The most that is held from here on, beyond what is held here.

    On CUDA the allocator's own count; on Linux the growth of the process's highest resident size, which sees every
    allocator.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.cuda = device.type == "cuda"
        self.counts = self.cuda or (CLEAR.exists() and sys.platform.startswith("linux"))
        if self.cuda:
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif self.counts:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide what is taken again
            CLEAR.write_text("5")
            self.before = _highest()

    def growth(self) -> int | None:
        """Bytes; None where nobody counts them."""
        if not self.counts:
            return None
        if self.cuda:
            torch.cuda.synchronize()
        return max(0, (torch.cuda.max_memory_allocated() if self.cuda else _highest()) - self.before)


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a call holds at most beyond what was there before, results included; None where nobody counts them.

    Call it on a warm run: what libraries set up once is not the operation's.
    """
    water = HighWater(device)
    run()
    return water.growth()


class DeviceClock:
    """Seconds of device time, for a timer that asks for the time before and after: pytest-benchmark's `timer`.

    CUDA events tell how long the device was between two of them, so the clock adds up the steps from call to call.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = self._event()

    def __call__(self) -> float:
        now = self._event()
        now.synchronize()
        self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _host_sample(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _device_sample() -> Callable[[Run, int], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def sample(run: Run, _: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def _repeats(run: Run, device: torch.device) -> int:
    """Calls per sample, from the second of two calls: the first may compile."""
    if device.type == "cuda":
        run()
        return 1
    run()
    return max(1, min(1000, round(SAMPLE_SECONDS / max(_host_sample(run, 1), 1e-7))))


def _highest() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found, f"{STATUS} tells no highest resident size"
    return int(found[1]) << 10
