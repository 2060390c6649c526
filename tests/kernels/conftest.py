"""What the tests of the kernels share: a watch over the operations that torch runs, and the fixture `backend`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import interpreter
from twinhead.kernels._dispatch import VARIABLE

# the interpreter replaces the compiler
collect_ignore = ["test_aot.py"] if interpreter.INTERPRETED else []
if find_spec("triton") is None:
    collect_ignore = ["test_aot.py", "test_interpreter.py"]

MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation made, and the work of the matrix products.

    A dispatch mode does not see what happens inside an operator of torch.library, so the watch runs its body itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # elements
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if ours := OPDEFS.get(func._schema.name):
            with self:
                return ours._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in made)])
        if func in MATRIX_PRODUCTS:
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        assert "bmm" not in str(func), "the watch does not count batched products"
        return result


@pytest.fixture
def watch() -> Watch:
    return Watch()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `backend` runs on all that its operation has, unless it names some itself."""
    named = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not named:
        metafunc.parametrize("backend", interpreter.backends(metafunc.module.__name__), indirect=True)


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The backend that every call of the test runs on; see interpreter.py for what happens to "triton"."""
    own = tmp_path_factory.getbasetemp()
    request.node.stash[interpreter.SHARED] = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Cases that must run under the Triton interpreter take their outcome from its process."""
    if not interpreter.is_delegated(pyfuncitem):
        return None
    interpreter.report(pyfuncitem)
    return True
