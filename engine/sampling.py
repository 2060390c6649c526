"""How responses are drawn: limits, filters, stops, and numbers that make a row independent of its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twinhead.engine.config import check

Numbers = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. temperature=0 is greedy; stop=None takes the checkpoint's EOS ids."""

    max_new_tokens: Numbers = 128  # one number for all prompts, or one for each
    min_new_tokens: Numbers = 0  # so many tokens come before a stop: until then stop tokens have probability 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # rows differ by their place among the prompts, unless
    first_row: int = 0  # that place of the first prompt, where these are a part of all
    seeds: tuple[int, ...] | None = None  # each prompt has its own: then it may stand at any place
    stop: tuple[int, ...] | None = None
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # a response also ends with any of these runs of tokens
    bootstrap: bool = False  # one more step for what was cut at its limit: the critic's value of the state after it
    num_slots: int = 256  # sequences that decode side by side
    cache_bytes: int | None = None  # of keys and values; what does not fit waits, or is read again later
    keep_cache: bool = False  # keys, values and graphs stay allocated for the next call, as policy.kept
    cuda_graphs: bool = False  # record the decode step once per number of rows, and replay it: on a GPU

    def __post_init__(self) -> None:
        least, most = _smallest(self.min_new_tokens), _smallest(self.max_new_tokens)
        check(
            self,
            max_new_tokens=(most >= 1, "at least 1"),
            min_new_tokens=(least >= 0, "at least 0"),
            temperature=(self.temperature >= 0, "at least 0 (0: greedy)"),
            top_k=(self.top_k >= 0, "at least 0 (0: off)"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1"),
            min_p=(0 <= self.min_p < 1, "at least 0 and below 1"),
            stop_sequences=(all(self.stop_sequences), "at least one token in each"),
            num_slots=(self.num_slots >= 1, "at least 1"),
        )

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, or are its greedy choice."""
        return self.temperature in (0, 1) and not (self.top_k or self.min_p) and self.top_p == 1

    def limits(self, num_prompts: int) -> list[tuple[int, int]]:
        """The fewest and the most new tokens of every prompt. Raises ValueError where they do not fit the prompts."""
        options = ("min_new_tokens", "max_new_tokens")
        limits = list(zip(*(self._each(option, num_prompts) for option in options), strict=True))
        for i, (least, most) in enumerate(limits):
            if least > most:
                raise ValueError(f"prompt {i}: expected min_new_tokens of at most max_new_tokens {most}, got {least}")
        return limits

    def uniforms(self, rows: Tensor, num_prompts: int, num: int) -> Tensor:
        """(B,) rows of N prompts -> (B, num): the numbers that decide their tokens, whoever else is sampled with them.

        Raises ValueError for seeds that are not one per prompt.
        """
        if self.seeds is None:
            return uniforms(torch.tensor(self.seed, device=rows.device), rows + self.first_row, num)
        seeds = torch.tensor(self._each("seeds", num_prompts), device=rows.device)
        return uniforms(seeds[rows], torch.zeros_like(rows), num)

    def _each(self, option: str, num_prompts: int) -> list[int]:
        given = getattr(self, option)
        numbers = [given] * num_prompts if isinstance(given, int) else list(given)
        if len(numbers) != num_prompts:
            expected = f"one number, or one for each of {num_prompts} prompts"
            raise ValueError(f"{option}: expected {expected}, got {len(numbers)}")
        return numbers


class Stops:
    """Which rows have just ended, by a stop token or by the last tokens of a stop sequence."""

    def __init__(self, tokens: tuple[int, ...], sequences: tuple[tuple[int, ...], ...], device: torch.device) -> None:
        self.tokens = torch.tensor(tokens, dtype=torch.int64, device=device)
        self.sequences = [torch.tensor(s, dtype=torch.int64, device=device) for s in sequences]

    def __bool__(self) -> bool:
        return bool(len(self.tokens) or self.sequences)

    def __call__(self, written: Tensor, first: Tensor, count: Tensor, last: Tensor, least: Tensor) -> Tensor:
        """(B,) bool. Row b has drawn `count[b]` tokens, at `first[b]` and after in `written`; the newest is `last[b]`.

        Stop tokens cannot be drawn before the least number (see Sampling); sequences are not looked for until then.
        """
        stopped = torch.isin(last, self.tokens)
        for sequence in self.sequences:
            n = len(sequence)
            tail = (first + count)[:, None] + torch.arange(-n, 0, device=first.device)
            found = (written[tail.clamp(min=0)] == sequence).all(1)
            stopped |= found & (count >= n) & (count > least)
        return stopped


def _smallest(numbers: Numbers) -> int:
    return numbers if isinstance(numbers, int) else min(numbers, default=1)


def uniforms(seeds: Tensor, rows: Tensor, num: int) -> Tensor:
    """() or (B,) seeds, (B,) rows -> (B, num) float32 in [0, 1): a hash of (seed, row, position).

    SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    key = _mix(_mix(seeds.to(torch.int64)) + rows.to(torch.int64))[:, None]
    bits = _mix(key + torch.arange(num, device=rows.device))
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit reaches every output bit (arithmetic wraps)."""
    x = (x + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio; + 1, as 0 would stay 0
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ (x >> 31 & 0x1FFFFFFFF)
