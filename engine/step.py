"""One decode step: trunk, head, sampler, log-probs and the critic's value, all from the same hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twinhead.engine.cache import SlotCache
from twinhead.engine.graphs import Graphs, Tensors, Workspace
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling
from twinhead.kernels import sample, selective_log_softmax

UNIFORM, LOGPROB, RAW, VALUE = range(4)  # the numbers that are kept of every token


@dataclass(frozen=True)
class Step:
    """What a policy draws under one way of sampling; `masked`: some rows must not draw `stops` (n,) yet."""

    policy: Policy
    sampling: Sampling
    stops: Tensor
    masked: bool

    @property
    def kinds(self) -> tuple[int, ...]:
        """What a draw tells of its token. The model's own log-prob is told apart where it is another one."""
        valued, filtered = self.policy.value_head is not None, self.masked or not self.sampling.plain
        return (LOGPROB, *([VALUE] if valued else []), *([RAW] if filtered else []))

    def __call__(self, inputs: Tensors, span: int, cache: SlotCache, even: bool = False) -> Tensors:
        """One token in each of the slots 0..B-1: from (B,) newest tokens, their positions, numbers, who is early."""
        tokens, positions, numbers, early = inputs
        return self.draw(self.policy.decode(tokens, positions, span, cache, even), numbers, early)

    def draw(self, hidden: Tensor, numbers: Tensor, early: Tensor) -> Tensors:
        """(B, H) states, (B,) in [0, 1), (B,) bool -> the next tokens (B,), and what `kinds` says of them."""
        s, logits = self.sampling, self.policy.logits(hidden)
        allowed = self._without_stops(logits, early) if self.masked else logits
        tokens, logprobs = sample(
            allowed, numbers, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p
        )
        drawn = [tokens, logprobs.float()]
        if (values := self.policy.values(hidden)) is not None:
            drawn.append(values)
        if RAW in self.kinds:
            drawn.append(selective_log_softmax(logits, tokens).float())
        return tuple(drawn)

    def _without_stops(self, logits: Tensor, early: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, self.stops] = logits[:, self.stops].masked_fill(early[:, None], float("-inf"))
        return logits

    def workspace(self, num_slots: int, capacity: int) -> Workspace:
        """A cache of at least this size, and graphs where they are asked for: the policy's own where they still fit."""
        kept, self.policy.kept = self.policy.kept, None
        s, addresses = self.sampling, [p.data_ptr() for p in self.policy.parameters()]
        key = (s.temperature, s.top_k, s.top_p, s.min_p, *self.stops.tolist(), self.masked, *addresses)
        if kept is None or kept.cache.num_slots < num_slots or kept.cache.capacity < capacity:
            kept = Workspace(self.policy.new_cache(num_slots, capacity), None, key)
        if not s.cuda_graphs:
            kept.graphs = None
        elif kept.graphs is None or kept.key != key:
            kept.graphs = self.graphs(kept.cache)
        kept.key = key
        return kept

    def graphs(self, cache: SlotCache) -> Graphs:
        """Graphs of this step over `cache`, none of them recorded yet."""
        return Graphs(lambda inputs, span: self(inputs, span, cache), cache.num_slots, cache.capacity)
