"""Data: rows from files, folders and lists become examples, comparisons and prompts; every error names its row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar, overload

from twinhead.engine.batch import Example
from twinhead.engine.rows import Row, Source, kind, rows, source_name
from twinhead.engine.text import Message, Text, check_messages

Words: TypeAlias = str | Sequence[Message]  # plain text, or a conversation

T = TypeVar("T")

COMPLETION_COLUMNS = ("completion", "response", "answer")


@dataclass(frozen=True, slots=True)
class Comparison:
    """K >= 2 answers to one prompt and how a person ranked them."""

    examples: list[Example]  # (K,) sharing one prompt
    ranks: list[int]  # (K,) smaller is better, equal is a tie; at least two differ
    margin: float = 0.0  # how much better a better answer must score


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer, and what reward functions may want to know about it."""

    tokens: list[int]
    text: Words  # as the data gave it
    columns: Row  # every other column of the row


@dataclass(frozen=True, slots=True)
class Loaded(Sequence[T]):
    """What came out of a source, and what did not. Row numbers count from 1, as in the file."""

    items: list[T]
    num_rows: int
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> row numbers
    cut: list[int] = field(default_factory=list)  # rows whose end did not fit: they teach no EOS

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.items[index]

    def summary(self) -> str:
        """One sentence: '2190 rows, 2 dropped (prompt longer than 512 tokens: rows 17, 93), 1 cut (row 5)'."""
        parts = ["1 row" if self.num_rows == 1 else f"{self.num_rows} rows"]
        if self.dropped:
            reasons = "; ".join(f"{reason}: {_listed(numbers)}" for reason, numbers in self.dropped.items())
            parts.append(f"{sum(map(len, self.dropped.values()))} dropped ({reasons})")
        if self.cut:
            parts.append(f"{len(self.cut)} cut ({_listed(self.cut)})")
        return ", ".join(parts)


def _listed(numbers: list[int], shown: int = 5) -> str:
    """'row 17', or 'rows 17, 93, 95, 96, 97, ...'."""
    few = ", ".join(map(str, numbers[:shown])) + (", ..." if len(numbers) > shown else "")
    return f"row {few}" if len(numbers) == 1 else f"rows {few}"


class _Unusable(Exception):
    """Raised by a reader for a row that is well formed but teaches nothing: it is dropped and counted."""


