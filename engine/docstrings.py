"""Real text from the running interpreter's own standard library: signatures, docstrings, and a judge of them."""

from __future__ import annotations

import ast
import json
import os
import platform
import random
import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, SEP = "<pad>", "<bos>", "<eos>", "<sep>"  # token ids 0 to 3
PROMPT_TOKENS = 18  # <bos> signature <sep>
COMPLETION_TOKENS = 26  # sentence <eos>
NUM_HELDOUT_PAIRS = 400
NUM_HELDOUT_DOCUMENTS = 300

NOT_LIBRARY = ("test", "site-packages", "idlelib", "lib2to3", "turtledemo")
IMPERATIVES = frozenset(
    "return set get check create convert read write open close add remove parse print test make find compute "
    "initialize load send update build format handle process copy delete wait run call show".split()
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Harvest(NamedTuple):
    """What one interpreter's standard library holds; the same for every run of that interpreter."""

    pairs: list[tuple[str, str]]  # (signature, first docstring sentence), distinct, shuffled
    corpus: list[str]  # every docstring, shuffled


def harvest() -> Harvest:
    """Read the docstrings of the running interpreter's standard library, about three seconds of parsing.

    Every docstring joins the corpus. A pair is an ASCII signature of at most 28 characters, such as
    "join(iterable)", with a sentence of 8 to 64. Files that are no UTF-8 Python are skipped, tests and tools left out.
    """
    pairs: set[tuple[str, str]] = set()
    corpus: list[str] = []
    for tree in modules(Path(sysconfig.get_path("stdlib"))):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | Function):
                continue
            document = ast.get_docstring(node)
            if not document:
                continue
            corpus.append(document)
            if isinstance(node, Function):
                pair = signature(node), first_sentence(document)
                if len(pair[0]) <= 28 and 8 <= len(pair[1]) <= 64 and "".join(pair).isascii():
                    pairs.add(pair)
    shuffled = sorted(pairs)
    random.Random(0).shuffle(shuffled)
    random.Random(0).shuffle(corpus)
    return Harvest(shuffled, corpus)


def modules(library: Path) -> Iterator[ast.Module]:
    """The syntax trees of a library's modules, in the order of their paths."""
    for folder, _, names in sorted(os.walk(library)):
        inside = os.path.relpath(folder, library)  # where the interpreter itself is installed must not matter
        if any(part in inside for part in NOT_LIBRARY):
            continue
        for name in sorted(names):
            if name.endswith(".py"):
                try:
                    tree = ast.parse(Path(folder, name).read_text(encoding="utf-8"))
                except (SyntaxError, UnicodeDecodeError):
                    continue
                yield tree


def signature(function: Function) -> str:
    """`def join(self, iterable)` -> "join(iterable)"."""
    arguments = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
    return f"{function.name}({','.join(arguments)})"


