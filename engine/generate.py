"""Batched sampling with a KV cache: slots refill as rows finish, and the decode step yields log-probs and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from twinhead.engine import graphs
from twinhead.engine.batch import Example, Rollout, micro_batches, pack
from twinhead.engine.cache import SlotCache
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling, Stops
from twinhead.engine.step import LOGPROB, RAW, UNIFORM, VALUE, Step
from twinhead.engine.trunk import check_fit

PREFILL_TOKENS = 16384  # of prompts that one pass reads


def generate(
    policy: Policy,
    prompts: list[list[int]],
    sampling: Sampling | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """One rollout per prompt, in the prompts' order.

    Every row draws its uniforms from (seed, row, position), or from a seed of its own, so its tokens do not depend on
    its neighbours, nor on how often the cache's budget made it wait. Log-probs are those of the distribution that was
    sampled from (at temperature 0: of the untempered one); `raw_logprobs` those of the model itself. `on_finished` is
    called with the number of rows finished so far. Raises ValueError for an empty prompt, an id outside the vocabulary,
    limits or seeds that are not one per prompt, a prompt that leaves no room under the model's maximum length, or a
    budget that the longest request does not fit.
    """
    rollouts: dict[int, Rollout] = {}
    with policy.generating():
        for finished in stream(policy, prompts, sampling):
            rollouts |= finished
            if on_finished is not None:
                on_finished(len(rollouts))
    return [rollouts[i] for i in range(len(prompts))]


def stream(
    policy: Policy, prompts: list[list[int]], sampling: Sampling | None = None, *, max_staleness: int = 0
) -> Iterator[dict[int, Rollout]]:
    """The rollouts of generate as they come, by the number of their prompt: those that ended with the same token.

    Between two of them the policy is in the caller's mode, and may score or learn. A row that was begun more than
    `max_staleness` changes of the weights ago is begun anew; the others go on under the new weights, from the keys that
    the old ones left in the cache, and `Rollout.staleness` counts the changes. Raises ValueError as generate does,
    before the first one.
    """
    sampling = sampling or Sampling()
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i}: expected at least one token, got none")
    if max_staleness < 0:
        raise ValueError(f"max_staleness: expected at least 0, got {max_staleness}")
    if sampling.bootstrap and policy.value_head is None:
        raise ValueError("bootstrap: expected a policy with a critic, got one without")
    if sampling.cuda_graphs and not graphs.available(policy.device):
        raise ValueError(f"cuda_graphs: expected a policy on a GPU, got one on {policy.device.type}")
    limits = sampling.limits(len(prompts))
    check_fit(policy.model, [Example(prompt, []) for prompt in prompts], [most for _, most in limits])
    decoder = _Decoder(policy, prompts, sampling, limits, max_staleness) if prompts else None
    while decoder is not None and decoder.busy:
        with policy.generating():
            finished = decoder.advance()
        yield finished
    if decoder is not None and sampling.keep_cache:
        policy.kept = decoder.workspace


class _Decoder:
    """Running rows occupy slots 0..running-1: a finished row's slot takes the next prompt, or the last running row.

    Under a budget the cache is a rectangle of that many bytes: many slots while rows are short, and when one outgrows
    them fewer and longer ones. The newest rows then wait, with what they have drawn, and are read again later.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        sampling: Sampling,
        limits: list[tuple[int, int]],
        max_staleness: int,
    ) -> None:
        self.policy, self.prompts, self.sampling, self.limits = policy, prompts, sampling, limits
        self.max_staleness, self.version, self.updates = max_staleness, policy.version, 0
        self.begun: dict[int, int] = {}  # row -> updates of the weights when it drew its first token
        self.waiting = list(range(len(prompts)))[::-1]
        self.running: list[int] = []  # (slots,) the prompt that each slot is answering
        self.steps = 0  # a row's length and its end are known without asking the device, from two numbers per slot:
        self.base: list[int] = []  # tokens in the cache, less steps
        self.ends: list[int] = []  # the step with which it reaches its limit
        self.drawn: dict[int, tuple[list[int], Tensor]] = {}  # tokens and numbers of rows that lost their slot
        self.finished: dict[int, Rollout] = {}  # since the last advance
        self._survey()
        self.longest = max(len(prompt) + most for prompt, (_, most) in zip(prompts, limits, strict=True))
        self.room = self._room()
        slots, width = min(len(prompts), sampling.num_slots), max(most for _, most in limits) + sampling.bootstrap
        self._allocate(slots, width, policy.device)
        stop = policy.eos_ids if sampling.stop is None else sampling.stop
        self.stops = Stops(stop, sampling.stop_sequences, policy.device)
        masked = bool(stop) and any(least for least, _ in limits)
        self.step = Step(policy, sampling, self.stops.tokens, masked)
        self.slots, capacity = self._shape(1 + max(map(len, prompts)))
        self.workspace = self.step.workspace(self.slots, capacity)

    def _allocate(self, slots: int, width: int, device: torch.device) -> None:
        self.state = torch.zeros(5, slots, dtype=torch.int64, device=device)
        self.length, self.count, self.last, self.least, self.most = self.state  # in the cache, drawn, newest, limits
        self.first = torch.arange(slots, device=device) * width  # where a slot's tokens and numbers begin
        self.tokens = torch.zeros(slots, width, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(4, slots, width, device=device)
        self.written, self.noted = self.tokens.view(-1), self.numbers.view(4, -1).unbind()  # by place

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def cache(self) -> SlotCache:
        return self.workspace.cache

    @property
    def span(self) -> int:
        """Tokens in the longest slot."""
        return self.top + self.steps

    def advance(self) -> dict[int, Rollout]:
        """Decode until some rows have finished: these, by the number of their prompt."""
        self._renew()
        while self.busy and not self.finished:
            if self.refill():
                self._retire()
            self.decode()
        finished, self.finished = self.finished, {}
        return finished

    def refill(self) -> bool:
        """Prefill waiting prompts, packed together, into the free slots, and draw their next tokens."""
        first, arrivals = len(self.running), self._admitted()
        if not arrivals:
            return False
        self.running += arrivals
        fresh = slice(first, len(self.running))
        rows = torch.tensor(arrivals, device=self.policy.device)
        self.numbers[UNIFORM, fresh] = self.sampling.uniforms(rows, len(self.prompts), self.tokens.shape[1])
        texts: list[tuple[int, ...]] = []
        for slot, row in enumerate(arrivals, first):
            self.begun.setdefault(row, self.updates)
            tokens, numbers = self.drawn.pop(row, ([], self.numbers[:, slot, :0]))
            self.tokens[slot, : len(tokens)] = torch.tensor(tokens, device=self.policy.device)
            self.numbers[:, slot, : len(tokens)] = numbers
            texts.append((*self.prompts[row], *tokens))
        counts = [len(text) - len(self.prompts[row]) for text, row in zip(texts, arrivals, strict=True)]
        least, most = zip(*(self.limits[row] for row in arrivals), strict=True)
        state = [list(map(len, texts)), counts, [0] * len(texts), least, most]
        self.state[:, fresh] = torch.tensor(state, device=self.policy.device)
        self.base += [len(text) - self.steps for text in texts]
        self.ends += [self.steps + self._draws(row) - n - 1 for row, n in zip(arrivals, counts, strict=True)]
        self._survey()
        place = self._place(fresh)
        self._write(self.step.draw(self._prefill(texts, first), *self._chances(fresh, place)), fresh, place)
        return True

    def decode(self) -> None:
        """Decode one token in every running slot, and retire the rows that it ends."""
        if self.running and self.span == self.cache.capacity:
            self._widen()
        if self.running:
            with torch.inference_mode():  # its tensors know neither versions nor views: 5% of a small step
                self._decode(slice(0, len(self.running)))
            self._retire()

    def _decode(self, where: slice) -> None:
        place, positions = self._place(where), self.length[where].clone()
        self.steps += 1
        self.length[where] += 1
        inputs = (self.last[where], positions, *self._chances(where, place))
        if self.workspace.graphs is not None:
            drawn = self.workspace.graphs(inputs, self.span)
        else:
            drawn = self.step(inputs, self.span, self.cache, self.even)
        self._write(drawn, where, place)

    def _prefill(self, texts: list[tuple[int, ...]], first: int) -> Tensor:
        """The last hidden state of each text, read into the slots from `first` on; equal ones are read once."""
        slots: dict[tuple[int, ...], int] = {}
        for slot, text in enumerate(texts, first):
            slots.setdefault(text, slot)
        hidden: dict[tuple[int, ...], Tensor] = {}
        for part in micro_batches(list(slots), list(map(len, slots)), PREFILL_TOKENS):
            packed = pack([Example(list(text), []) for text in part], self.policy.device)
            read = self.policy.prefill(packed, self.cache, [slots[text] for text in part])
            hidden |= zip(part, read, strict=True)
        for slot, text in enumerate(texts, first):
            if slot != slots[text]:
                self.cache.copy(slots[text], slot, len(text))
        return torch.stack([hidden[text] for text in texts])

    def _place(self, where: slice) -> Tensor:
        """(B,) where these slots' next tokens are written."""
        return self.first[where] + self.count[where]

    def _chances(self, where: slice, place: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the numbers that decide the next tokens, and (B,) bool: rows that must not stop yet."""
        return self.noted[UNIFORM][place], self.count[where] < self.least[where]

    def _write(self, drawn: graphs.Tensors, where: slice, place: Tensor) -> None:
        """Note down what was drawn in these slots."""
        self.last[where] = drawn[0]
        self.written.index_copy_(0, place, drawn[0])
        for kind, number in zip(self.step.kinds, drawn[1:], strict=True):
            self.noted[kind].index_copy_(0, place, number)
        self.count[where] += 1

    def _retire(self) -> None:
        """Turn finished rows into rollouts and close the gaps that they leave."""
        stopped: set[int] = set()
        if self.stops:
            _, count, last, least, most = self.state[:, : len(self.running)]
            found = self.stops(self.written, self.first[: len(last)], count, last, least)
            if self.sampling.bootstrap:
                found &= count <= most  # the token after the limit is drawn for the sake of its value alone
            stopped = set(found.nonzero().squeeze(1).tolist())
        if not stopped and self.steps < self.due:
            return
        for slot in reversed(range(len(self.running))):
            if slot in stopped or self.steps == self.ends[slot]:
                self._record(slot, slot in stopped)
                self._close(slot)
        self._survey()

    def _record(self, slot: int, stopped: bool) -> None:
        row, valued = self.running[slot], self.policy.value_head is not None
        count = min(self._count(slot), self.limits[row][1])
        numbers = self.numbers[:, slot, :count].clone()
        raw = RAW if RAW in self.step.kinds else LOGPROB
        self.finished[row] = Rollout(
            prompt=self.prompts[row],
            response=self.tokens[slot, :count].tolist(),
            logprobs=numbers[LOGPROB],
            values=numbers[VALUE] if valued else None,
            finished=stopped,
            raw_logprobs=numbers[raw],
            bootstrap=float(self.numbers[VALUE, slot, count]) if self.sampling.bootstrap and not stopped else 0.0,
            staleness=self.updates - self.begun.pop(row),
        )

    def _close(self, slot: int) -> None:
        """Move the last running row into `slot`, so that running rows stay a prefix of the buffers."""
        last = len(self.running) - 1
        if slot != last:
            self.cache.copy(last, slot, self.base[last] + self.steps)
            self.state[:, slot] = self.state[:, last]
            self.tokens[slot] = self.tokens[last]
            self.numbers[:, slot] = self.numbers[:, last]
        for known in (self.running, self.base, self.ends):
            known[slot] = known[last]
            known.pop()

    def _survey(self) -> None:
        """After other rows run: the longest one, whether all are as long, and the step at which the next one ends."""
        self.top = max(self.base, default=-self.steps)
        self.even = len(set(self.base)) == 1
        self.due = min(self.ends, default=self.steps)

    def _draws(self, row: int) -> int:
        """Tokens that are drawn for a row at most."""
        return self.limits[row][1] + self.sampling.bootstrap

    def _count(self, slot: int) -> int:
        """Tokens that a slot has drawn."""
        return self._draws(self.running[slot]) - (self.ends[slot] - self.steps)

    # -- the budget ----------------------------------------------------------------------------------------------------

    def _room(self) -> int | None:
        """Tokens that the cache may hold. Raises ValueError where the longest request does not fit."""
        if self.sampling.cache_bytes is None:
            return None
        size = self.policy.bytes_per_token()
        if self.sampling.cache_bytes < self.longest * size:
            needed = f"{self.longest * size} bytes, for the longest request of {self.longest} tokens"
            raise ValueError(f"cache_bytes: expected at least {needed}, got {self.sampling.cache_bytes}")
        return self.sampling.cache_bytes // size

    def _shape(self, tokens: int) -> tuple[int, int]:
        """Slots, and their capacity of at least `tokens`: the longest request's, or under a budget a fraction of it."""
        slots, capacity = min(len(self.prompts), self.sampling.num_slots), self.longest
        if self.room is None:
            return slots, capacity
        while (half := (capacity + 1) // 2) >= tokens and half < capacity:
            capacity = half
        return min(slots, self.room // capacity), capacity

    def _admitted(self) -> list[int]:
        """The waiting rows that may begin, oldest first, in slots for which no running row has to go."""
        if not self.waiting:
            return []
        needed = max(self.span, self._length(self.waiting[-1]))
        slots, capacity = self._shape(min(needed + 1, self.longest))
        if slots > len(self.running):
            self._resize(slots, capacity)
        admitted: list[int] = []
        while len(self.running) + len(admitted) < self.slots and self.waiting:
            if self._length(self.waiting[-1]) > self.cache.capacity:
                break
            admitted.append(self.waiting.pop())
        return admitted

    def _widen(self) -> None:
        """Make room for one more token in every slot; the rows that came last give theirs up."""
        slots, capacity = self._shape(self.span + 1)
        for row in sorted(self.running)[slots:]:
            self._put_back(row, keep=True)
        self._survey()
        self._resize(slots, capacity)

    def _resize(self, slots: int, capacity: int) -> None:
        if self.room is not None and (slots, capacity) != (self.cache.num_slots, self.cache.capacity):
            self.slots = slots
            self.cache.resize(slots, capacity, len(self.running), self.span)
            if self.workspace.graphs is not None:
                self.workspace.graphs = self.step.graphs(self.cache)

    def _put_back(self, row: int, keep: bool) -> None:
        """Take a running row's slot; it waits, with what it has drawn or without."""
        slot = self.running.index(row)
        if keep:
            count = self._count(slot)
            self.drawn[row] = self.tokens[slot, :count].tolist(), self.numbers[:, slot, :count].clone()
        self._close(slot)
        self._wait(row)

    def _wait(self, row: int) -> None:
        self.waiting = sorted([*self.waiting, row], reverse=True)

    def _length(self, row: int) -> int:
        return len(self.prompts[row]) + len(self.drawn[row][0] if row in self.drawn else ())

    # -- the weights ---------------------------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Begin anew what was begun under weights that have since changed more often than is allowed."""
        if self.policy.version == self.version:
            return
        self.version, self.updates = self.policy.version, self.updates + 1
        for row in [row for row, begun in self.begun.items() if self.updates - begun > self.max_staleness]:
            del self.begun[row]
            self.drawn.pop(row, None)
            if row in self.running:
                self._put_back(row, keep=False)
        self._survey()
