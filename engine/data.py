"""Data: rows from files, folders and lists become examples, comparisons and prompts; every error names its row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar, overload

from twinhead.engine import formats, preferences
from twinhead.engine.batch import Example
from twinhead.engine.rows import Row, Source, Unusable, column, kind, source_name, stream
from twinhead.engine.text import Message, Text, Words, words

T = TypeVar("T")

COMPLETION_COLUMNS = ("completion", "response", "answer")


@dataclass(frozen=True, slots=True)
class Comparison:
    """K >= 2 answers to one prompt and how a person ranked them."""

    examples: list[Example]  # (K,) sharing one prompt
    ranks: list[int]  # (K,) smaller is better, equal is a tie; at least two differ
    margin: float = 0.0  # how much better a better answer must score
    labeler: str = ""  # who ranked them; empty: unknown

    def pairs(self) -> list[Comparison]:
        """Every pair that the ranking decides, as a comparison of its own: the better answer, then the worse."""
        k = range(len(self.ranks))
        decided = [(i, j) for i in k for j in k if self.ranks[i] < self.ranks[j]]
        return [Comparison([self.examples[i], self.examples[j]], [0, 1], self.margin, self.labeler) for i, j in decided]


@dataclass(frozen=True, slots=True)
class Unpaired:
    """An answer and whether it is a good one, without another to compare it with: what KTO learns from."""

    example: Example
    label: bool  # True: desirable


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
    malformed: dict[int, int] = field(default_factory=dict)  # row number -> turns of it that were left out
    formats: tuple[str, ...] = ()  # of the rows, by their names in formats.py; none if all columns were native

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.items[index]

    def summary(self) -> str:
        """One sentence: '90 rows of dolly, 2 dropped (prompt longer than 512 tokens: rows 17, 93), 1 cut (row 5)'."""
        count = "1 row" if self.num_rows == 1 else f"{self.num_rows} rows"
        parts = [f"{count} of {' and '.join(self.formats)}" if self.formats else count]
        if self.dropped:
            reasons = "; ".join(f"{reason}: {_listed(numbers)}" for reason, numbers in self.dropped.items())
            parts.append(f"{sum(map(len, self.dropped.values()))} dropped ({reasons})")
        if self.cut:
            parts.append(f"{len(self.cut)} cut ({_listed(self.cut)})")
        if self.malformed:
            turns = sum(self.malformed.values())
            of = _listed(list(self.malformed))
            parts.append(f"{turns} malformed turn{'s' if turns > 1 else ''} left out ({of})")
        return ", ".join(parts)


def _listed(numbers: list[int], shown: int = 5) -> str:
    """'row 17', or 'rows 17, 93, 95, 96, 97, ...'."""
    few = ", ".join(map(str, numbers[:shown])) + (", ..." if len(numbers) > shown else "")
    return f"row {few}" if len(numbers) == 1 else f"rows {few}"


def _answer(text: Text, prompt: Words, completion: Words, finished: bool = True) -> Example:
    """A prompt and its completion as one row. After a conversation, plain text is the assistant's next reply.

    A plain completion that was cut off (not `finished`) has no EOS: the reward model sees it as the sampler left it.
    """
    if not isinstance(completion, str):
        if isinstance(prompt, str):
            raise ValueError("expected prompt and completion to be both text or both messages, got text and messages")
        return _conversation(text, [*prompt, *completion], first=len(prompt))
    if not completion.strip():
        raise Unusable("empty completion")  # its EOS would teach silence
    if isinstance(prompt, str) or not finished:
        return Example(text.prompt(prompt), text.completion(completion, append_eos=finished))
    return text.conversation([*prompt, {"role": "assistant", "content": completion}], first=len(prompt))


def _conversation(text: Text, messages: Sequence[Message], first: int = 0) -> Example:
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages[first:]):
        raise Unusable("empty completion")
    return text.conversation(messages, first)


def _fit(example: Example, max_length: int) -> tuple[Example, bool]:
    """Cut the response on the right so that prompt + response <= max_length tokens; say whether it had to be cut."""
    room = max_length - len(example.prompt)
    if len(example.response) <= room:
        return example, False
    learn = None if example.learn is None else example.learn[: max(room, 0)]
    fitted = Example(example.prompt, example.response[: max(room, 0)], learn)
    if not (any(learn) if learn is not None else fitted.response):
        raise Unusable(f"prompt alone fills {max_length} tokens")
    return fitted, True


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"expected max_length >= 2 (a token and the one it predicts), got {max_length}")


def _load(source: Source, build: Callable[[Row], tuple[list[T], bool]], convert: bool = True) -> Loaded[T]:
    """Build the items of every row; count the unusable ones; name the row in every error.

    Rows pass through one at a time: only what is built of them stays in memory (of message trees, the rows as well).
    build: native row -> (its items, whether something was cut); raises Unusable to drop the row, ValueError to stop.
    convert: rows in a known format become native ones first.
    """
    items: list[T] = []
    dropped: dict[str, list[int]] = {}
    cut: list[int] = []
    malformed: dict[int, int] = {}
    names: dict[str, None] = {}  # a set that keeps its order
    num_rows = 0

    def numbered() -> Iterator[tuple[int, Row]]:
        nonlocal num_rows
        for row in stream(source):
            num_rows += 1
            yield num_rows, row

    for number, row in formats.threads(numbered()) if convert else numbered():
        known = formats.recognised(row) if convert else None
        names[known.name if known else "native"] = None
        try:
            native = known.convert(row) if known else row
            if left_out := native.pop(formats.LEFT_OUT, 0):
                malformed[number] = left_out
            built, was_cut = build(native)
        except Unusable as unusable:
            dropped.setdefault(str(unusable), []).append(number)
            continue
        except ValueError as error:
            where = f"{source_name(source)} row {number}{f' ({known.name})' if known else ''}"
            raise ValueError(f"{where}: {error}{formats.hint(row) if convert else ''}") from error
        items += built
        if was_cut:
            cut.append(number)
    loaded = Loaded(items, num_rows, dropped, cut, malformed, () if list(names) == ["native"] else tuple(names))
    if not items:
        raise ValueError(f"{source_name(source)}: no row is left: {loaded.summary()}")
    return loaded


def demonstrations(source: Source, text: Text, max_length: int) -> Loaded[Example]:
    """Rows to imitate: `prompt` and `completion` (or `response`, or `answer`), text or messages; or `messages`.

    Of `messages`, every assistant turn is learned. A response is cut on the right where prompt + response exceed
    `max_length` tokens (it then teaches no EOS). Dropped and counted: an empty completion, whose EOS would teach
    silence, and a prompt that leaves no room for a target. Raises ValueError naming the row for anything malformed.
    Rows in a format of formats.py become such rows first, here and in every reader below but documents().
    """
    _check_length(max_length)

    def build(row: Row) -> tuple[list[Example], bool]:
        if row.get("messages") is not None:
            messages = words(row["messages"], "messages")
            if isinstance(messages, str):
                raise ValueError("expected messages to be a list of messages, got str")
            example = _conversation(text, messages)
        else:
            wanted = "the columns prompt and completion (or response, or answer), or messages"
            prompt = words(column(row, "prompt", wanted=wanted), "prompt")
            completion = column(row, *COMPLETION_COLUMNS, wanted=wanted)
            example = _answer(text, prompt, words(completion, "completion"))
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
        document = column(row, "text", wanted="the column text")
        if not isinstance(document, str):
            raise ValueError(f"expected text to be text, got {kind(document)}")
        if not document.strip():
            raise Unusable("empty text")
        ids = text.document(document)
        starts = range(0, len(ids) - 1, max_length - 1)
        return [Example([ids[s]], ids[s + 1 : s + max_length]) for s in starts], False

    return _load(source, build, convert=False)


def comparisons(source: Source, text: Text, max_length: int, min_score_ratio: float = 1.0) -> Loaded[Comparison]:
    """Ranked answers, in one of two forms.

    pairs   `chosen` and `rejected`, text or messages, with `prompt` or without: then what both begin with is the
            prompt (whole words, or whole messages). Optional `margin`: a number. Optional `score_chosen` and
            `score_rejected`: equal scores are a tie. Optional `score_ratio` (SHP): below `min_score_ratio` dropped.
    ranked  `prompt`, `completions` (K texts) and `ranks` (K integers, smaller is better, ties allowed). Optional
            `finished` (K booleans): a completion that was cut off gets no EOS.

    In both, optional `labeler_id`, text or an integer: who compared. Too long answers are cut on the right. Dropped
    and counted, because they hold no preference: fewer than two answers, all tied, all the same within `max_length`, an
    empty one, or a prompt that leaves no room.
    """
    _check_length(max_length)

    def build(row: Row) -> tuple[list[Comparison], bool]:
        prompt, answers, ranks = preferences.answers(row)
        if len(answers) < 2:
            raise Unusable("fewer than two answers")
        if len(set(ranks)) == 1:
            raise Unusable("all answers tied")
        if preferences.number(row, "score_ratio", math.inf) < min_score_ratio:
            raise Unusable(f"score ratio below {min_score_ratio:g}")
        ended = preferences.finished(row, len(answers))
        answered = [_answer(text, prompt, a, e) for a, e in zip(answers, ended, strict=True)]
        fitted = [_fit(example, max_length) for example in answered]
        examples = [example for example, _ in fitted]
        if any(example.prompt != examples[0].prompt for example in examples):
            raise ValueError("expected answers to one prompt, got answers that begin with another question")
        if all(example.response == examples[0].response for example in examples):
            raise Unusable("all answers the same")
        margin = preferences.number(row, "margin", 0.0)
        return [Comparison(examples, ranks, margin, preferences.labeler(row))], any(was_cut for _, was_cut in fitted)

    return _load(source, build)


def unpaired(source: Source, text: Text, max_length: int) -> Loaded[Unpaired]:
    """Single answers that are good or not: `prompt`, `completion` (as in demonstrations) and `label`, a boolean.

    A pair (`chosen` and `rejected`, as in comparisons) makes two of them. Dropped and counted: an empty completion, a
    tied pair, and a prompt that leaves no room. Ethayarajh et al. 2024 (KTO), section 4.
    """
    _check_length(max_length)

    def build(row: Row) -> tuple[list[Unpaired], bool]:
        if "chosen" in row and "rejected" in row:
            prompt, answers, ranks = preferences.answers(row)
            if len(set(ranks)) == 1:
                raise Unusable("all answers tied")
            labels = [True, False]
        else:
            wanted = "the columns prompt, completion and label, or chosen and rejected"
            prompt = words(column(row, "prompt", wanted=wanted), "prompt")
            answers = [words(column(row, *COMPLETION_COLUMNS, wanted=wanted), "completion")]
            labels = [column(row, "label", wanted=wanted)]
            if not isinstance(labels[0], bool):
                raise ValueError(f"expected label to be true or false, got {labels[0]!r}")
        fitted = [_fit(_answer(text, prompt, answer), max_length) for answer in answers]
        items = [Unpaired(example, label) for (example, _), label in zip(fitted, labels, strict=True)]
        return items, any(was_cut for _, was_cut in fitted)

    return _load(source, build)


def prompts(source: Source, text: Text, max_prompt_tokens: int) -> Loaded[Prompt]:
    """Prompts to answer: column `prompt`, text or messages. Other columns are kept for reward functions, rankings not.

    Without that column a conversation (`messages`) is asked up to the assistant's last turn, a pair up to where its
    answers part. A prompt longer than `max_prompt_tokens` is dropped and counted, never cut: its question may stand at
    the end.
    """
    if max_prompt_tokens < 1:
        raise ValueError(f"expected max_prompt_tokens >= 1, got {max_prompt_tokens}")

    def build(row: Row) -> tuple[list[Prompt], bool]:
        asked = prompt_of(row)
        tokens = text.prompt(asked)
        if not tokens:
            raise Unusable("empty prompt")
        if len(tokens) > max_prompt_tokens:
            raise Unusable(f"prompt longer than {max_prompt_tokens} tokens")
        ranking = ("completions", "ranks") if "completions" in row and "ranks" in row else ()
        others = {name: value for name, value in row.items() if name not in ("prompt", *ranking)}
        return [Prompt(tokens, asked, others)], False

    return _load(source, build)


def prompt_of(row: Row) -> Words:
    """What a native row asks (see prompts()). Raises ValueError if it asks nothing."""
    if row.get("prompt") is None and row.get("messages") is not None:
        asked = words(row["messages"], "messages")
        return asked if isinstance(asked, str) else formats.before_the_reply(asked)
    if row.get("prompt") is None and "chosen" in row and "rejected" in row:
        return preferences.answers(row)[0]
    return words(column(row, "prompt", wanted="the column prompt"), "prompt")


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
