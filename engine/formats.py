"""Formats: rows as published datasets spell them become rows in the native columns that engine/data.py reads.

A format is known by its columns. Its converter shows the schema, which is public as the dataset's card; the rows of our
own tests are written after it. Native columns are those of TRL: prompt, completion, messages, chosen, rejected, label,
text; and, for rankings, completions and ranks. What a person asked becomes a message, so that the chat template of the
checkpoint spells it, in training and in generation alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinhead.engine.rows import Row, Unusable, kind
from twinhead.engine.text import Message

LEFT_OUT = "malformed turns"  # what a converter calls, in its row, the number of turns that it left out
NATIVE = frozenset("prompt completion messages chosen rejected label text completions ranks".split())
SPEAKERS = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
            "assistant": "assistant", "system": "system"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """A row that has these columns, and that `fits`, converts to native columns.

    convert: raises Unusable for a row that teaches nothing, ValueError for one that is malformed.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    fits: Callable[[Row], bool] = lambda row: row.get("prompt") is None and row.get("messages") is None


def recognised(row: Row) -> Format | None:
    """The first format that a row is in; None: its columns are native, or unknown."""
    for candidate in FORMATS:
        if all(name in row for name in candidate.columns) and candidate.fits(row):
            return candidate
    return None


def hint(row: Row) -> str:
    """What an error adds where a row has no column that anyone reads: the columns of every known format."""
    if not row or NATIVE & row.keys() or recognised(row):
        return ""
    known = ", ".join(f"{known.name} ({', '.join(known.columns)})" for known in FORMATS)
    return f"; other known formats are {known}"


