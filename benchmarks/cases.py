"""What is measured: for every operation the shapes, the tensors, and the limit that it is held against.

A limit is work that the operation cannot avoid, done by torch alone and timed in the same rounds: a bare read (or a
device copy) for what is bound by memory, the library's matrix products for what is bound by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run

LOG_RATIOS = (-0.6, -0.05, 0.05, 0.6)  # far from the clip's corners, where a rounding error would flip a gradient
CHUNK = 256  # rows of a chunk wherever something is computed that need not be fast


@dataclass(frozen=True)
class Problem:
    """The tensors that every contender gets, by name."""

    tensors: dict[str, Tensor]
    shared: tuple[str, ...] = ()  # those that have no row per token
    learn: tuple[str, ...] = ()  # those whose gradient is asked for; none: forward only
    cotangents: tuple[Tensor, ...] = ()  # of the outputs that are not a scalar
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def double(self, rows: slice | None = None) -> Problem:
        """The same problem in float64, or some rows of it."""

        def wide(name: str, tensor: Tensor) -> Tensor:
            part = tensor if rows is None or name in self.shared else tensor[rows]
            part = part.detach().double() if part.is_floating_point() else part
            return part.requires_grad_() if name in self.learn else part

        cotangents = tuple((c if rows is None else c[rows]).double() for c in self.cotangents)
        return replace(self, tensors={n: wide(n, t) for n, t in self.tensors.items()}, cotangents=cotangents)


@dataclass(frozen=True)
class Limit:
    """Work that cannot be avoided: `share` times the time of `run`."""

    name: str
    run: Run
    share: float = 1.0


@dataclass(frozen=True)
class Case:
    """One operation on one shape."""

    op: str
    title: str
    problem: Callable[[torch.device], Problem]
    limit: Callable[[Problem], Limit]
    by_rows: bool = True  # the exact answer can be computed chunk by chunk


def cases(device: str, quick: bool = False) -> list[Case]:
    """The cases of a device. `quick` has the same ones on shapes that show that everything runs, and nothing else."""
    small = 8 if quick else 1
    rows, words = {"cpu": (1024, 32000), "cuda": (8192, 151936)}[device]
    head_rows, width = {"cpu": (2048, 512), "cuda": (8192, 4096)}[device]
    others = {"cpu": (4096, 32000), "cuda": (8192, 50257)}[device]  # rows of 50257 halves do not start at 16 bytes
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device]
    return [
        *every_operation(
            rows // small, words // small, head_rows // small, width // small, 256 // small, 64 // small, dtype
        ),
        *_logits(others[0] // small, others[1] // small, dtype),
    ]


def every_operation(
    rows: int, words: int, head_rows: int, width: int, sequences: int, drawn: int, dtype: torch.dtype
) -> list[Case]:
    """A few cases of each operation on logits (rows, words), heads (head_rows, width, words), and so on."""
    return [
        *_logits(rows, words, dtype),
        *_heads(head_rows, width, words, dtype),
        *_tokens(sequences, sequences),
        *_divergences(rows, words, dtype),
        *_sampling(drawn, words, dtype),
    ]


def _logits(rows: int, words: int, dtype: torch.dtype) -> list[Case]:
    found = []
    for op, num_outputs in (("selective_log_softmax", 1), ("selective_log_softmax_and_entropy", 2)):
        for backward in (False, True):
            make = partial(logits, rows, words, dtype, backward, num_outputs)
            limit = read_read_write if backward else read
            found.append(Case(op, _title(backward, dtype, rows, words), make, partial(limit, ["logits"])))
    return found


def _heads(rows: int, width: int, words: int, dtype: torch.dtype) -> list[Case]:
    shape = (rows, width, words)
    forward, backward = _title(False, dtype, *shape), _title(True, dtype, *shape)
    head, loss, pair = partial(heads, *shape, dtype), partial(losses, *shape, dtype), partial(pairs, *shape, dtype)
    return [
        Case("linear_logprob", forward, partial(head, False), partial(products, 1)),
        Case("linear_logprob", backward, partial(head, True), partial(products, 4)),
        Case("linear_ppo_loss", backward, loss, partial(products, 3)),
        Case("linear_kl", forward, partial(pair, False), partial(products, 2)),
        Case("linear_kl", backward, partial(pair, True), partial(products, 4)),
    ]


def _divergences(rows: int, words: int, dtype: torch.dtype) -> list[Case]:
    both, found = ["logits", "ref_logits"], []
    for backward, limit in ((False, partial(read, both)), (True, partial(read_read_write, both))):
        make = partial(two_logits, rows, words, dtype, backward)
        found.append(Case("full_kl", _title(backward, dtype, rows, words), make, limit))
    return found


def _tokens(sequences: int, mean: int) -> list[Case]:
    title = f"{sequences} sequences, mean length {mean}, float32"
    count = sequences * mean
    return [
        Case("gae", title, partial(episodes, sequences, mean, False), partial(copy, 2), by_rows=False),
        Case("gae", f"{title}, whitened", partial(episodes, sequences, mean, True), partial(copy, 2), by_rows=False),
        Case(
            "ppo_loss", f"{count:,} tokens float32, forward and backward", partial(experience, count),
            partial(copy, 4), by_rows=False,
        ),
    ]  # fmt: skip


def _sampling(rows: int, words: int, dtype: torch.dtype) -> list[Case]:
    found = []
    for filters in ({}, {"top_k": 50, "top_p": 0.9}):
        written = "".join(f", {name} {value}" for name, value in filters.items())
        title = _title(False, dtype, rows, words).replace(", forward", written)
        found.append(Case("sample", title, partial(draws, rows, words, dtype, filters), partial(read, ["logits"])))
    return found


# problems ---------------------------------------------------------------------------------------------------------


def logits(
    rows: int, words: int, dtype: torch.dtype, backward: bool, num_outputs: int, device: torch.device
) -> Problem:
    """logits (R, V), index (R,)."""
    draw = _generator(device)
    tensors = {"logits": 3 * _normal(draw, dtype, rows, words), "index": _integers(draw, words, rows)}
    return _learning(tensors, ("logits",) if backward else (), (), [rows] * num_outputs, draw)


def two_logits(rows: int, words: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Problem:
    """logits and ref_logits (R, V), a little apart."""
    draw = _generator(device)
    policy = 3 * _normal(draw, dtype, rows, words)
    tensors = {"logits": policy, "ref_logits": policy + 0.5 * _normal(draw, dtype, rows, words)}
    return _learning(tensors, ("logits",) if backward else (), (), [rows], draw)


def heads(rows: int, width: int, words: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Problem:
    """hidden (R, D), weight (V, D), targets (R,)."""
    draw = _generator(device)
    tensors = {
        "hidden": _normal(draw, dtype, rows, width),
        "weight": _normal(draw, dtype, words, width).mul_(2 / math.sqrt(width)),
        "targets": _integers(draw, words, rows),
    }
    return _learning(tensors, ("hidden", "weight") if backward else (), ("weight",), [rows], draw)


def losses(rows: int, width: int, words: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A head, old_logprobs and advantages (R,), the latter constant over each of 8 sequences, as in GRPO."""
    draw = _generator(device)
    head = heads(rows, width, words, dtype, True, device)
    with torch.no_grad():
        hidden, weight = head["hidden"], head["weight"]
        chunks = [
            (part @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            for part, targets in zip(hidden.split(CHUNK), head["targets"].split(CHUNK), strict=True)
        ]
    steps = torch.tensor(LOG_RATIOS, device=device)[_integers(draw, len(LOG_RATIOS), rows)]
    old_logprobs = torch.cat(chunks) - steps
    advantages = _normal(draw, torch.float32, 8).repeat_interleave(rows // 8)
    count = torch.tensor(float(rows), device=device)
    tensors = {**head.tensors, "old_logprobs": old_logprobs, "advantages": advantages, "count": count}
    return _learning(tensors, ("hidden", "weight"), ("weight", "count"), [], draw)


def pairs(rows: int, width: int, words: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Problem:
    """A policy's head and a reference's, so far apart that logits rounded to half precision still tell how far."""
    draw = _generator(device)
    tensors = dict(heads(rows, width, words, dtype, False, device).tensors)
    del tensors["targets"]
    tensors["ref_hidden"] = tensors["hidden"] + 0.7 * _normal(draw, dtype, rows, width)
    tensors["ref_weight"] = tensors["weight"].clone()
    learn = ("hidden", "weight") if backward else ()
    return _learning(tensors, learn, ("weight", "ref_weight"), [rows], draw)


def episodes(sequences: int, mean: int, whiten: bool, device: torch.device) -> Problem:
    """rewards and values (R,), cu_seqlens (S+1,) int32; lengths are uniform in 1 .. 2 mean - 1 and sum to S mean."""
    draw = _generator(device)
    half = torch.randint(1, 2 * mean, (sequences // 2,), generator=draw, device=device)
    lengths = torch.cat([half, 2 * mean - half])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    tensors = {
        "rewards": _normal(draw, torch.float32, sequences * mean),
        "values": _normal(draw, torch.float32, sequences * mean),
        "cu_seqlens": cu_seqlens,
    }
    return Problem(tensors, settings={"whiten": whiten})


def experience(count: int, device: torch.device) -> Problem:
    """Six vectors (R,) of one PPO step, near the policy that made them."""
    draw = _generator(device)
    old_logprobs, advantages, old_values, returns = (_normal(draw, torch.float32, count) for _ in range(4))
    tensors = {
        "logprobs": old_logprobs + 0.2 * _normal(draw, torch.float32, count),
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": old_values + 0.2 * _normal(draw, torch.float32, count),
        "old_values": old_values,
        "returns": returns,
    }
    return _learning(tensors, ("logprobs", "values"), (), [], draw)


def draws(rows: int, words: int, dtype: torch.dtype, filters: dict[str, float], device: torch.device) -> Problem:
    """logits (B, V), uniforms (B,)."""
    draw = _generator(device)
    uniforms = torch.rand(rows, generator=draw, device=device)
    return Problem({"logits": 3 * _normal(draw, dtype, rows, words), "uniforms": uniforms}, settings=dict(filters))


# limits -----------------------------------------------------------------------------------------------------------


def read(names: Sequence[str], problem: Problem) -> Limit:
    """One read of each tensor: x.sum() on the CPU, half the time of a device copy on CUDA."""
    given = [problem[name].detach() for name in names]
    number = {1: "one read", 2: "two reads"}[len(given)]
    if given[0].is_cuda:
        return Limit(f"{number} at copy bandwidth", _copies(given), 0.5)
    return Limit(number, lambda: [x.sum() for x in given])


def read_read_write(names: Sequence[str], problem: Problem) -> Limit:
    """Forward and backward as two passes: each reads all tensors, the second also writes a gradient like the first."""
    given = [problem[name].detach() for name in names]
    gradient = torch.empty_like(given[0])
    if gradient.is_cuda:
        passes = 2 * len(given) + 1
        return Limit(f"{passes} passes at copy bandwidth", _copies(given[:1]), passes / 2)
    reads = given + given[1:]

    def run() -> None:
        for x in reads:
            x.sum()
        gradient.copy_(given[0])

    return Limit({1: "a read and a copy", 3: "three reads and a copy"}[len(reads)], run)


def copy(count: int, problem: Problem) -> Limit:
    """As many bytes as the operation reads and writes, copied: `count` of its (R,) vectors."""
    longest = max(problem.tensors.values(), key=Tensor.numel).detach()
    return Limit(f"copy of {count} vectors", _copies([longest.expand(count, -1).contiguous()]))


def products(count: int, problem: Problem) -> Limit:
    """The library's matrix products alone: logits, hidden gradient, weight gradient; 2 and 4 form the logits twice."""
    hidden, weight = problem["hidden"].detach(), problem["weight"].detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    if count < 3:
        return Limit(f"{count} matrix product{'s' * (count > 1)}", partial(_form, logits, hidden, weight, count))
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        _form(logits, hidden, weight, count - 2)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return Limit(f"{count} matrix products", run)


def _form(logits: Tensor, hidden: Tensor, weight: Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(hidden, weight.t(), out=logits)


def _copies(given: list[Tensor]) -> Run:
    targets = [torch.empty_like(x) for x in given]
    return lambda: [target.copy_(x) for target, x in zip(targets, given, strict=True)]


# parts ------------------------------------------------------------------------------------------------------------


def _title(backward: bool, dtype: torch.dtype, *shape: int) -> str:
    written = " × ".join(map(str, shape))
    return f"{written} {str(dtype).removeprefix('torch.')}, forward{' and backward' * backward}"


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _normal(draw: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, device=draw.device, dtype=dtype)


def _integers(draw: torch.Generator, below: int, count: int) -> Tensor:
    return torch.randint(below, (count,), generator=draw, device=draw.device)


def _learning(
    tensors: dict[str, Tensor],
    learn: tuple[str, ...],
    shared: tuple[str, ...],
    outputs: list[int],
    draw: torch.Generator,
) -> Problem:
    for name in learn:
        tensors[name].requires_grad_()
    cotangents = tuple(_normal(draw, torch.float32, rows) for rows in outputs) if learn else ()
    return Problem(tensors, shared, learn, cotangents)
