"""Cases of the backend "triton" run in a child process under the interpreter, and end as they ended there."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels import interpreter

fails_in_the_child = pytest.mark.xfail(not interpreter.INTERPRETED, reason="planted", strict=True)


@triton.jit
def _double(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, at < n), at < n)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("expected", [2.0, pytest.param(3.0, marks=fails_in_the_child)])
def test_a_kernel_runs_and_a_wrong_result_is_seen(backend: str, expected: float) -> None:
    assert interpreter.INTERPRETED, "this process is not the child"
    x = torch.ones(3)
    _double[(1,)](x, 3, 4)
    assert (x == expected).all()


def test_the_backends_are_those_that_the_operation_declares() -> None:
    assert interpreter.backends("tests.kernels.test_gae")[:2] == ["torch", "cpu"]
    assert interpreter.backends("tests.kernels.test_dpo") == ["torch"]
