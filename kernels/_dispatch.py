"""Which implementation of an operation runs: named by the caller, named by the environment, or picked by device.

    "triton"  CUDA tensors; CPU tensors too when TRITON_INTERPRET=1
    "cpu"     CPU tensors, the C++ extension twinhead.kernels._C
    "torch"   any device, plain PyTorch

A backend that was named and does not exist, for this operation or on this machine, raises: nothing falls back silently.
The variable speaks to the operations that are implemented more than once: where PyTorch is all there is, there
is nothing to choose, and a training run under TWINHEAD_KERNELS=cpu does not end at `whiten`.
Without a name, CUDA tensors go to "triton", CPU tensors to "cpu", everything else to "torch"; and so does an operation
that has no such backend, or an installation that lacks it, because Triton is not there or the extension was never
built. That is a choice, not a failure that is hidden: a backend that is there but broken raises its own error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch

BACKENDS = ("triton", "cpu", "torch")
VARIABLE = "TWINHEAD_KERNELS"
EXTENSION = "twinhead.kernels._C"

Answer = TypeVar("Answer", bound=Callable[..., Any])


class Backends:
    """The backends of one operation: `Backends(__name__, cpu="cpu", torch="reference")` names a module for each."""

    def __init__(self, package: str, **modules: str) -> None:
        unknown = set(modules) - set(BACKENDS)
        assert not unknown and "torch" in modules, f"{package} declares the backends {sorted(modules)}"
        self.package, self.modules = package, modules

    def pick(self, op: str, device: torch.device, backend: str | None = None) -> ModuleType:
        """The module that runs `op` on `device`: `backend`, else TWINHEAD_KERNELS, else the best one for the device.

        Raises ValueError if the named backend is unknown, or missing from this operation or from this machine.
        """
        name = backend or os.environ.get(VARIABLE) or self._best(device)
        if name not in BACKENDS:
            raise ValueError(f"{op}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
        if not backend and len(self.modules) == 1:
            name = "torch"
        if name not in self.modules:
            raise ValueError(f"{op}: no backend {name!r} for this operation, expected one of {', '.join(self.modules)}")
        if obstacle := _obstacle(name, device):
            raise ValueError(f"{op}: backend {name!r} cannot run here, {obstacle}")
        return _load(f"{self.package}.{self.modules[name]}")

    def _best(self, device: torch.device) -> str:
        native = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
        return native if native in self.modules and _obstacle(native, device) is None else "torch"


def _obstacle(backend: str, device: torch.device) -> str | None:
    """Why this machine cannot run `backend` on tensors of `device`, or None if it can."""
    if backend == "triton":
        if not _installed("triton"):
            return "the package triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"expected CUDA tensors (or TRITON_INTERPRET=1), got tensors on {device.type}"
    if backend == "cpu":
        if device.type != "cpu":
            return f"expected CPU tensors, got tensors on {device.type}"
        if not _installed(EXTENSION):
            return f"the extension {EXTENSION} is not built"
    return None


def _load(module: str) -> ModuleType:
    return sys.modules[_imported(module)]


def _constant(function: Answer) -> Answer:
    """torch.compiler.assume_constant_result, which would load the compiler and Triton with every import of ours."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# torch.compile cannot trace the import system; these two answers it takes as they are when it traces
@_constant
def _imported(module: str) -> str:
    return importlib.import_module(module).__name__


@_constant
def _installed(module: str) -> bool:
    return _found(module)


@cache
def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
