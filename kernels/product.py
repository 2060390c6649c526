"""Matrix products in float32 on a CPU, by oneDNN: with AVX-512 on every x86 that has it, where MKL wants Intel's own.

torch gives products of half precision to oneDNN, and those of float32 to MKL, which takes twice the time on an AMD EPYC
(benchmarks/NOTES.md). Within `torch.backends.mkldnn.flags(enabled=False)` all is as torch does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 4 << 20  # multiplications; below, the call itself takes longer than it saves
ROWS = 4  # at least; fewer are passes over the matrix, which MKL makes as fast
STEPS = {16: 64, 32: 256, 128: inf}  # products have a multiple of so many rows, if they are that few
TILE = 1 << 20  # numbers of a result that are computed apart, before they are put where they belong

AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def served(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies (..., K) by (N, K), transposed."""
    return (
        AVAILABLE
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= FEWEST
        and x.numel() >= ROWS * x.shape[-1]
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K), (N,) -> (..., N): F.linear, differentiable once where it is oneDNN's."""
    if not served(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        found: Tensor = _Linear.apply(x, weight, bias)
        return found
    return _linear(x, weight, bias)


def fill(result: Tensor, x: Tensor, weight: Tensor) -> None:
    """`result` (M, N) becomes x @ weight.T, of (M or more, K) and (N, K) that are `served`, tile by tile.

    A large result that is made anew costs page faults, and leaves a gap in the memory when it goes.
    """
    for tile in _tiles(len(weight), len(x)):
        result[:, tile] = _multiply(x, weight[tile], None)[: len(result)]


def add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total` (M, N) gains left.T @ right, of (T, M) and (T, N): a sum over tokens, tile by tile."""
    for tile in _tiles(left.shape[1], right.shape[1]):
        total[tile] += _multiply(left[:, tile].t(), right.t(), None)


def whole(x: Tensor) -> Tensor:
    """(M, K) with rows of zeros behind, wholly(M) in all."""
    rows = len(x)
    if wholly(rows) == rows:
        return x
    found = x.new_empty(wholly(rows), x.shape[1])
    found[:rows], found[rows:] = x, 0.0
    return found


def wholly(rows: int) -> int:
    """The next number of rows that comes up again: oneDNN compiles for each, in a millisecond and half a megabyte."""
    step = next(step for step, most in STEPS.items() if rows <= most)
    return -(-rows // step) * step


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, inputs = whole(dy.reshape(-1, dy.shape[-1])), x.reshape(-1, x.shape[-1])
        return (
            _multiply(rows, weight.t(), None)[: len(inputs)].view(x.shape) if needs_x else None,
            _multiply(rows.t(), whole(inputs).t(), None) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return _multiply(whole(rows), weight, bias)[: len(rows)].view(*x.shape[:-1], len(weight))


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K), (N, K), (N,) -> (M, N): what torch's own compiler calls on a CPU."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _tiles(rows: int, width: int) -> Iterator[slice]:
    size = max(TILE // width, 1)
    return (slice(start, start + size) for start in range(0, rows, size))