def _column(row: Row, *names: str, wanted: str) -> Any:
    """The first of these columns that the row has. `wanted` says what the row should have had."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"expected {wanted}, got {'the columns ' + ', '.join(row) if row else 'no columns'}")


def _words(value: Any, column: str) -> Words:
    """Text as it is, or a list of messages, checked."""
    if isinstance(value, list):
        try:
            check_messages(value)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error
    elif not isinstance(value, str):
        raise ValueError(f"expected {column} to be text or a list of messages, got {kind(value)}")
    return value


def _answer(text: Text, prompt: Words, completion: Words, finished: bool = True) -> Example:
    """A prompt and its completion as one row. After a conversation, plain text is the assistant's next reply.

    A plain completion that was cut off (not `finished`) has no EOS: the reward model sees it as the sampler left it.
    """
    if not isinstance(completion, str):
        if isinstance(prompt, str):
            raise ValueError("expected prompt and completion to be both text or both messages, got text and messages")
        return _conversation(text, [*prompt, *completion], first=len(prompt))
    if not completion.strip():
        raise _Unusable("empty completion")  # its EOS would teach silence
    if isinstance(prompt, str) or not finished:
        return Example(text.prompt(prompt), text.completion(completion, append_eos=finished))
    return text.conversation([*prompt, {"role": "assistant", "content": completion}], first=len(prompt))


def _conversation(text: Text, messages: Sequence[Message], first: int = 0) -> Example:
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages[first:]):
        raise _Unusable("empty completion")
    return text.conversation(messages, first)


def _fit(example: Example, max_length: int) -> tuple[Example, bool]:
    """Cut the response on the right so that prompt + response <= max_length tokens; say whether it had to be cut."""
    room = max_length - len(example.prompt)
    if len(example.response) <= room:
        return example, False
    learn = None if example.learn is None else example.learn[: max(room, 0)]
    fitted = Example(example.prompt, example.response[: max(room, 0)], learn)
    if not (any(learn) if learn is not None else fitted.response):
        raise _Unusable(f"prompt alone fills {max_length} tokens")
    return fitted, True


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"expected max_length >= 2 (a token and the one it predicts), got {max_length}")


def _load(source: Source, build: Callable[[Row], tuple[list[T], bool]]) -> Loaded[T]:
    """Build the items of every row; count the unusable ones; name the row in every error.

    build: row -> (its items, whether something was cut); raises _Unusable to drop the row, ValueError to stop.
    """
    table = rows(source)
    items: list[T] = []
    cut: list[int] = []
    dropped: dict[str, list[int]] = {}
    for number, row in enumerate(table, 1):
        try:
            built, was_cut = build(row)
        except _Unusable as unusable:
            dropped.setdefault(str(unusable), []).append(number)
            continue
        except ValueError as error:
            raise ValueError(f"{source_name(source)} row {number}: {error}") from error
        items += built
        if was_cut:
            cut.append(number)
    loaded = Loaded(items, len(table), dropped, cut)
    if not items:
        raise ValueError(f"{source_name(source)}: no row is left: {loaded.summary()}")
    return loaded


def demonstrations(source: Source, text: Text, max_length: int) -> Loaded[Example]:
    """Rows to imitate: `prompt` and `completion` (or `response`, or `answer`), text or messages; or `messages`.

    Of `messages`, every assistant turn is learned. A response is cut on the right where prompt + response exceed
    `max_length` tokens (it then teaches no EOS). Dropped and counted: an empty completion, whose EOS would teach
    silence, and a prompt that leaves no room for a target. Raises ValueError naming the row for anything malformed.
    """
    _check_length(max_length)

    def build(row: Row) -> tuple[list[Example], bool]:
        if row.get("messages") is not None:
            messages = _words(row["messages"], "messages")
            if isinstance(messages, str):
                raise ValueError("expected messages to be a list of messages, got str")
            example = _conversation(text, messages)
        else:
            wanted = "the columns prompt and completion (or response, or answer), or messages"
            prompt = _words(_column(row, "prompt", wanted=wanted), "prompt")
            completion = _column(row, *COMPLETION_COLUMNS, wanted=wanted)
            example = _answer(text, prompt, _words(completion, "completion"))
        example, was_cut = _fit(example, max_length)
        return [example], was_cut

    return _load(source, build)


def documents(source: Source, text: Text, max_length: int) -> Loaded[Example]:
    """Whole texts for pre-training: column `text`, each as BOS + tokens + EOS in blocks of at most `max_length`.

    Consecutive blocks of a document share one token, the last of the one and the first (the prompt) of the next. So
    every token of it but the very first is a target exactly once, and no block ever sees another document.
    """
    _check_length(max_length)

    def build(row: Row) -> tuple[list[Example], bool]:
        document = _column(row, "text", wanted="the column text")
        if not isinstance(document, str):
            raise ValueError(f"expected text to be text, got {kind(document)}")
        if not document.strip():
            raise _Unusable("empty text")
        ids = text.document(document)
        starts = range(0, len(ids) - 1, max_length - 1)
        return [Example([ids[s]], ids[s + 1 : s + max_length]) for s in starts], False

    return _load(source, build)


def comparisons(source: Source, text: Text, max_length: int) -> Loaded[Comparison]:
    """Ranked answers, in one of two forms.

    pairs   `chosen` and `rejected`, text or messages, with `prompt` or without: then what both begin with is the
            prompt (whole words, or whole messages). Optional `margin`: a number.
    ranked  `prompt`, `completions` (K texts) and `ranks` (K integers, smaller is better, ties allowed). Optional
            `finished` (K booleans): a completion that was cut off gets no EOS.

    Too long answers are cut on the right. Dropped and counted, because they hold no preference: fewer than two answers,
    all tied, all the same within `max_length`, an empty one, or a prompt that leaves no room.
    """
    _check_length(max_length)

    def build(row: Row) -> tuple[list[Comparison], bool]:
        ranked = "completions" in row or "ranks" in row
        prompt, answers, ranks = _ranked(row) if ranked else _pair(row)
        if len(answers) < 2:
            raise _Unusable("fewer than two answers")
        if len(set(ranks)) == 1:
            raise _Unusable("all answers tied")
        ended = _finished(row, len(answers))
        answered = [_answer(text, prompt, a, e) for a, e in zip(answers, ended, strict=True)]
        fitted = [_fit(example, max_length) for example in answered]
        examples = [example for example, _ in fitted]
        if any(example.prompt != examples[0].prompt for example in examples):
            raise ValueError("expected answers to one prompt, got answers that begin with another question")
        if all(example.response == examples[0].response for example in examples):
            raise _Unusable("all answers the same")
        return [Comparison(examples, ranks, _margin(row))], any(was_cut for _, was_cut in fitted)

    return _load(source, build)


def _ranked(row: Row) -> tuple[Words, list[Words], list[int]]:
    wanted = "the columns prompt, completions and ranks"
    prompt = _words(_column(row, "prompt", wanted=wanted), "prompt")
    answers = _column(row, "completions", wanted=wanted)
    ranks = _column(row, "ranks", wanted=wanted)
    for name, column in (("completions", answers), ("ranks", ranks)):
        if not isinstance(column, list):
            raise ValueError(f"expected {name} to be a list, got {kind(column)}")
    if len(ranks) != len(answers):
        raise ValueError(f"expected one rank per completion ({len(answers)}), got {len(ranks)}")
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise ValueError(f"expected ranks to be integers, got {kind(rank)}")
    return prompt, [_words(answer, f"completion {i}") for i, answer in enumerate(answers, 1)], ranks


def _pair(row: Row) -> tuple[Words, list[Words], list[int]]:
    wanted = "the columns chosen and rejected (with or without prompt), or prompt, completions and ranks"
    chosen, rejected = (_words(_column(row, name, wanted=wanted), name) for name in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        return _words(row["prompt"], "prompt"), [chosen, rejected], [0, 1]
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = _shared_words(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        start = _shared_messages(chosen, rejected)
    else:
        raise ValueError("expected chosen and rejected to be both text or both messages, got one of each")
    return chosen[:start], [chosen[start:], rejected[start:]], [0, 1]


def _shared_words(a: str, b: str) -> int:
    """Length of the longest common beginning that ends before white space, so that no word is split."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while start and not (a[start : start + 1].isspace() and b[start : start + 1].isspace()):
        start -= 1
    return len(a[:start].rstrip())


