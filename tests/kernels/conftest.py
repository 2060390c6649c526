"""What the tests of the kernels share: the fixtures `watch` and `backend`."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from tests.kernels import interpreter
from tests.watch import Watch
from twinhead.kernels._dispatch import VARIABLE

# the interpreter replaces the compiler
collect_ignore = ["test_aot.py"] if interpreter.INTERPRETED else []
if find_spec("triton") is None:
    collect_ignore = ["test_aot.py", "test_interpreter.py"]


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
