"""A contender: what is timed, how a peer's function becomes one, and why one may be missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.peers import Missing

EAGER, COMPILED = "torch eager", "torch.compile"
OURS = {backend: f"twinhead {backend}" for backend in ("torch", "cpu", "triton")}

Outputs = tuple[Tensor | None, ...]  # None: this contender gives something else in that place


def _as_they_are(outputs: Outputs) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Call:
    """What is timed, and what turns its outputs into those of the eager version."""

    run: Callable[[], Outputs]
    read: Callable[[Outputs], Outputs] = _as_they_are
    leaves: tuple[Tensor, ...] = ()  # what learns, in place of the problem's own: for one who overwrites it


Maker = Callable[[Problem], Call]


def call(function: Callable[..., Outputs], settings: bool = False) -> Maker:
    """A maker for a function that takes the problem's tensors as they are, and its settings where it has some."""

    def make(problem: Problem) -> Call:
        tensors = tuple(problem.tensors.values())
        chosen = problem.settings if settings else {}
        return Call(lambda: function(*tensors, **chosen))

    return make


def with_compile(definition: Callable[..., Outputs], settings: bool = False) -> dict[str, Maker]:
    """The definition, and what torch.compile makes of it."""

    def compiled(problem: Problem) -> Call:
        return call(torch.compile(definition, dynamic=False), settings)(problem)

    return {EAGER: call(definition, settings), COMPILED: compiled}


def ours_on(function: Callable[..., Outputs], settings: bool = False) -> dict[str, Maker]:
    """Our function on each backend."""
    return {name: call(partial(function, backend=backend), settings) for backend, name in OURS.items()}


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """TWINHEAD_KERNELS is `backend`: also for the functions whose signature, TRL's, has no place for it."""
    before = os.environ.get("TWINHEAD_KERNELS")
    os.environ["TWINHEAD_KERNELS"] = backend
    try:
        yield
    finally:
        os.environ.pop("TWINHEAD_KERNELS")
        if before is not None:
            os.environ["TWINHEAD_KERNELS"] = before


def wide(x: Tensor) -> Tensor:
    """float32 for half precision, as trainers do before a softmax; a wider dtype stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def absent(reason: str) -> Maker:
    """The maker of one who cannot compute this at all."""

    def make(problem: Problem) -> Call:
        raise Missing(reason)

    return make


def expect_cuda(tensor: Tensor) -> None:
    """Raises Missing for a tensor that is not on a GPU."""
    if not tensor.is_cuda:
        raise Missing("its Triton kernel needs a GPU")