def _shared_messages(a: Sequence[Message], b: Sequence[Message]) -> int:
    """Number of messages that both begin with, leaving at least one to each."""
    start = 0
    while start < min(len(a), len(b)) - 1 and a[start] == b[start]:
        start += 1
    if start == 0:
        raise ValueError("expected chosen and rejected to begin with the same message, or a prompt column, got neither")
    return start


def _finished(row: Row, num: int) -> list[bool]:
    finished = row.get("finished")
    if finished is None:
        return [True] * num
    if not isinstance(finished, list) or len(finished) != num or not all(isinstance(f, bool) for f in finished):
        raise ValueError(f"expected finished to hold one boolean per completion ({num}), got {finished!r}")
    return finished


def _margin(row: Row) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if not isinstance(margin, (int, float)) or isinstance(margin, bool) or not math.isfinite(margin):
        raise ValueError(f"expected margin to be a finite number, got {margin!r}")
    return float(margin)


def prompts(source: Source, text: Text, max_prompt_tokens: int) -> Loaded[Prompt]:
    """Prompts to answer: column `prompt`, text or messages. Every other column is kept for reward functions.

    A prompt longer than `max_prompt_tokens` is dropped and counted, never cut: its question may stand at the end.
    """
    if max_prompt_tokens < 1:
        raise ValueError(f"expected max_prompt_tokens >= 1, got {max_prompt_tokens}")

    def build(row: Row) -> tuple[list[Prompt], bool]:
        words = _words(_column(row, "prompt", wanted="the column prompt"), "prompt")
        tokens = text.prompt(words)
        if not tokens:
            raise _Unusable("empty prompt")
        if len(tokens) > max_prompt_tokens:
            raise _Unusable(f"prompt longer than {max_prompt_tokens} tokens")
        return [Prompt(tokens, words, {name: value for name, value in row.items() if name != "prompt"})], False

    return _load(source, build)


@dataclass(frozen=True, slots=True)
class Order:
    """Which items belong to which step: every epoch is a permutation of its own.

    batch(step) keeps to epochs, so the last batch of one may be short; take(step) runs on across them and is always
    full. Both are pure functions of (seed, step): a run that resumes asks for its step, and nothing has to be saved.
    """

    num_items: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("num_items", self.num_items), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_items / self.batch_size)

    def steps(self, epochs: int) -> int:
        """Steps that this many epochs of batch() take."""
        return epochs * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch, from 0, of batch(step)."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Indices of the items of this step (from 0): over an epoch, every item once."""
        start = step % self.steps_per_epoch * self.batch_size
        return list(_shuffled(self.num_items, self.seed, self.epoch(step))[start : start + self.batch_size])

    def take(self, step: int) -> list[int]:
        """Indices of exactly `batch_size` items of this step (from 0): the epochs laid end to end, without a seam."""
        first = step * self.batch_size
        places = (divmod(place, self.num_items) for place in range(first, first + self.batch_size))
        return [_shuffled(self.num_items, self.seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=8)  # the steps of an epoch ask for the same permutation one after the other
def _shuffled(num_items: int, seed: int, epoch: int) -> tuple[int, ...]:
    items = list(range(num_items))
    random.Random(f"epoch {epoch} of seed {seed}").shuffle(items)
    return tuple(items)
