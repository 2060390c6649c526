"""Preferences: the prompt, the answers and the ranks that one row of native columns holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from twinhead.engine.rows import Row, column, kind
from twinhead.engine.text import Message, Words, words


def answers(row: Row) -> tuple[Words, list[Words], list[int]]:
    """The prompt, K answers to it and their ranks (smaller is better, equal is a tie), of a ranking or a pair.

    Raises ValueError for a row that is neither (data.comparisons says what they are).
    """
    return _ranked(row) if "completions" in row or "ranks" in row else _pair(row)


def _ranked(row: Row) -> tuple[Words, list[Words], list[int]]:
    wanted = "the columns prompt, completions and ranks"
    prompt = words(column(row, "prompt", wanted=wanted), "prompt")
    completions = column(row, "completions", wanted=wanted)
    ranks = column(row, "ranks", wanted=wanted)
    for name, given in (("completions", completions), ("ranks", ranks)):
        if not isinstance(given, list):
            raise ValueError(f"expected {name} to be a list, got {kind(given)}")
    if len(ranks) != len(completions):
        raise ValueError(f"expected one rank per completion ({len(completions)}), got {len(ranks)}")
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise ValueError(f"expected ranks to be integers, got {kind(rank)}")
    return prompt, [words(answer, f"completion {i}") for i, answer in enumerate(completions, 1)], ranks


def _pair(row: Row) -> tuple[Words, list[Words], list[int]]:
    wanted = "the columns chosen and rejected (with or without prompt), or prompt, completions and ranks"
    chosen, rejected = (words(column(row, name, wanted=wanted), name) for name in ("chosen", "rejected"))
    tied = row.get("score_chosen") is not None and row["score_chosen"] == row.get("score_rejected")
    ranks = [0, 0 if tied else 1]
    if row.get("prompt") is not None:
        return words(row["prompt"], "prompt"), [chosen, rejected], ranks
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = _shared_words(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        start = _shared_messages(chosen, rejected)
    else:
        raise ValueError("expected chosen and rejected to be both text or both messages, got one of each")
    return chosen[:start], [chosen[start:], rejected[start:]], ranks


def _shared_words(a: str, b: str) -> int:
    """Length of the longest common beginning that ends before white space, so that no word is split."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while start and not (a[start : start + 1].isspace() and b[start : start + 1].isspace()):
        start -= 1
    return len(a[:start].rstrip())


def _shared_messages(a: Sequence[Message], b: Sequence[Message]) -> int:
    """Number of messages that both begin with, up to where the assistant answers in both; at least one is left to each.

    Conversations that part where a person speaks have no prompt in common but the one before the reply above.
    """
    start = 0
    while start < min(len(a), len(b)) - 1 and a[start] == b[start]:
        start += 1
    while start and not a[start]["role"] == b[start]["role"] == "assistant":
        start -= 1
    if start == 0:
        raise ValueError("expected chosen and rejected to begin with the same message, or a prompt column, got neither")
    return start


def finished(row: Row, num: int) -> list[bool]:
    """For each of `num` answers whether it ended by itself; all, where the row has no column `finished`."""
    ended = row.get("finished")
    if ended is None:
        return [True] * num
    if not isinstance(ended, list) or len(ended) != num or not all(isinstance(f, bool) for f in ended):
        raise ValueError(f"expected finished to hold one boolean per completion ({num}), got {ended!r}")
    return ended


def labeler(row: Row) -> str:
    """Who compared the answers (column `labeler_id`); empty where the row does not say."""
    who = row.get("labeler_id")
    if who is not None and (not isinstance(who, (str, int)) or isinstance(who, bool)):
        raise ValueError(f"expected labeler_id to be text or an integer, got {kind(who)}")
    return "" if who is None else str(who)


def number(row: Row, name: str, default: float) -> float:
    """A column that is a finite number; `default` where there is none."""
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be a finite number, got {value!r}")
    return float(value)
