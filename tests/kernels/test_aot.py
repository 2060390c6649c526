"""Every Triton kernel, compiled for GPUs that this machine does not have: nothing spills, loads are 16 bytes wide."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.aot import TARGETS, compiled, meta
from twinhead.kernels._head import Head
from twinhead.kernels.gae import gpu as gae
from twinhead.kernels.kl import gpu as kl
from twinhead.kernels.linear import gpu as linear
from twinhead.kernels.linear.chunked import Measures
from twinhead.kernels.linear.objective import Objective
from twinhead.kernels.logprob import gpu as logprob
from twinhead.kernels.ppo import gpu as ppo
from twinhead.kernels.sample import gpu as sample

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
ROWS = 70_000  # more than the second side of a grid may have
KERNELS = Path(logprob.__file__).parent.parent


@dataclass(frozen=True)
class Launch:
    """A call of launchers, and what their kernels may use."""

    run: Callable[[], object]
    registers: int = 80  # per thread; 80 leave room for 6 blocks of 128 threads on a core of any target
    narrow: str = ""  # the kernels, "_kernel" or "_kernel on target", that do not load 16 bytes at a time


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, SINGLE)


def launch_logprob(words: int, dtype: torch.dtype, masked: bool) -> None:
    logits, index, row_mask = meta(ROWS, words, dtype=dtype), meta(ROWS, 1, dtype=torch.int64), meta(ROWS)
    per_row, per_choice, lse = (meta(ROWS, *more, dtype=wide(dtype)) for more in ((), (1,), (2,)))
    mask, entropy = (row_mask.bool(), per_row) if masked else (None, None)
    logprob.forward(logits, index, 0.7, mask, with_entropy=masked)
    logprob.backward(logits, index, 0.7, mask, lse, per_row, per_choice, entropy)


def launch_kl(words: int, dtype: torch.dtype) -> None:
    logits, per_row, moments = (
        meta(ROWS, words, dtype=dtype),
        meta(ROWS, dtype=wide(dtype)),
        meta(ROWS, 5, dtype=wide(dtype)),
    )
    kl.measure(logits, logits, 0.7, per_row, moments)
    kl.gradient(logits, logits, 0.7, moments, per_row, logits, logits)
    kl.gradient(logits, logits, 0.7, moments, per_row, logits, None)


def launch_linear(words: int, dtype: torch.dtype, bias: torch.Tensor | None = None, **shape: float) -> None:
    head = Head(meta(words, 64, dtype=dtype), bias, wide(dtype), **shape)
    row, targets = meta(ROWS, dtype=wide(dtype)), meta(ROWS, dtype=torch.int64)
    products = meta(ROWS, -(-words // 16) * 16, dtype=wide(dtype))[:, :words]
    measures = Measures(row, row, row)
    extra = (row, 0.1) if bias is not None else (None, 0.0)
    objective = Objective(row, row, extra[0], 0.2, 0.2, None, extra[1], "k3", 0.01, meta(dtype=wide(dtype)))
    linear.measure(products, head, targets, row, measures)
    linear.gradient(products, head, targets, measures, row, extra[0])
    linear.learn(products, head, targets, row, measures, objective)


def launch_gae(dtype: torch.dtype, packed: bool) -> None:
    if packed:
        tokens = meta(2**20, dtype=dtype)
        gae.forward(tokens, tokens, 0.99, 0.95, None, meta(ROWS + 1, dtype=torch.int32), None, False)
    else:
        tokens = meta(ROWS, 512, dtype=dtype)
        gae.forward(tokens, tokens, 0.99, 0.95, tokens.bool(), None, meta(ROWS, dtype=dtype), True)


def launch_ppo(dtype: torch.dtype, count: int) -> None:
    tokens = meta(count, dtype=dtype)
    settings = [0.2, 0.2, inf, 0.2, 0.5, 0.01]
    ppo.forward(*[tokens] * 7, tokens.bool(), meta(dtype=torch.int64), 0, settings, True)


def launch_sample(words: int, dtype: torch.dtype) -> None:
    for filters in ({}, {"top_k": 50, "top_p": 0.9, "min_p": 0.1}, {"temperature": 0.0}):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
        sample.sample(meta(ROWS, words, dtype=dtype), meta(ROWS), **settings)


LAUNCHES = {
    "logprob": Launch(lambda: launch_logprob(151936, HALF, masked=False)),
    "logprob, masked, with entropy, odd rows": Launch(lambda: launch_logprob(50257, HALF, masked=True)),
    "logprob, float32, odd rows": Launch(lambda: launch_logprob(50257, SINGLE, masked=True)),
    "logprob, float64": Launch(lambda: launch_logprob(1000, DOUBLE, masked=True), registers=128),
    "kl": Launch(lambda: launch_kl(151936, HALF), narrow="_kl_fwd on gfx942, _kl_bwd on gfx942"),
    "kl, float32, odd rows": Launch(lambda: launch_kl(50257, SINGLE)),
    "linear": Launch(lambda: launch_linear(151936, HALF)),
    "linear, bias, softcap, odd rows": Launch(
        lambda: launch_linear(50257, HALF, meta(50257, dtype=HALF), softcap=30.0)
    ),
    "gae, packed": Launch(lambda: launch_gae(SINGLE, packed=True), registers=168, narrow="_gae_fwd"),
    "gae, padded, whitened": Launch(
        lambda: launch_gae(HALF, packed=False), registers=168, narrow="_gae_fwd, _gae_join, _gae_whiten"
    ),
    "ppo": Launch(lambda: launch_ppo(SINGLE, 65536), narrow="_ppo_fwd on gfx942, _ppo_finish"),
    "sample": Launch(lambda: launch_sample(151936, HALF), registers=128),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_the_machine_code(launch: Launch, target: str) -> None:
    for kernel in compiled(launch.run, TARGETS[target]):
        assert kernel.spilled == 0, f"{kernel.name} spills {kernel.spilled} bytes per thread"
        assert kernel.registers <= launch.registers, f"{kernel.name} takes {kernel.registers} registers"
        if not {kernel.name, f"{kernel.name} on {target}"}.intersection(launch.narrow.split(", ")):
            assert kernel.wide_loads, f"{kernel.name} never loads 16 bytes at a time"


def test_no_kernel_is_left_out() -> None:
    """Every kernel that some gpu.py launches, `_kernel[grid](...)`, is compiled by one of the launches above."""
    launched = {
        node.func.value.id
        for path in KERNELS.glob("*/gpu.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    seen = {kernel.name for launch in LAUNCHES.values() for kernel in compiled(launch.run, TARGETS["gfx942"])}
    assert launched == seen


@pytest.mark.parametrize(
    "launch",
    [
        lambda words: launch_logprob(words, HALF, masked=True),
        lambda words: launch_kl(words, HALF),
        lambda words: launch_ppo(SINGLE, words),
    ],
    ids=["logprob", "kl", "ppo"],
)
def test_another_size_is_not_another_kernel(launch: Callable[[int], None]) -> None:
    sizes = (50257, 50256, 31, 1001, 4096, 151936)
    every, first = (compiled(lambda s=some: [launch(x) for x in s], TARGETS["sm_80"]) for some in (sizes, sizes[:1]))
    assert [kernel.name for kernel in every] == [kernel.name for kernel in first]


@triton.jit
def _planted(x, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    values = tl.load(x + lane)
    tl.store(out + lane, tl.exp(values - tl.max(values)))


@pytest.mark.parametrize("target", TARGETS)
def test_a_planted_kernel_that_spills_is_seen(target: str) -> None:
    few_registers = {"waves_per_eu": 8} if TARGETS[target].backend == "hip" else {"maxnreg": 32}
    for block, spills in ((4096, True), (256, False)):
        options = {"BLOCK": block, "num_warps": 1, **few_registers}
        (kernel,) = compiled(lambda options=options: _planted[(1,)](meta(4096), meta(4096), **options), TARGETS[target])
        assert kernel.name == "_planted" and 8 < kernel.registers <= 64
        assert (kernel.spilled > 0) == spills


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])  # gfx942 loads 16 bytes at any address
def test_planted_narrow_loads_are_seen(target: str) -> None:
    words = torch.zeros(4096 + 1)
    for x, wide in ((words[:-1], True), (words[1:], False)):
        (kernel,) = compiled(lambda x=x: _planted[(1,)](x, words, BLOCK=1024, num_warps=4), TARGETS[target])
        assert (kernel.wide_loads > 0) == wide
        assert kernel.wide_stores > 0
