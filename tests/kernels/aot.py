"""Compiles what a launcher launches for GPUs that this machine does not have, and reads the machine code.

The launcher itself runs, on tensors that have no memory, so what is compiled here is what it would compile there: its
constants, its number of warps, and the alignment that Triton reads off its pointers and strides.

    logits = meta(8192, 151936, dtype=torch.bfloat16)
    for kernel in compiled(lambda: gpu.forward(logits, ...), TARGETS["sm_90"]):
        assert kernel.spilled == 0 and kernel.wide_loads > 0 and kernel.registers <= 64
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAX_SIDE = 65535  # of the second and third side of a grid
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory: at address 0, as aligned as what an allocator gives."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Binary:
    """One kernel as the hardware would run it."""

    name: str
    registers: int  # per thread
    spilled: int  # bytes of memory per thread that stand in for registers
    code: str  # assembly

    @property
    def wide_loads(self) -> int:
        """How many instructions load 16 bytes per thread from global memory."""
        return len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b|\b(?:global|buffer)_load_dwordx4\b", self.code))

    @property
    def wide_stores(self) -> int:
        """How many instructions store 16 bytes per thread to global memory."""
        return len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b|\b(?:global|buffer)_store_dwordx4\b", self.code))


@dataclass(frozen=True)
class Desk:
    """The driver of a GPU that is only compiled for: Triton asks it for the target, and for nothing else."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"desk {self.target.arch}"  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def launches(target: GPUTarget) -> Iterator[list[CompiledKernel]]:
    """Meanwhile a launch compiles for `target` and does not run; the list gathers the kernels in order."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> None:
        assert all(side <= MAX_SIDE for side in grid[1:]), f"{self.__name__}: a GPU cannot launch a grid of {grid}"
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", Desk(target))
        yield kernels


def compiled(launch: Callable[[], object], target: GPUTarget) -> list[Binary]:
    """The kernels that `launch()` launches, each once, as machine code for `target`."""
    with launches(target) as kernels:
        launch()
    assert kernels, "the launcher launched nothing"
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    return [read(kernel) for kernel in {kernel.hash: kernel for kernel in kernels}.values()]


def _read_nvidia(kernel: CompiledKernel) -> Binary:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, used)
    return Binary(kernel.name, registers, stack + local, code)


def _read_amd(kernel: CompiledKernel) -> Binary:
    code = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return Binary(kernel.name, registers, spilled, code)
