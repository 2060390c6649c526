"""The cases of `python -m benchmarks kernels` for pytest-benchmark: `pytest benchmarks --benchmark-only`.

One group per case, one row per provider: save, compare and plot them with the options of pytest-benchmark. On a GPU the
times are device times from CUDA events. Unlike the command, pytest-benchmark times one provider after the other. Small
shapes: `TWINHEAD_QUICK=1`.
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import cases, gate
from benchmarks.cases import Case, Problem
from benchmarks.contender import OURS
from benchmarks.peers import Missing
from benchmarks.providers import providers
from benchmarks.timing import DeviceClock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = DeviceClock() if DEVICE == "cuda" else time.perf_counter
CASES = cases.cases(DEVICE, quick=os.environ.get("TWINHEAD_QUICK") == "1")


@lru_cache(maxsize=1)
def posed(case: Case) -> tuple[Problem, gate.Answer]:
    """The problem of a case and its exact answer, kept until the next case asks."""
    torch.compiler.reset()
    problem = case.problem(torch.device(DEVICE))
    return problem, gate.exact(case, problem)


def pairs() -> list[Any]:
    """Every provider of every case."""
    found = []
    for case in CASES:
        group = pytest.mark.benchmark(group=f"{case.op}: {case.title}", timer=CLOCK)
        for name in providers(case.op):
            found.append(pytest.param(case, name, marks=group, id=f"{case.op}-{case.title}-{name}"))
    return found


@pytest.mark.parametrize(("case", "name"), pairs())
def test_kernel(case: Case, name: str, benchmark: Any) -> None:
    """The answer is right, and so long does it take."""
    problem, expected = posed(case)
    try:
        call = providers(case.op)[name](problem)
        run = gate.asked(call, problem)
        error = gate.error(case, problem, call, run(), expected)
    except Missing as reason:
        pytest.skip(str(reason))
    except ValueError as reason:
        if name in OURS.values() and "backend" in str(reason):
            pytest.skip(str(reason))
        raise
    assert error <= gate.tolerance(problem), "a wrong answer has no time"
    benchmark.name = name
    benchmark(run)