def threads(numbered: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers as they come; but where the first is a message of a tree, all are read and joined.

    Then every message of a person comes with two more columns: `thread`, the messages from the root down to it (None if
    one of them is missing or deleted), and `replies`, the messages that answer it.
    """
    numbered = iter(numbered)
    first = next(numbered, None)
    if first is None:
        return
    if not _in_a_tree(first[1]):
        yield first
        yield from numbered
        return
    table = [first, *numbered]
    messages = {str(row["message_id"]): row for _, row in table if _in_a_tree(row) and not row.get("deleted")}
    replies: dict[str, list[Row]] = {}
    for row in messages.values():
        replies.setdefault(str(row["parent_id"]), []).append(row)
    for number, row in table:
        if not _in_a_tree(row):
            yield number, row
        elif row["role"] != "assistant":
            answered = [reply for reply in replies.get(str(row["message_id"]), []) if reply["role"] == "assistant"]
            yield number, {**row, "thread": _thread(row["message_id"], messages), "replies": answered}


def _in_a_tree(row: Row) -> bool:
    return row.keys() >= {"message_id", "parent_id", "role", "text"}


def _thread(message_id: Any, messages: Mapping[str, Row]) -> list[Row] | None:
    thread: list[Row] = []
    while message_id is not None:
        message = messages.get(str(message_id))
        if message is None or len(thread) == len(messages):  # missing, or its own ancestor
            return None
        thread.insert(0, message)
        message_id = message["parent_id"]
    return thread


def alpaca(row: Row) -> Row:
    """Stanford Alpaca, 52K: {instruction, input, output}; the template chooses its text by an empty input."""
    asked = {"prompt": [question(_text(row, "instruction"), _text(row, "input", empty=True))]}
    return asked | ({"completion": _text(row, "output")} if "output" in row else {})


def dolly(row: Row) -> Row:
    """Databricks Dolly, 15K: {instruction, context, response, category}."""
    asked = question(_text(row, "instruction"), _text(row, "context", empty=True))
    return {"prompt": [asked], "completion": _text(row, "response")}


def flan(row: Row) -> Row:
    """FLAN, 15M: {inputs, targets}."""
    return {"prompt": [question(_text(row, "inputs"))], "completion": _text(row, "targets")}


def sharegpt(row: Row) -> Row:
    """ShareGPT, 90K: {conversations: [{from: human | gpt | system, value}, ...]}.

    A turn is malformed if nobody known says it, if it is no text or empty, or if it is not its speaker's turn. What
    follows one answers something that is not there, so the conversation ends before it; replies that open a
    conversation answer nothing and are left out alone.
    """
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"expected conversations to be a list of turns, got {kind(turns)}")
    messages: list[Message] = []
    left_out = 0
    for number, turn in enumerate(turns):
        message = _turn(turn)
        before = messages[-1]["role"] if messages else None
        if message is not None and message["role"] == "assistant" and before in (None, "system"):
            left_out += 1
            continue
        follows = {"user": (None, "system", "assistant"), "assistant": ("user",), "system": (None,)}
        if message is None or before not in follows[message["role"]]:
            left_out += len(turns) - number
            break
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no well-formed question with its answer")
    return {"messages": messages, LEFT_OUT: left_out}


def _turn(turn: Any) -> Message | None:
    """{from, value} (or {role, content}) as a message, None if it is malformed."""
    if not isinstance(turn, Mapping):
        return None
    speaker, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
    if speaker not in tuple(SPEAKERS) or not isinstance(content, str) or not content.strip():
        return None
    return {"role": SPEAKERS[speaker], "content": content}


def oasst(row: Row) -> Row:
    """OpenAssistant, 161K messages: {message_id, parent_id, role: prompter | assistant, text, rank}; 0 is the best.

    A message of a person, as threads() joins it with its tree: the conversation so far, the best reply to it, and the
    ranking of its ranked replies. So every best reply is learned once, whatever grew below it.
    """
    if row["thread"] is None:
        raise Unusable("part of the thread is missing")
    prompt = []
    for message in row["thread"]:
        if message["role"] not in ("prompter", "assistant"):
            raise ValueError(f"expected role to be prompter or assistant, got {message['role']!r}")
        prompt.append({"role": SPEAKERS[message["role"]], "content": _text(message, "text")})
    ranked = [reply for reply in row["replies"] if reply.get("rank") is not None]
    texts, ranks = [_text(reply, "text") for reply in ranked], [_whole(reply["rank"]) for reply in ranked]
    unranked = [_text(reply, "text") for reply in row["replies"] if reply not in ranked]
    best = texts[ranks.index(min(ranks))] if ranks else next(iter(unranked), "")
    return {"prompt": prompt, "completion": best, "completions": texts, "ranks": ranks}


def hh_rlhf(row: Row) -> Row:
    r"""Anthropic HH-RLHF, 170K: {chosen, rejected}, whole dialogues of "\n\nHuman: ..." and "\n\nAssistant: ...".

    What both begin with is the prompt; the template "dialogue" writes either one down again as it was.
    """
    chosen, rejected = dialogue(row["chosen"]), dialogue(_text(row, "rejected"))
    if chosen[:1] != rejected[:1]:
        raise Unusable("answers to different questions")
    return {"chosen": chosen, "rejected": rejected}


def dialogue(spoken: str) -> list[Message]:
    """The messages of a "Human: ... Assistant: ..." text. Raises Unusable if it does not begin with a human."""
    opening, *parts = re.split(r"\n\n(Human|Assistant):", spoken)
    if opening or not parts or parts[0] != "Human":
        raise Unusable("a dialogue that does not begin with a human")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": content.removeprefix(" ")} for speaker, content in turns]


def binarized(row: Row) -> Row:
    """UltraFeedback as pairs, 61K: {prompt, chosen, rejected, messages, score_chosen, score_rejected}; equal is a tie.

    chosen and rejected are whole conversations, which the prompt as plain text would only repeat.
    """
    repeated = isinstance(row["chosen"], list) and isinstance(row.get("prompt"), str)
    return {name: value for name, value in row.items() if not (repeated and name == "prompt")}


def ultrafeedback(row: Row) -> Row:
    """UltraFeedback, 64K: {instruction, completions: [{response, annotations: {aspect: {Rating}}, overall_score}]}.

    Four completions as a rule, ranked by the mean rating of their aspects, or by the overall score where no aspect is
    rated; what has neither is left out. Equal ratings are ties.
    """
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, Mapping) for c in completions):
        raise ValueError("expected completions to be a list of objects with response and annotations")
    rated = [(_text(c, "response"), rating) for c in completions if (rating := _rating(c)) is not None]
    order = sorted({rating for _, rating in rated}, reverse=True)
    texts, ranks = [text for text, _ in rated], [order.index(rating) for _, rating in rated]
    best = texts[ranks.index(0)] if rated else ""
    asked = [question(_text(row, "instruction"))]
    return {"prompt": asked, "completion": best, "completions": texts, "ranks": ranks}


def _rating(completion: Mapping[str, Any]) -> float | None:
    aspects = completion.get("annotations")
    aspects = aspects.values() if isinstance(aspects, Mapping) else []
    given = [_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, Mapping)]
    ratings = [rating for rating in given if rating is not None]
    return sum(ratings) / len(ratings) if ratings else _number(completion.get("overall_score"))


def shp(row: Row) -> Row:
    """Stanford SHP, 385K: {history, human_ref_A, human_ref_B, labels: 1 if A is better, score_ratio}."""
    if row["labels"] not in (0, 1):
        raise ValueError(f"expected labels to be 1 (A is better) or 0, got {row['labels']!r}")
    answers = _text(row, "human_ref_B"), _text(row, "human_ref_A")
    chosen = int(row["labels"])
    pair = {"chosen": answers[chosen], "rejected": answers[1 - chosen], "score_ratio": row.get("score_ratio")}
    return {"prompt": [question(_text(row, "history"))], **pair}


def question(instruction: str, context: str = "") -> Message:
    """A person's message. Its content is whole for every template; those that head them apart find both parts."""
    content = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {"role": "user", "content": content, "instruction": instruction, "input": context.strip() and context}


def before_the_reply(messages: Sequence[Message]) -> Sequence[Message]:
    """A conversation up to where the assistant speaks last: all of it if somebody else does."""
    replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: replies[-1]] if replies and replies[-1] == len(messages) - 1 else messages


def _text(row: Mapping[str, Any], column: str, empty: bool = False) -> str:
    """A column that is text; with `empty`, it may be missing."""
    value = row.get(column)
    if empty and value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"expected {column} to be text, got {kind(value)}")
    return value


def _number(value: Any) -> float | None:
    """4, "4" and 4.0 are 4.0; "N/A", null and everything else are None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank % 1 != 0:
        raise ValueError(f"expected rank to be a whole number, got {rank!r}")
    return int(rank)


def _dialogues(row: Row) -> bool:
    return isinstance(row["chosen"], str) and row["chosen"].startswith("\n\nHuman:") and row.get("prompt") is None


# The first that fits is taken, so the more particular stand above. A native prompt or conversation comes before most.
FORMATS = (
    Format("hh_rlhf", ("chosen", "rejected"), hh_rlhf, _dialogues),
    Format("ultrafeedback_binarized", ("chosen", "rejected", "score_chosen", "score_rejected"), binarized, bool),
    Format("ultrafeedback", ("instruction", "completions"), ultrafeedback),
    Format("dolly", ("instruction", "response"), dolly),
    Format("alpaca", ("instruction",), alpaca),
    Format("sharegpt", ("conversations",), sharegpt),
    Format("oasst", ("message_id", "parent_id", "role", "text"), oasst, lambda row: "thread" in row),
    Format("flan", ("inputs", "targets"), flan),
    Format("shp", ("history", "human_ref_A", "human_ref_B", "labels"), shp),
)
