"""The harvest of the standard library, its tokenizer, its files and its judge."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from twinhead.engine import docstrings
from twinhead.engine.docstrings import Harvest, Judge, fitting, harvest, train_tokenizer, write


@pytest.fixture(scope="module")
def library() -> Harvest:
    return harvest()


@pytest.fixture(scope="module")
def tokenizer(library: Harvest) -> PreTrainedTokenizerFast:
    return train_tokenizer(library.corpus)


@pytest.fixture(scope="module")
def judge(library: Harvest) -> Judge:
    return Judge(library.corpus)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# harvest


MODULE = '''
"""Module docstring."""

class Shelf:
    """Class docstring. More."""

    def put(self, book, *rest, fragile=False):
        """Put a book
        on the shelf.  Then wait.

        Details follow.
        """

    @classmethod
    async def find(cls, title):
        """Find a book by e.g. its title"""

def silent(): pass
def terse(): """Short."""
def verbose(): """%s"""
def a_name_that_is_itself_much_too_long(): """Do something useful here."""
def foreign(): """Sch\u00f6ner Text, der zu lang nicht ist."""
''' % ("word " * 14)


def test_harvest_selects_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib = tmp_path / "test" / "lib"  # a place named "test" above the library must not hide it
    for folder in ("", "nested", "unittest", "site-packages"):
        (stdlib / folder).mkdir(parents=True, exist_ok=True)
    (stdlib / "shelf.py").write_text(MODULE, encoding="utf-8")
    (stdlib / "nested" / "twice.py").write_text('def terse(x):\n """Say it twice."""\n' * 2, encoding="utf-8")
    (stdlib / "broken.py").write_text('"""Never read."""\ndef (', encoding="utf-8")
    (stdlib / "latin.py").write_bytes('"""Sch\u00f6n."""'.encode("latin-1"))
    (stdlib / "notes.txt").write_text('"""Not a module."""')
    for hidden in ("unittest", "site-packages"):
        (stdlib / hidden / "hidden.py").write_text('def hidden():\n """Hide from the harvest."""')
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(stdlib)}.__getitem__)
    found = harvest()
    assert sorted(found.pairs) == [
        ("find(title)", "Find a book by e.g."),
        ("put(book)", "Put a book on the shelf."),
        ("terse(x)", "Say it twice."),
    ]
    assert len(found.corpus) == 10
    assert "Module docstring." in found.corpus
    assert not any("Never" in text or "Hide" in text or "Not a module" in text for text in found.corpus)


def test_this_interpreter_holds_enough_text_and_gives_it_in_one_order(library: Harvest) -> None:
    assert len(library.pairs) > 2500
    assert len(library.corpus) > 5000
    assert len(set(library.pairs)) == len(library.pairs)
    assert library.pairs != sorted(library.pairs)
    assert harvest() == library


# tokenizer


def test_special_tokens_have_fixed_ids_and_are_read_inside_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 512
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3]
    name = tokenizer("join(iterable)")["input_ids"]
    assert not {0, 1, 2, 3} & set(name)
    assert tokenizer("join(iterable)<sep>")["input_ids"] == [*name, 3]
    assert tokenizer.decode([1, *name, 3, 2], skip_special_tokens=True) == "join(iterable)"


@pytest.mark.parametrize(
    "text", ["", "Return it .", " a  b\n\tc , d ' s", "na\u00efve \u65e5\u672c \U0001f600", "do n't"]
)
def test_every_text_decodes_to_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_survives_its_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        read = kind.from_pretrained(tmp_path)
        assert read.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)
        assert read("f()<sep>")["input_ids"] == tokenizer("f()<sep>")["input_ids"]


def test_training_is_deterministic_and_merges_what_is_frequent(library: Harvest) -> None:
    some = library.corpus[:500]
    first, second = train_tokenizer(some, vocab_size=300), train_tokenizer(some, vocab_size=300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 300
    assert len(first("the returned object")["input_ids"]) < len("the returned object")


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected vocab_size >= 260 .* got 100"):
        train_tokenizer(["text"], vocab_size=100)


def test_pairs_are_kept_up_to_the_very_last_token(tokenizer: PreTrainedTokenizerFast) -> None:
    def kept(signature: str, sentence: str) -> bool:
        return len(fitting([(signature, sentence)], tokenizer)) == 1

    rare = "\x01"  # a byte that no merge touches: one token each
    assert len(tokenizer(rare * 25)["input_ids"]) == 25
    assert [kept(rare * count, "Go.") for count in (15, 16, 17)] == [True, True, False]  # 1 + 16 + 1 = 18
    assert [kept("f()", rare * count) for count in (24, 25, 26)] == [True, True, False]  # 25 + 1 = 26
    assert fitting([], tokenizer) == []


# files


@pytest.fixture
def ready(library: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harvest once per module, not once per test."""
    monkeypatch.setattr(docstrings, "harvest", lambda: library)


