"""Shares: what every rank would do to the whole batch, done to a part of it by each; one alone does all of it.

The names and arguments are those of the same work in one process (generate.py, batch.py). All ranks call them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from twinhead.engine import batch, ranks
from twinhead.engine.batch import Rollout
from twinhead.engine.generate import generate as generate_alone
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling

T = TypeVar("T")


def generate(policy: Policy, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
    """One rollout per prompt, in the prompts' order and on every rank: the same tokens whatever the number of ranks.

    Raises ValueError as generation does, on all ranks what was raised on one.
    """

    def answered(rows: range) -> list[Rollout]:
        return generate_alone(policy, prompts[rows.start : rows.stop], replace(sampling, first_row=rows.start))

    return [rollout for part in ranks.spread(answered, len(prompts)) for rollout in part]


def micro_batches(items: Sequence[T], lengths: Sequence[int], tokens_per_micro: int) -> Iterator[list[T]]:
    """This rank's share of the items, balanced by tokens, in micro-batches: maybe none."""
    own = ranks.share(lengths)
    return batch.micro_batches([items[i] for i in own], [lengths[i] for i in own], tokens_per_micro)