def first_sentence(document: str) -> str:
    """The first sentence of the first paragraph, on one line; the whole paragraph where no period ends a sentence."""
    paragraph = " ".join(document.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", paragraph)[0]


def train_tokenizer(corpus: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016, over bytes) learned from `corpus`; every text decodes to itself.

    The ids of <pad>, <bos>, <eos> and <sep> are 0 to 3. They are recognised inside a text and never inserted.
    Raises ValueError if `vocab_size` leaves no room for the special tokens and the 256 bytes.
    """
    special = [PAD, BOS, EOS, SEP]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(special) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"expected vocab_size >= {smallest} (special tokens and bytes), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[SEP],
        clean_up_tokenization_spaces=False,
    )


def fitting(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str]]:
    """The demonstrations {"prompt", "completion"} of at most PROMPT_TOKENS and COMPLETION_TOKENS tokens.

    Both counts include what the engine's text layer adds: <bos> before a prompt, <eos> after a completion.
    """
    if not pairs:
        return []
    rows = [{"prompt": signature + SEP, "completion": sentence} for signature, sentence in pairs]
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    return [
        row
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
        if 1 + len(prompt) <= PROMPT_TOKENS and len(completion) + 1 <= COMPLETION_TOKENS
    ]


def write(folder: str | Path) -> None:
    """Harvest into `folder`: the corpus, demonstrations and prompts, each with a held-out part, and the tokenizer.

        corpus.jsonl          corpus_heldout.jsonl     {"text"}                    the last 300 docstrings held out
        demonstrations.jsonl  heldout.jsonl            {"prompt", "completion"}    the last 400 pairs held out
        prompts.jsonl         prompts_heldout.jsonl    {"prompt"}                  of the same pairs
        tokenizer/            provenance.json          of which interpreter, and how much

    Everything is written aside and renamed as a whole, so an interrupted write is redone and a finished one is left as
    it is. Raises ValueError if `folder` holds something else, or if the interpreter ships too few sources to hold out.
    """
    folder = Path(folder)
    if (folder / "provenance.json").exists():
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"expected a new folder, an empty one or a finished harvest, got other files in {folder}")
    pairs, corpus = harvest()
    tokenizer = train_tokenizer(corpus)
    demonstrations = fitting(pairs, tokenizer)
    if len(demonstrations) <= NUM_HELDOUT_PAIRS or len(corpus) <= NUM_HELDOUT_DOCUMENTS:
        raise ValueError(
            f"expected a standard library with more than {NUM_HELDOUT_PAIRS} documented functions and "
            f"{NUM_HELDOUT_DOCUMENTS} docstrings, got {len(demonstrations)} and {len(corpus)} "
            f"in {sysconfig.get_path('stdlib')}"
        )
    learned, heldout = demonstrations[:-NUM_HELDOUT_PAIRS], demonstrations[-NUM_HELDOUT_PAIRS:]
    documents = [{"text": text} for text in corpus]
    files = {
        "corpus.jsonl": documents[:-NUM_HELDOUT_DOCUMENTS],
        "corpus_heldout.jsonl": documents[-NUM_HELDOUT_DOCUMENTS:],
        "demonstrations.jsonl": learned,
        "heldout.jsonl": heldout,
        "prompts.jsonl": [{"prompt": row["prompt"]} for row in learned],
        "prompts_heldout.jsonl": [{"prompt": row["prompt"]} for row in heldout],
    }
    provenance = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "tokenizers": tokenizers.__version__,
        "vocab_size": len(tokenizer),
        "pairs_before_length_limit": len(pairs),
        "rows": {name: len(rows) for name, rows in files.items()},
    }
    aside = folder.with_name(folder.name + ".partial")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    tokenizer.save_pretrained(aside / "tokenizer")
    for name, rows in files.items():
        (aside / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (aside / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder)


class Judge:
    """A program that judges a one-line docstring after PEP 257, 5 at best; people's own sentences average about 3.84.

    The score is a sum. PEP 257 asks for the first four terms; the others keep a policy from winning without writing.

        +2 x share of words     known to the corpus (5 times or more): a docstring is prose that people read
        +1 imperative           "prescribes the effect as a command (Do this, Return that), not as a description"
        +1 one sentence         "is a phrase ending in a period": one period, at the end
        +1 relevant             names a part of the signature: it should "summarize its behavior", this function's
        -0.5 per repetition     of a word, after the first
        -1 short                fewer than three words
        -1 unfinished           cut off by the length limit before <eos>

    A text without any word scores -3. `corpus` is the harvested one, held-out documents included.
    """

    def __init__(self, corpus: Iterable[str]) -> None:
        counts = Counter(word.lower() for text in corpus for word in re.findall(r"[A-Za-z]+", text))
        self.known = {word for word, count in counts.items() if count >= 5 and len(word) > 1} | {"a", "i"}

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], *, finished: Sequence[bool], **columns: object
    ) -> list[float]:
        """As a reward function: B prompts that end in <sep>, B completions -> B scores; other columns are ignored."""
        scores = []
        for prompt, completion, ended in zip(prompts, completions, finished, strict=True):
            if not prompt.endswith(SEP):
                raise ValueError(f"expected a prompt that ends in {SEP}, got {prompt!r}")
            scores.append(self.gold(prompt.removesuffix(SEP), completion, ended))
        return scores

    def gold(self, signature: str, text: str, finished: bool) -> float:
        """The score of one text about one function; `finished` says that it ended by itself."""
        text = text.strip()
        words = re.findall(r"[A-Za-z]+", text.lower())
        if not words:
            return -3.0
        known = sum(word in self.known for word in words) / len(words)
        one_sentence = text.endswith(".") and text.count(".") == 1
        prose = " ".join(words)
        relevant = any(part[:5] in prose for part in name_parts(signature))
        repetitions = len(words) - len(set(words))
        return (
            2 * known
            + (words[0] in IMPERATIVES)
            + one_sentence
            + relevant
            - 0.5 * max(0, repetitions - 1)
            - (len(words) < 3)
            - (not finished)
        )


def name_parts(signature: str) -> list[str]:
    """The words of three letters or more in the names: "setMode(file_name,fd)" -> ["set", "mode", "file", "name"]."""
    separated = re.sub(r"([A-Z])", r" \1", signature).lower()
    return [part for part in re.split(r"[^a-z]+", separated) if len(part) >= 3]
