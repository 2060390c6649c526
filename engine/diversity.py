"""Diversity: reward functions that ship with the engine, and pay for what the other answers do not say.

They stand against mode collapse, beside a reward that is worth something: `--reward_functions rules.py:right
group_diversity --reward_weights 1 0.2`. An answer is worth the mean over its bigrams of 1 / how often each occurs among
all answers. Weighted by their bigrams, the answers' rewards so average to distinct-2 (Li et al. 2016), the number of
different bigrams over that of all: who repeats nobody gets 1, G equal answers get 1 / G each, and so does a loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from twinhead.engine.text import Words

N = 2  # tokens of what is counted; an answer of fewer is counted as a whole


def group_diversity(
    *, prompts: Sequence[Words], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """(S,) from 0 to 1: how little of each answer the answers to the same prompt repeat."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(i)
    rewards = [0.0] * len(completion_ids)
    for group in groups.values():
        for i, reward in zip(group, rarity([completion_ids[i] for i in group]), strict=True):
            rewards[i] = reward
    return rewards


def batch_diversity(*, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """(S,) from 0 to 1: how little of each answer the answers to all prompts of the step repeat."""
    return rarity(completion_ids)


def rarity(answers: Sequence[Sequence[int]], n: int = N) -> list[float]:
    """(S,): the mean over an answer's n-grams of 1 / their number in all answers; 0 for an answer without a token."""
    grams = [_grams(answer, n) for answer in answers]
    counts = Counter(gram for answer in grams for gram in answer)
    return [sum(1 / counts[gram] for gram in answer) / max(len(answer), 1) for answer in grams]


def _grams(answer: Sequence[int], n: int) -> list[tuple[int, ...]]:
    last = len(answer) - n
    return [tuple(answer[i : i + n]) for i in range(last + 1)] if last >= 0 else [tuple(answer)] * bool(answer)


SHIPPED = {function.__name__: function for function in (group_diversity, batch_diversity)}
