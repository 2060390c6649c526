"""Experience: what one step of reinforcement learning learns from, dealt into minibatches before the first update."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from twinhead.engine import ranks
from twinhead.engine.batch import Packed, Rollout, micro_batches
from twinhead.engine.mismatch import importance
from twinhead.engine.policy import Policy
from twinhead.kernels import whiten


@dataclass(frozen=True, slots=True)
class Experience:
    """One micro-batch of rollouts, frozen before the first gradient step. Packed once, reused in every epoch."""

    packed: Packed
    sampled: Tensor  # (R,) log-probs as the sampler saw them
    logprobs: Tensor  # (R,) those that the ratio is taken to: the same, or the trainer's own under the same weights
    values: Tensor  # (R,)
    advantages: Tensor  # (R,)
    returns: Tensor  # (R,)
    ref_logprobs: Tensor | None = None  # (R,) of the reference, where the loss estimates the divergence from it
    ref_rows: Tensor | None = None  # (R, H) its states, where the loss has all of the divergence


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same without a critic: rollouts that were compared with others to the same prompt."""

    packed: Packed
    sampled: Tensor  # (R,)
    logprobs: Tensor  # (R,)
    advantages: Tensor  # (R,)
    ref_logprobs: Tensor | None  # (R,) of the reference policy, where there is one


Batch = list[list[Experience]]  # minibatches of micro-batches
E = TypeVar("E", Experience, Comparison)


def deal(rollouts: Sequence[Rollout], num_minibatches: int, tokens_per_micro: int, seed: int) -> list[list[list[int]]]:
    """Indices of rollouts, shuffled into minibatches, and this rank's share of each cut into micro-batches.

    The composition holds for the whole step and only the order of minibatches changes between epochs, so that old and
    new log-probs come from the same products: at learning rate 0 their ratio is exactly 1.
    """
    indices = list(range(len(rollouts)))
    random.Random(seed).shuffle(indices)
    minibatches = [m for i in range(num_minibatches) if (m := indices[i::num_minibatches])]
    lengths = [len(r.prompt) + len(r.response) for r in rollouts]
    shares = [[m[i] for i in ranks.share([lengths[j] for j in m])] for m in minibatches]
    return [list(micro_batches(m, [lengths[i] for i in m], tokens_per_micro)) for m in shares]


def whitened(batch: Batch) -> Batch:
    """The same batch with advantages of mean 0 and variance 1 over all ranks' tokens, before minibatching."""
    every = [e for minibatch in batch for e in minibatch]
    parts = iter(ranks.over_all(whiten, [e.advantages for e in every]))
    return [[replace(e, advantages=next(parts)) for e in minibatch] for minibatch in batch]


def corrected(batch: list[list[E]], cap: float) -> list[list[E]]:
    """The same batch with every advantage weighted by how much likelier the trainer finds the token, at most `cap`."""
    return [
        [replace(e, advantages=e.advantages * importance(e.logprobs, e.sampled, cap)) for e in minibatch]
        for minibatch in batch
    ]


def behaviour(
    policy: Policy,
    packed: Packed,
    rollouts: Sequence[Rollout],
    temperature: float,
    source: str,
    bootstrap: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R,) log-probs as the sampler saw them, those that the ratio is taken to, (R,) values, and (S,) what follows.

    source: "rollout" keeps what the decode step saw, "recompute" asks the trainer's own pass once more. A critic with
    layers of its own says nothing while decoding: one packed pass gives its values, and with `bootstrap` those after
    the responses that were cut; decoding gave the other critics' (0: nothing follows).
    """
    sampled = torch.cat([r.logprobs for r in rollouts])
    logprobs, values = sampled, None
    if source == "recompute":
        scored = policy(packed, temperature=temperature, entropy=False)
        logprobs, values = scored.logprobs, scored.values
    after = torch.tensor([r.bootstrap for r in rollouts], device=sampled.device)
    if policy.network is not None:
        states = policy.appraise(packed)  # (T,)
        cut = torch.tensor([bootstrap and not r.finished for r in rollouts], device=sampled.device)
        return sampled, logprobs, states[packed.rows], states[packed.last] * cut
    if values is None:
        values = torch.cat([r.values for r in rollouts if r.values is not None])
    return sampled, logprobs, values, after
