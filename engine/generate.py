"""Batched sampling with a KV cache: slots refill as rows finish, and the decode step yields log-probs and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twinhead.engine.batch import Example, Rollout, pack
from twinhead.engine.config import check
from twinhead.engine.policy import Policy
from twinhead.engine.trunk import check_fit
from twinhead.kernels import sample


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. temperature=0 is greedy; stop=None takes the checkpoint's EOS ids."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[int, ...] | None = None
    num_slots: int = 256  # sequences that decode side by side

    def __post_init__(self) -> None:
        check(
            self,
            max_new_tokens=(self.max_new_tokens >= 1, "at least 1"),
            temperature=(self.temperature >= 0, "at least 0 (0: greedy)"),
            top_k=(self.top_k >= 0, "at least 0 (0: off)"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1"),
            min_p=(0 <= self.min_p < 1, "at least 0 and below 1"),
            num_slots=(self.num_slots >= 1, "at least 1"),
        )


def generate(
    policy: Policy,
    prompts: list[list[int]],
    sampling: Sampling | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """One rollout per prompt, in the prompts' order.

    Every row draws its uniforms from (seed, row, position), so its tokens do not depend on its neighbours. Log-probs
    are those of the distribution that was sampled from (at temperature 0: of the untempered one). `on_finished` is
    called with the number of rows finished so far. Raises ValueError for an empty prompt, an id outside the
    vocabulary, or a prompt that leaves no room under the model's maximum length.
    """
    rollouts: dict[int, Rollout] = {}
    with policy.generating():
        for finished in stream(policy, prompts, sampling):
            rollouts |= finished
            if on_finished is not None:
                on_finished(len(rollouts))
    return [rollouts[i] for i in range(len(prompts))]


def stream(policy: Policy, prompts: list[list[int]], sampling: Sampling | None = None) -> Iterator[dict[int, Rollout]]:
    """The rollouts of generate as they come, by the number of their prompt: those that ended with the same token.

    Between two of them the policy is in the caller's mode and may score, but must not learn: the other rows are
    unfinished. Raises ValueError as generate does, before the first one.
    """
    sampling = sampling or Sampling()
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i}: expected at least one token, got none")
    check_fit(policy.model, [Example(prompt, []) for prompt in prompts], sampling.max_new_tokens)
    decoder = _Decoder(policy, prompts, sampling) if prompts else None
    while decoder is not None and decoder.busy:
        with policy.generating():
            finished = decoder.advance()
        yield finished


class _Decoder:
    """Running rows occupy slots 0..running-1: a finished row's slot takes the next prompt, or the last running row."""

    def __init__(self, policy: Policy, prompts: list[list[int]], sampling: Sampling) -> None:
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        stop = policy.eos_ids if sampling.stop is None else sampling.stop
        self.stop = torch.tensor(stop, dtype=torch.int64, device=policy.device)
        self.waiting = list(range(len(prompts)))[::-1]
        self.finished: dict[int, Rollout] = {}  # since the last advance
        slots, device, n = min(len(prompts), sampling.num_slots), policy.device, sampling.max_new_tokens
        self.cache = policy.new_cache(slots, max(map(len, prompts)) + n)
        self.running: list[int] = []  # (slots,) the prompt that each slot is answering
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens in the cache
        self.count = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens drawn
        self.last = torch.zeros(slots, dtype=torch.int64, device=device)  # the newest token
        self.first = torch.arange(slots, device=device) * n  # where a slot's numbers begin in the next four
        self.uniforms = torch.empty(slots, n, device=device)
        self.tokens = torch.zeros(slots, n, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(slots, n, device=device)
        self.values = torch.zeros(slots, n, device=device)
        self.buffers = (
            self.length, self.count, self.last, self.uniforms, self.tokens, self.logprobs, self.values,
        )  # fmt: skip
        self.span = 0  # the longest length, kept on the host

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def advance(self) -> dict[int, Rollout]:
        """Decode until some rows have finished: these, by the number of their prompt."""
        while self.busy and not self.finished:
            self.refill()
            self.step()
        finished, self.finished = self.finished, {}
        return finished

    def refill(self) -> None:
        """Prefill waiting prompts, packed together, into the free slots, and draw their first tokens."""
        first, free = len(self.running), len(self.length) - len(self.running)
        if not free or not self.waiting:
            return
        arrivals = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        self.running += arrivals
        prompts = [tuple(self.prompts[i]) for i in arrivals]
        fresh = slice(first, first + len(arrivals))
        hidden = self._prefill(prompts, first)
        self.length[fresh] = torch.tensor(list(map(len, prompts)), device=self.policy.device)
        self.count[fresh] = 0
        rows = torch.tensor(arrivals, device=self.policy.device)
        self.uniforms[fresh] = uniforms(self.sampling.seed, rows, self.sampling.max_new_tokens)
        self.span = max(self.span, *map(len, prompts))
        self._draw(hidden, fresh)

    def _prefill(self, prompts: list[tuple[int, ...]], first: int) -> Tensor:
        """The last hidden state of each prompt, read into the slots from `first` on; equal prompts are read once."""
        slots: dict[tuple[int, ...], int] = {}
        for slot, prompt in enumerate(prompts, first):
            slots.setdefault(prompt, slot)
        packed = pack([Example(list(prompt), []) for prompt in slots], self.policy.device)
        hidden = dict(zip(slots, self.policy.prefill(packed, self.cache, list(slots.values())), strict=True))
        for slot, prompt in enumerate(prompts, first):
            if slot != slots[prompt]:
                self.cache.copy(slots[prompt], slot, len(prompt))
        return torch.stack([hidden[prompt] for prompt in prompts])

    def step(self) -> None:
        """Retire what has finished, then decode one token in every running slot."""
        self._retire()
        batch = len(self.running)
        if not batch or (self.waiting and batch < len(self.length)):
            return  # nothing to decode, or the freed slots refill first
        tokens, positions = self.last[:batch], self.length[:batch].clone()
        self.span += 1
        self.length[:batch] += 1
        self._draw(self.policy.decode(tokens, positions, self.span, self.cache), slice(0, batch))

    def _draw(self, hidden: Tensor, where: slice) -> None:
        """Sample the next token of these slots; its log-prob and the state's value come from the same hidden state."""
        s, place = self.sampling, self.first[where] + self.count[where]
        tokens, logprobs = sample(
            self.policy.logits(hidden),
            self.uniforms.view(-1)[place],
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
        )
        self.last[where] = tokens
        self.tokens.view(-1).index_copy_(0, place, tokens)
        self.logprobs.view(-1).index_copy_(0, place, logprobs.to(self.logprobs.dtype))
        values = self.policy.values(hidden)
        if values is not None:
            self.values.view(-1).index_copy_(0, place, values)
        self.count[where] += 1

    def _retire(self) -> None:
        """Turn finished rows into rollouts and close the gaps that they leave."""
        batch = len(self.running)
        stopped = torch.isin(self.last[:batch], self.stop)
        done = stopped | (self.count[:batch] == self.sampling.max_new_tokens)
        if not (finished := done.nonzero().squeeze(1).tolist()):
            return
        counts, stops = self.count[:batch].tolist(), stopped.tolist()
        for slot in reversed(finished):
            self._record(slot, counts[slot], stops[slot])
            self._close(slot)
        self.span = int(self.length[: len(self.running)].max()) if self.running else 0

    def _record(self, slot: int, count: int, stopped: bool) -> None:
        index = self.running[slot]
        self.finished[index] = Rollout(
            prompt=self.prompts[index],
            response=self.tokens[slot, :count].tolist(),
            logprobs=self.logprobs[slot, :count].clone(),
            values=None if self.policy.value_head is None else self.values[slot, :count].clone(),
            finished=stopped,
        )

    def _close(self, slot: int) -> None:
        """Move the last running row into `slot`, so that running rows stay a prefix of the buffers."""
        last = len(self.running) - 1
        if slot != last:
            self.cache.copy(last, slot, int(self.length[last]))
            for buffer in self.buffers:
                buffer[slot] = buffer[last]
            self.running[slot] = self.running[last]
        self.running.pop()


def uniforms(seed: int, rows: Tensor, num: int) -> Tensor:
    """(B,) rows -> (B, num) float32 in [0, 1): a hash of (seed, row, position), the same in every batch.

    SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    key = _mix(torch.tensor(seed, dtype=torch.int64, device=rows.device))
    key = _mix(key + rows.to(torch.int64))[:, None]
    bits = _mix(key + torch.arange(num, device=rows.device))
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit reaches every output bit (arithmetic wraps)."""
    x = (x + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio; + 1, as 0 would stay 0
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ (x >> 31 & 0x1FFFFFFFF)
