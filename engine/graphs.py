"""CUDA graphs of decode steps: hundreds of launches recorded once per number of rows and span, then replayed as one.

Recorded is the whole step: trunk, head, sampler, log-probs and value. Weights that change in place are seen by every
replay. Weights that moved would not be: their addresses are part of the key under which graphs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twinhead.engine.cache import SlotCache

SHORTEST = 128  # tokens of the smallest span

Tensors = tuple[Tensor, ...]
Call = Callable[[Tensors, int], Tensors]  # static inputs (B,), and the span to read -> outputs (B,)


@dataclass
class Recorded:
    """One graph: what it reads, what it writes, and how to run it."""

    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]


@dataclass
class Graphs:
    """The graphs of one step function over one cache of `num_slots` slots.

    A step is padded to a power of two of rows: the rows behind the running ones belong to free slots, in which they may
    write. Its span is rounded up likewise, as attention ignores what lies behind a row's own keys.
    """

    step: Call
    num_slots: int
    capacity: int
    recorded: dict[tuple[int, int], Recorded] = field(default_factory=dict)

    def __call__(self, inputs: Tensors, span: int) -> Tensors:
        """The step on (B,) inputs; its outputs, valid until the next call."""
        num_rows = len(inputs[0])
        rows, span = _bucket(num_rows, 1, self.num_slots), _bucket(span, SHORTEST, self.capacity)
        if (rows, span) not in self.recorded:
            self.recorded[rows, span] = self._record(inputs, rows, span)
        found = self.recorded[rows, span]
        for static, given in zip(found.inputs, inputs, strict=True):
            static[:num_rows].copy_(given)
        found.replay()
        return tuple(output[:num_rows] for output in found.outputs)

    def _record(self, inputs: Tensors, rows: int, span: int) -> Recorded:
        static = tuple(given.new_zeros(rows) for given in inputs)
        for to, given in zip(static, inputs, strict=True):
            to[: len(given)].copy_(given)
        outputs, replay = record(lambda: self.step(static, span))
        return Recorded(static, outputs, replay)


@dataclass
class Workspace:
    """What may outlive a call of generate: the cache, and graphs over it with what they were recorded for."""

    cache: SlotCache
    graphs: Graphs | None
    key: tuple[object, ...]


def available(device: torch.device) -> bool:
    """Whether graphs can be recorded there."""
    return device.type == "cuda"


def record(call: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
    """Capture what `call` launches; its static outputs, and the function that launches it again.

    It runs twice before: libraries allocate and tune at the first call, which no graph may hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay


def _bucket(n: int, smallest: int, largest: int) -> int:
    """The power of two times `smallest` that n fits into, at most `largest`."""
    size = smallest
    while size < n:
        size *= 2
    return min(size, largest)