@pytest.mark.usefixtures("ready")
def test_write_splits_without_overlap(
    library: Harvest, tokenizer: PreTrainedTokenizerFast, judge: Judge, tmp_path: Path
) -> None:
    folder = tmp_path / "deep" / "data"
    write(folder)
    rows = {path.name: lines(path) for path in folder.glob("*.jsonl")}
    corpus, demonstrations = rows["corpus.jsonl"], rows["demonstrations.jsonl"]
    assert [row["text"] for row in corpus + rows["corpus_heldout.jsonl"]] == library.corpus
    assert demonstrations + rows["heldout.jsonl"] == fitting(library.pairs, tokenizer)
    assert len(rows["heldout.jsonl"]) == 400
    assert len(rows["corpus_heldout.jsonl"]) == 300
    assert len(demonstrations) > 1500
    assert rows["prompts.jsonl"] == [{"prompt": row["prompt"]} for row in demonstrations]
    assert rows["prompts_heldout.jsonl"] == [{"prompt": row["prompt"]} for row in rows["heldout.jsonl"]]
    read = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert read.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["rows"] == {name: len(table) for name, table in rows.items()}

    prompts, completions = zip(*((row["prompt"], row["completion"]) for row in rows["heldout.jsonl"]), strict=True)
    human = sum(judge(prompts, completions, finished=[True] * 400)) / 400
    assert 3.7 < human < 3.95, f"people's own docstrings score about 3.84, got {human:.3f}"


@pytest.mark.usefixtures("ready")
def test_an_interrupted_write_is_redone_and_a_finished_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(folder)
    assert not folder.exists()
    (tmp_path / "data.partial" / "corpus.jsonl").write_text("cut off in the mid")
    (tmp_path / "data.partial" / "stale").touch()

    write(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not (folder / "stale").exists()
    assert len(lines(folder / "corpus.jsonl")) > 5000

    monkeypatch.setattr(docstrings, "harvest", killed)
    write(folder)  # finished: nothing is harvested again


def test_write_refuses_a_folder_of_others_and_a_library_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="expected a new folder"):
        write(tmp_path)
    monkeypatch.setattr(docstrings, "harvest", lambda: Harvest([("f()", "Do it now.")], ["Do it now."]))
    with pytest.raises(ValueError, match="got 1 and 1 in"):
        write(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# judge


@pytest.fixture(scope="module")
def small_judge() -> Judge:
    return Judge(["Return the file name from a path and close it"] * 5 + ["rarely rarely rarely rarely", "x x x x x"])


@pytest.mark.parametrize(
    ("text", "finished", "score", "term"),
    [
        ("Return the file name.", True, 5.0, "all four terms"),
        ("  Return the file name.\n", True, 5.0, "outer blanks do not count"),
        ("Return the file name.", False, 4.0, "unfinished"),
        ("return the file name", True, 4.0, "no period"),
        ("Return the file. Close it.", True, 4.0, "two sentences"),
        ("The file name.", True, 4.0, "not imperative"),
        ("Returns the file name.", True, 5 - 1 - 2 * 1 / 4, "not imperative, and a word the corpus does not know"),
        ("Return the file rarely.", True, 5 - 2 * 1 / 4, "a word the corpus holds four times"),
        ("Return a file x.", True, 5 - 2 * 1 / 4, "a letter is no word, except for a and I"),
        ("Return it from a path.", True, 4.0, "nothing of the name"),
        ("Return the the file.", True, 5.0, "one repetition is free"),
        ("Return the file the file the file.", True, 5 - 0.5 * 3, "three repetitions more"),
        ("Return file.", True, 4.0, "short"),
        ("...", True, -3.0, "no word"),
        ("", False, -3.0, "nothing"),
    ],
)
def test_each_term_of_the_judge(small_judge: Judge, text: str, finished: bool, score: float, term: str) -> None:
    assert small_judge.gold("getFileSize(x)", text, finished) == pytest.approx(score), term


def test_relevance_reads_camel_case_and_arguments_but_no_short_parts(small_judge: Judge) -> None:
    def relevance(signature: str) -> float:
        return small_judge.gold(signature, "Close the file.", True) - 4

    assert [relevance(name) for name in ("readFile()", "f(file_x)", "closest(x)")] == [1, 1, 1]  # five letters suffice
    assert [relevance(name) for name in ("filename()", "fi(le)", "open(x)")] == [0, 0, 0]


def test_the_judge_is_a_reward_function(small_judge: Judge) -> None:
    scores = small_judge(
        ["file()<sep>", "file()<sep>"], ["Return the file.", "Return the file."], finished=[True, False], label=[1, 2]
    )
    assert scores == [5.0, 4.0]
    with pytest.raises(ValueError, match="expected a prompt that ends in <sep>, got 'file"):
        small_judge(["file()"], ["Return the file."], finished=[True])
    with pytest.raises(ValueError, match="argument"):
        small_judge(["file()<sep>"], ["Return the file."], finished=[True, True])
