"""The ragged types that every stage speaks, and pack(), the only place that knows "token t is predicted by row t-1"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class TokenSequence(Protocol):
    """What pack() reads: a prompt that is only context, and a response whose learnable tokens are targets."""

    @property
    def prompt(self) -> list[int]: ...

    @property
    def response(self) -> list[int]: ...

    @property
    def learn(self) -> list[bool] | None: ...


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens to learn from. `learn` marks the response tokens that are targets; None means all of them."""

    prompt: list[int]
    response: list[int]
    learn: list[bool] | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled response with what the decode step already knew about each of its tokens."""

    prompt: list[int]
    response: list[int]
    logprobs: Tensor  # (len(response),) float32, under the distribution that was sampled from
    values: Tensor | None  # (len(response),) float32, the critic's value of the state before each token
    finished: bool  # it stopped by itself; False: cut at max_new_tokens
    learn: list[bool] | None = None
    raw_logprobs: Tensor | None = None  # (len(response),) float32, at temperature 1 and without filters
    bootstrap: float = 0.0  # the critic's value of the state after a response that was cut, where it was asked for
    staleness: int = 0  # changes of the weights while it was sampled


@dataclass(frozen=True, slots=True)
class Packed:
    """S sequences laid end to end: T tokens, of which R are targets. No padding, hence no mask."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, restarting at 0 in every sequence
    cu_seqlens: Tensor  # (S+1,) int32, sequence s owns tokens [cu_seqlens[s], cu_seqlens[s+1])
    rows: Tensor  # (R,) int64, index of the hidden state that predicts each target
    targets: Tensor  # (R,) int64
    cu_rows: Tensor  # (S+1,) int32, sequence s owns targets [cu_rows[s], cu_rows[s+1])
    lengths: tuple[int, ...]  # (S,) tokens per sequence, kept on the host: attention splits by them without a sync

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def last(self) -> Tensor:
        """(S,) index of every sequence's last real token: where a reward is read."""
        return self.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str) -> Packed:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "lengths"}
        return replace(self, **moved)


def pack(sequences: Sequence[TokenSequence], device: torch.device | str | None = None) -> Packed:
    """Lay sequences end to end. Target token t of a sequence is predicted by the hidden state of token t-1.

    The first token of a sequence has no predecessor and is never a target. Raises ValueError for an empty sequence.
    """
    tokens: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    num_targets: list[int] = []
    for i, sequence in enumerate(sequences):
        prompt, response, learn = sequence.prompt, sequence.response, sequence.learn
        if not prompt and not response:
            raise ValueError(f"expected at least one token in every sequence, got an empty sequence at index {i}")
        if learn is not None and len(learn) != len(response):
            expected = f"one learn mark per response token ({len(response)})"
            raise ValueError(f"sequence {i}: expected {expected}, got {len(learn)}")
        first = len(tokens) + len(prompt)  # where the response starts in the packed row
        targets = [first + j for j in range(len(response)) if learn is None or learn[j]]
        if targets and targets[0] == len(tokens):
            targets.pop(0)
        rows.extend(target - 1 for target in targets)
        tokens.extend(prompt)
        tokens.extend(response)
        lengths.append(len(prompt) + len(response))
        num_targets.append(len(targets))
    token_tensor = torch.tensor(tokens, dtype=torch.int64)
    row_tensor = torch.tensor(rows, dtype=torch.int64)
    packed = Packed(
        tokens=token_tensor,
        positions=torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64),
        cu_seqlens=cumulative(lengths),
        rows=row_tensor,
        targets=token_tensor[row_tensor + 1],
        cu_rows=cumulative(num_targets),
        lengths=tuple(lengths),
    )
    return packed if device is None else packed.to(device)


def cumulative(counts: Iterable[int]) -> Tensor:
    """[3, 0, 2] -> [0, 3, 3, 5] int32: the segment borders of a ragged tensor."""
    counts = torch.tensor([0, *counts], dtype=torch.int64)
    return counts.cumsum(0).to(torch.int32)


def segment_ids(cu: Tensor) -> Tensor:
    """(R,) index of the segment that owns each element: [0, 3, 3, 5] -> [0, 0, 0, 2, 2]."""
    counts = cu.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts), device=cu.device), counts)


def segment_sum(x: Tensor, cu: Tensor) -> Tensor:
    """(R,) -> (S,): the sum of every segment, 0 for an empty one."""
    return x.new_zeros(len(cu) - 1).index_add(0, segment_ids(cu), x)


def micro_batches(items: Sequence[T], lengths: Sequence[int], tokens_per_micro: int) -> Iterator[list[T]]:
    """Cut items, in order, into runs of at most `tokens_per_micro` tokens (at least one item each).

    The budget is a memory knob: losses are sums over one global count, so it cannot change a gradient.
    """
    micro: list[T] = []
    used = 0
    for item, length in zip(items, lengths, strict=True):
        if micro and used + length > tokens_per_micro:
            yield micro
            micro, used = [], 0
        micro.append(item)
        used += length
    if micro:
        yield micro
