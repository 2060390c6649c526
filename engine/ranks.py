"""Ranks: the processes that train one model together, and what they tell each other; one alone pays nothing.

Started by torchrun, W processes take the steps that one would take. Each of them knows the whole batch and everything
that was measured of it, so that all decide alike; what a model is asked and what is learned from is shared out. Losses
are divided by counts over all ranks, so gradients are summed, never averaged. Only the first rank writes, and speaks.
"""

from __future__ import annotations

import datetime
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
N = TypeVar("N", int, float)
BUCKET = 64 * 2**20  # bytes that travel at a time
PATIENCE = datetime.timedelta(hours=12)  # with which ranks wait for each other: the first one may ask slow functions


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if size() > 1 else 0


def asked() -> int:
    """How many processes whoever started this one has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device_type: str) -> None:
    """Meet the other processes that torchrun has started, if any; each takes a GPU of its own, by its LOCAL_RANK.

    Raises ValueError where this machine has fewer GPUs than processes.
    """
    if asked() == 1 or size() > 1:
        return
    backend = "gloo"
    if device_type == "cuda":
        own, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= found:
            local = os.environ.get("LOCAL_WORLD_SIZE", asked())
            raise ValueError(f"device: expected a GPU for every process of this machine, got {found} for {local}")
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes, at the end of all work."""
    if size() > 1:
        dist.destroy_process_group()


# -- sharing work out --------------------------------------------------------------------------------------------------


def owners(sizes: Sequence[int]) -> list[int]:
    """The rank that each piece of work falls to, about as much to each: the largest first, to who has least."""
    loads, owner = [0] * size(), [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += sizes[i]
    return owner


def share(sizes: Sequence[int]) -> list[int]:
    """The pieces of work, by number and in order, that fall to this rank; with one rank all of them."""
    return [i for i, owner in enumerate(owners(sizes)) if owner == rank()]


def spread(work: Callable[[range], T], num: int) -> list[T]:
    """What every rank's work on its part of the numbers 0..num-1 has come to, in the order of the parts.

    An error on one rank is raised on all of them.
    """
    whole, own = size(), rank()
    if whole == 1:
        return [work(range(num))]
    return _told(lambda: work(range(num * own // whole, num * (own + 1) // whole)))


def alone(work: Callable[[range], T], num: int) -> list[T]:
    """spread() for what one process does by itself, also beside others that do something else."""
    return [work(range(num))]


def first(work: Callable[[], T]) -> T:
    """What the first rank's work has come to; the others wait for it. Its error is raised on all of them."""
    if size() == 1:
        return work()
    return _told(work if rank() == 0 else lambda: None)[0]  # type: ignore[return-value]


# -- telling each other ------------------------------------------------------------------------------------------------


def total(number: N) -> N:
    """The sum of every rank's number."""
    return number if size() == 1 else sum(gathered(number))


def gathered(item: T) -> list[T]:
    """Every rank's item. Its tensors come to the host, or to this rank's GPU where they lay on one."""
    if size() == 1:
        return [item]
    said: list[Any] = [None] * size()
    dist.all_gather_object(said, _written(item))
    return [item if i == rank() else _read(words) for i, words in enumerate(said)]


def collected(item: T) -> list[T]:
    """Every rank's item, for the first rank; nothing for the others."""
    if size() == 1:
        return [item]
    said: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(_written(item), said)
    return [_read(words) for words in said or ()]


def cat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors of all ranks laid end to end, on every rank."""
    return torch.cat(gathered(_laid(tensors)))


def over_all(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(R,) -> (R,) of the tensors of all ranks laid end to end, cut again: what became of this rank's."""
    parts = gathered(_laid(tensors))
    before = sum(len(part) for part in parts[: rank()])
    found = function(torch.cat(parts))[before : before + len(parts[rank()])]
    return found.split([len(tensor) for tensor in tensors])


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Leave in every parameter the sum of all ranks' gradients; None where no rank has one."""
    if size() == 1:
        return
    some = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(some, op=dist.ReduceOp.MAX)
    gradients: list[Tensor] = []
    for p, learned in zip(parameters, some.tolist(), strict=True):
        if learned:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients.append(p.grad)
    _in_buckets(gradients, dist.all_reduce)


def send_parameters(parameters: Sequence[nn.Parameter]) -> None:
    """Write into every parameter what stands in it on the rank whose share of their sizes it is."""
    if size() == 1:
        return
    owner = owners([p.numel() for p in parameters])
    for source in range(size()):
        theirs = [p.data for p, whose in zip(parameters, owner, strict=True) if whose == source]
        _in_buckets(theirs, lambda flat, source=source: dist.broadcast(flat, source))  # type: ignore[misc]


class Spread(Protocol):
    """spread() or alone(): who takes which part of the numbers 0..num-1."""

    def __call__(self, work: Callable[[range], T], num: int) -> list[T]: ...


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a rank says instead of a result."""

    kind: type[Exception]
    sentence: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        kind = next((k for k in (ValueError, OSError) if isinstance(error, k)), None)
        return cls(kind or RuntimeError, str(error) if kind else f"rank {rank()}: {type(error).__name__}: {error}")


def _told(work: Callable[[], T]) -> list[T]:
    """Every rank's result. Raises on all of them what was raised on one."""
    try:
        found: T | _Failure = work()
    except Exception as error:
        gathered(_Failure.of(error))
        raise
    said = gathered(found)
    for result in said:
        if isinstance(result, _Failure):
            raise result.kind(result.sentence)
    return said  # type: ignore[return-value]


def _laid(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors end to end; none, where a rank has nothing to do, are an empty one."""
    if tensors:
        return torch.cat(list(tensors)).detach()
    return torch.zeros(0, device="cuda" if "nccl" in dist.get_backend_config() else "cpu")


def _written(item: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


def _read(words: bytes) -> Any:
    return torch.load(io.BytesIO(words), map_location=_here, weights_only=False)


def _here(storage: Any, place: str) -> Any:
    """Another rank's memory, on the same kind of device of this one."""
    return storage if place == "cpu" else storage.cuda()


def _in_buckets(tensors: Sequence[Tensor], send: Callable[[Tensor], object]) -> None:
    """Let tensors travel many at a time, laid end to end, and bring back what became of them."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        send(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, of at most BUCKET bytes together or one alone."""
    bucket: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda t: str(t.dtype)):
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
