"""Data: what every format becomes, what is dropped and counted, and the sentence that each bad row gets."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from twinhead.engine.batch import Example, pack
from twinhead.engine.data import Loaded, Order, comparisons, demonstrations, documents, prompts
from twinhead.engine.rows import rows
from twinhead.engine.text import Text

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = [*"<s> </s> <unk> <user> <assistant> name a color two red blue and : what is it ? yes no".split(), "\n"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def text() -> Text:
    """One token per word, so that lengths can be counted by eye."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    spaces, lines = (pre_tokenizers.Split(*split) for split in ((" ", "removed"), ("\n", "isolated")))
    words.pre_tokenizer = pre_tokenizers.Sequence([spaces, lines])
    return Text(
        PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
        )
    )


def spelled(text: Text, example: Example) -> tuple[str, str]:
    return tuple(text.tokenizer.decode(ids) for ids in (example.prompt, example.response))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# A row that is right for each reader, to stand before the wrong ones.
READERS = {
    demonstrations: {"prompt": "name a color", "completion": "red"},
    documents: {"text": "red and blue"},
    comparisons: {"prompt": "name a color", "chosen": "red", "rejected": "two"},
    prompts: {"prompt": "name a color"},
}


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    table = [{"prompt": "name a color", "n": 1}, {"prompt": "né — 色", "n": 2}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    files = {
        "unix.jsonl": lines + "\n",
        "windows.jsonl": lines.replace("\n", "\r\n"),
        "marked.jsonl": "\ufeff" + lines,
        "trailing.jsonl": lines + "\n\n \n",
        "list.json": json.dumps(table, indent=2),
        "lines.json": lines,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        assert rows(tmp_path / name) == rows(str(tmp_path / name)) == table, name
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "table.parquet")
    assert rows(tmp_path / "table.parquet") == table
    assert rows(table) == rows(iter(table)) == rows(datasets.Dataset.from_list(table)) == table
    (tmp_path / "page.txt").write_text("red\nand blue")
    assert rows(tmp_path / "page.txt") == [{"text": "red\nand blue"}]


def test_rows_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "red"}\n{"prompt": "blue"}\n')
    assert rows(folder) == [{"prompt": "red"}, {"prompt": "blue"}]


def test_changing_the_rows_read_leaves_the_source_alone() -> None:
    source = [{"prompt": "red"}]
    rows(source)[0]["prompt"] = "blue"
    assert source == [{"prompt": "red"}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', r"a.jsonl line 2: not valid JSON \(Expecting ',' delimiter at column 8\)"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', r"a.jsonl line 2: not valid JSON \(Expecting value at column 1\)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl line 2: not valid UTF-8 \(invalid start byte at byte 8\)"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl row 2: expected an object with named columns, got list"),
        ("a.jsonl", b"null\n", "a.jsonl row 1: expected an object with named columns, got null"),
        ("a.jsonl", b"", "a.jsonl: expected at least one row, found none"),
        ("a.jsonl", b" \n\n", "a.jsonl: expected at least one row, found none"),
        ("a.json", b"[]", "a.json: expected at least one row, found none"),
        ("a.json", b'[{"a": 1},\n{"a"}]', r"a.json: not valid JSON \(Expecting ':' delimiter at line 2\)"),
        ("a.json", b'[{"a": 1}, 2]', "a.json row 2: expected an object with named columns, got int"),
        ("a.txt", b"", "a.txt: expected at least one row, found none"),
        ("a.txt", b"red\xff", r"a.txt: not valid UTF-8 \(invalid start byte at byte 4\)"),
        ("a.parquet", b"PAR?", r"a.parquet: not a readable parquet file \(.+\)"),
        ("a.csv", b"a,b\n", "a.csv: expected a file that ends in .jsonl, .json, .parquet, .txt, got .csv"),
        ("a", b"{}", "a: expected a file that ends in .jsonl, .json, .parquet, .txt, got no ending"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{sentence}$"):
        rows(tmp_path / name)


def test_missing_files(tmp_path: Path) -> None:
    for name in (tmp_path / "a.jsonl", "a.jsonl", "/nowhere", "./red/blue", "red/and/blue", tmp_path / "folder"):
        with pytest.raises(ValueError, match=f"^{name}: no such file or folder$"):
            rows(name)


def test_names_that_datasets_does_not_know(tmp_path: Path) -> None:
    for name in ("red-and-blue", "red/blue", tmp_path):
        with pytest.raises(ValueError, match=f"^{name}: expected a .jsonl, .json, .parquet or .txt file, or a folder"):
            rows(name)


def test_rows_in_memory_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"^data in memory: expected at least one row, found none$"):
        rows([])
    with pytest.raises(ValueError, match=r"^data in memory row 2: expected an object with named columns, got str$"):
        rows([{"prompt": "red"}, "blue"])
    split = datasets.Dataset.from_list([{"prompt": "red"}])
    splits = datasets.DatasetDict(train=split, test=split)
    with pytest.raises(ValueError, match=r"^expected rows, got a mapping with the keys train, test: pick one of them$"):
        rows(splits)


@pytest.mark.parametrize("read", READERS)
def test_every_reader_names_the_file_and_the_row(read, tmp_path: Path, text: Text) -> None:
    line = json.dumps(READERS[read])
    (tmp_path / "broken.jsonl").write_text(f'{line}\n{line}\n{{"prompt": "name')
    with pytest.raises(ValueError, match=r"broken.jsonl line 3: not valid JSON \(Unterminated string"):
        read(tmp_path / "broken.jsonl", text, 8)
    known = "" if read is documents else r"; other known formats are hh_rlhf \(chosen, rejected\), .*"
    with pytest.raises(ValueError, match=rf"^data in memory row 2: expected .*, got the columns colour, n{known}$"):
        read([READERS[read], {"colour": "red", "n": 1}], text, 8)
    with pytest.raises(ValueError, match=r"^data in memory row 2: expected .*, got no columns$"):
        read([READERS[read], {}], text, 8)


YES, NO, WHICH = said("assistant", "yes"), said("assistant", "no"), said("user", "it ?")
WORDS_OR_MESSAGES = "to be text or a list of messages, got"
BOTH = "to be both text or both messages"
PAIR_OR_RANKED = "the columns prompt, completions and ranks, got the columns prompt, chosen, rejected, completions"

# What turns the right row into a wrong one, and the sentence it gets.
MALFORMED = {
    demonstrations: [
        ({"prompt": None}, f"expected prompt {WORDS_OR_MESSAGES} null"),
        ({"completion": 7}, f"expected completion {WORDS_OR_MESSAGES} int"),
        ({"completion": [YES]}, f"expected prompt and completion {BOTH}, got text and messages"),
        ({"prompt": []}, "prompt: expected at least one message, got an empty list"),
        ({"prompt": [{"role": "user"}]}, "prompt: message 1: expected the keys role and content, got role"),
        ({"messages": "hello"}, "expected messages to be a list of messages, got str"),
        ({"messages": [WHICH]}, "expected at least one assistant turn that answers something, got none"),
    ],
    documents: [({"text": ["red"]}, "expected text to be text, got list")],
    prompts: [
        ({"prompt": 1.5}, f"expected prompt {WORDS_OR_MESSAGES} float"),
        ({"prompt": [YES]}, "expected a prompt that ends before the assistant speaks, got one that ends with its turn"),
    ],
    comparisons: [
        ({"chosen": None}, f"expected chosen {WORDS_OR_MESSAGES} null"),
        ({"prompt": None, "chosen": [YES]}, f"expected chosen and rejected {BOTH}, got one of each"),
        ({"prompt": None, "rejected": [NO]}, f"expected chosen and rejected {BOTH}, got one of each"),
        (
            {"prompt": None, "chosen": [WHICH, YES], "rejected": [said("user", "what ?"), NO]},
            "expected chosen and rejected to begin with the same message, or a prompt column, got neither",
        ),
        (
            {"prompt": [WHICH], "chosen": [said("user", "a ?"), YES], "rejected": [NO]},
            "expected answers to one prompt, got answers that begin with another question",
        ),
        ({"margin": "big"}, "expected margin to be a finite number, got 'big'"),
        ({"margin": True}, "expected margin to be a finite number, got True"),
        ({"margin": math.nan}, "expected margin to be a finite number, got nan"),
        ({"completions": ["red"]}, f"expected {PAIR_OR_RANKED}"),
        ({"completions": "red", "ranks": [1]}, "expected completions to be a list, got str"),
        ({"completions": ["red", 2], "ranks": [1, 2]}, f"expected completion 2 {WORDS_OR_MESSAGES} int"),
        ({"completions": ["red", "two"], "ranks": [1]}, r"expected one rank per completion \(2\), got 1"),
        ({"completions": ["red", "two"], "ranks": [1, 2.5]}, "expected ranks to be integers, got float"),
        ({"completions": ["red", "two"], "ranks": [True, False]}, "expected ranks to be integers, got bool"),
        ({"finished": [True]}, r"expected finished to hold one boolean per completion \(2\), got \[True\]"),
        ({"finished": [1, 0]}, r"expected finished to hold one boolean per completion \(2\), got \[1, 0\]"),
        ({"finished": True}, r"expected finished to hold one boolean per completion \(2\), got True"),
    ],
}


@pytest.mark.parametrize(
    ("read", "change", "sentence"), [(read, *case) for read, cases in MALFORMED.items() for case in cases]
)
def test_malformed_rows(read, change: dict, sentence: str, text: Text) -> None:
    with pytest.raises(ValueError, match=f"^data in memory row 2: {sentence}$"):
        read([READERS[read], READERS[read] | change], text, 64)


@pytest.mark.parametrize("read", READERS)
def test_lengths_that_leave_nothing(read, text: Text) -> None:
    with pytest.raises(ValueError, match=r"^expected max_(length >= 2|prompt_tokens >= 1).*, got 0$"):
        read([READERS[read]], text, 0)


def test_demonstrations(text: Text) -> None:
    loaded = demonstrations(FIXTURES / "demonstrations.jsonl", text, 64)
    assert [spelled(text, example) for example in loaded] == [
        ("<s> name a color", "red </s>"),
        ("<s> name a color", "blue </s>"),
        ("<s> name two <unk>", "red and blue </s>"),
        ("<user> name a color <assistant>", "red </s>"),
        ("<user> name a color <assistant>", "red </s> <user> name two <assistant> red and blue </s>"),
    ]
    assert loaded[4].learn == [True, True, False, False, False, False, True, True, True, True]
    assert (loaded.dropped, loaded.cut, loaded.summary()) == ({}, [], "5 rows")


def test_training_and_generation_read_the_same_prompts(text: Text) -> None:
    source = [row for row in rows(FIXTURES / "demonstrations.jsonl") if "prompt" in row]
    asked = [prompt.tokens for prompt in prompts(source, text, 64)]
    assert [example.prompt for example in demonstrations(source, text, 64)] == asked


def test_a_long_completion_is_cut_on_the_right(text: Text) -> None:
    row = {"prompt": "name two", "completion": "red and blue"}  # 3 + 4 tokens
    whole = demonstrations([row], text, 7)
    assert (spelled(text, whole[0]), whole.cut) == (("<s> name two", "red and blue </s>"), [])
    loaded = demonstrations([row, row | {"completion": "red"}], text, 6)
    assert [spelled(text, example)[1] for example in loaded] == ["red and blue", "red </s>"]
    assert (loaded.cut, loaded.summary()) == ([1], "2 rows, 1 cut (row 1)")
    assert demonstrations([row], text, 4)[0].response == text.completion("red", append_eos=False)


def test_a_long_conversation_is_cut_with_its_marks(text: Text) -> None:
    source = rows(FIXTURES / "demonstrations.jsonl")[4:]
    (example,) = demonstrations(source, text, 12)
    assert spelled(text, example)[1] == "red </s> <user> name two <assistant> red"
    assert example.learn == [True, True, False, False, False, False, True]


def test_demonstrations_that_teach_nothing_are_dropped_and_counted(text: Text) -> None:
    good, row = READERS[demonstrations], {"prompt": "name two : red and blue", "completion": "red"}
    chat = [said("user", "it ?"), said("assistant", " "), said("user", "what ?"), said("assistant", "red")]
    source = [good, row, good | {"completion": ""}, {"messages": chat}, row]
    loaded = demonstrations(source, text, 7)
    assert len(loaded) == 1
    assert loaded.dropped == {"prompt alone fills 7 tokens": [2, 5], "empty completion": [3, 4]}
    assert loaded.summary() == "5 rows, 4 dropped (prompt alone fills 7 tokens: rows 2, 5; empty completion: rows 3, 4)"
    assert len(demonstrations([row], text, 8)) == 1
    sentence = r"^data in memory: no row is left: 1 row, 1 dropped \(empty completion: row 1\)$"
    with pytest.raises(ValueError, match=sentence):
        demonstrations([good | {"completion": " \n"}], text, 7)


def test_an_empty_turn_of_the_prompt_is_not_learned_and_stays(text: Text) -> None:
    history = [said("user", "it ?"), said("assistant", ""), said("user", "what ?")]
    for completion in ("red", [said("assistant", "red")]):
        (example,) = demonstrations([{"prompt": history, "completion": completion}], text, 64)
        assert spelled(text, example) == ("<user> it ? <assistant> </s> <user> what ? <assistant>", "red </s>")


def test_documents_make_every_token_a_target_once(text: Text) -> None:
    source = rows(FIXTURES / "documents.jsonl")
    for max_length in range(2, 12):
        loaded = documents(source, text, max_length)
        assert all(len(e.prompt) == 1 and len(e.prompt) + len(e.response) <= max_length for e in loaded)
        targets = pack(loaded.items).targets.tolist()
        assert targets == [token for row in source for token in text.completion(row["text"])]
        joined = [(a.response[-1], b.prompt[0]) for a, b in pairwise(loaded)]
        assert all(a == b for a, b in joined if a != text.eos_id)
    assert len(documents(source, text, 9)) == 2
    assert documents([*source, {"text": " "}], text, 9).summary() == "3 rows, 1 dropped (empty text: row 3)"


def test_comparisons(text: Text) -> None:
    loaded = comparisons(FIXTURES / "comparisons.jsonl", text, 64)
    assert [[spelled(text, example) for example in item.examples] for item in loaded[:3]] == [
        [("<s> name a color", "red </s>"), ("<s> name a color", "two </s>")],
        [("<s> name a <unk>", "red </s>"), ("<s> name a <unk>", "red red </s>")],
        [("<user> name a color <assistant>", "red </s>"), ("<user> name a color <assistant>", "two </s>")],
    ]
    assert [item.ranks for item in loaded] == [[0, 1], [0, 1], [0, 1], [2, 1, 1, 3], [1, 2]]
    assert [item.margin for item in loaded] == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert [spelled(text, example)[1] for example in loaded[3].examples] == [
        "red </s>",
        "red and blue </s>",
        "blue and red </s>",
        "two </s>",
    ]
    assert spelled(text, loaded[4].examples[1]) == ("<user> name a color <assistant>", "two </s>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("it is red", "it is blue", "it is"),
        ("is it red", "is it re", "is it"),  # a word is never split
        ("is it : red", "is it :\nblue", "is it :"),
        ("is it a color", "is it", "is"),  # each keeps at least a word
        ("red", "blue", ""),
        ("red", "red and blue", ""),
        ("it is\n\nred", "it is\n\nblue", "it is"),  # a prompt does not end in white space
    ],
)
def test_the_prompt_is_what_both_answers_begin_with(chosen: str, rejected: str, prompt: str, text: Text) -> None:
    (item,) = comparisons([{"chosen": chosen, "rejected": rejected}], text, 64)
    for example, whole in zip(item.examples, (chosen, rejected), strict=True):
        assert example.prompt == text.prompt(prompt)
        assert example.prompt + example.response == text.document(whole)


def test_the_shared_messages_are_the_prompt(text: Text) -> None:
    start = [said("user", "it ?"), said("assistant", "yes"), said("user", "what ?")]
    row = {"chosen": [*start, said("assistant", "red")], "rejected": [*start, said("assistant", "blue")]}
    (item,) = comparisons([row], text, 64)
    assert [example.prompt for example in item.examples] == [text.prompt(start)] * 2
    assert [spelled(text, example)[1] for example in item.examples] == ["red </s>", "blue </s>"]
    (item,) = comparisons([{"chosen": start[:2], "rejected": row["rejected"]}], text, 64)
    assert [example.prompt for example in item.examples] == [text.prompt(start[:1])] * 2  # each keeps at least a turn


def test_comparisons_without_a_preference_are_dropped_and_counted(text: Text) -> None:
    good = READERS[comparisons]
    ranked = {"prompt": "name two", "completions": ["red", "blue"], "ranks": [1, 1]}
    same_when_cut = {"prompt": "name two", "chosen": "red and red and blue", "rejected": "red and red and red"}
    source = [
        good,
        ranked,
        {"prompt": "name a", "completions": ["red"], "ranks": [1]},
        good | {"rejected": "red"},
        {"chosen": "it is red", "rejected": "it is red"},
        {"chosen": [WHICH, YES], "rejected": [WHICH, YES]},
        same_when_cut,
        good | {"chosen": ""},
        good | {"prompt": "name two : red and blue"},
        ranked | {"completions": ["red", "red", "blue"], "ranks": [1, 2, 3]},
    ]
    loaded = comparisons(source, text, 7)
    assert len(loaded) == 2
    assert loaded.dropped == {
        "all answers tied": [2],
        "fewer than two answers": [3],
        "all answers the same": [4, 5, 6, 7],
        "empty completion": [8],
        "prompt alone fills 7 tokens": [9],
    }
    assert len(comparisons([same_when_cut], text, 9)) == 1


def test_one_long_answer_is_cut(text: Text) -> None:
    source = [{"prompt": "name two", "chosen": "red and blue and red", "rejected": "red"}]
    loaded = comparisons(source, text, 6)
    assert [spelled(text, example)[1] for example in loaded[0].examples] == ["red and blue", "red </s>"]
    assert loaded.cut == [1]


@pytest.mark.parametrize("prompt", ["it ?", [WHICH]], ids=["text", "messages"])
def test_an_answer_that_was_cut_off_has_no_eos(prompt: str | list, text: Text) -> None:
    row = {"prompt": prompt, "completions": ["yes", "no"], "ranks": [1, 2], "finished": [False, True]}
    loaded = comparisons([row], text, 64)
    assert [spelled(text, example)[1] for example in loaded[0].examples] == ["yes", "no </s>"]
    assert [example.prompt for example in loaded[0].examples] == [text.prompt(prompt)] * 2
    assert loaded.cut == []


def test_prompts_keep_their_text_and_their_columns(text: Text) -> None:
    source = FIXTURES / "prompts.jsonl"
    first, second = prompts(source, text, 64)
    assert (first.text, first.columns) == ("name a color", {"topic": "color", "count": 1})
    assert first.tokens == text.prompt("name a color")
    assert second.text == rows(source)[1]["prompt"]
    assert second.tokens == text.prompt(second.text)


def test_long_prompts_are_dropped_and_counted(text: Text) -> None:
    source = [{"prompt": "red " * n} for n in (3, 4, 2, 9, 9, 9, 9, 9)]
    loaded = prompts(source, text, 4)
    assert [len(prompt.tokens) for prompt in loaded] == [4, 3]
    assert loaded.summary() == "8 rows, 6 dropped (prompt longer than 4 tokens: rows 2, 4, 5, 6, 7, ...)"


def test_an_empty_prompt_needs_a_bos(text: Text) -> None:
    assert prompts([{"prompt": ""}], text, 4)[0].tokens == [text.bos_id]
    bare = PreTrainedTokenizerFast(tokenizer_object=text.tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match=r"no row is left: 1 row, 1 dropped \(empty prompt: row 1\)"):
        prompts([{"prompt": ""}], Text(bare), 4)


def test_loaded_is_a_sequence() -> None:
    loaded = Loaded(["a", "b", "c"], num_rows=3)
    assert (len(loaded), loaded[0], loaded[-1], loaded[1:], list(loaded)) == (3, "a", "c", ["b", "c"], ["a", "b", "c"])


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (8, 4), (1, 4), (3, 1)])
def test_an_epoch_visits_every_item_once(num_items: int, batch_size: int) -> None:
    order = Order(num_items, batch_size, seed=3)
    assert order.steps(3) == 3 * math.ceil(num_items / batch_size)
    epochs = [[], [], []]
    for step in range(order.steps(3)):
        batch = order.batch(step)
        last = step % order.steps_per_epoch == order.steps_per_epoch - 1
        assert len(batch) == (num_items - batch_size * (order.steps_per_epoch - 1) if last else batch_size)
        epochs[order.epoch(step)] += batch
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 4), (3, 8), (1, 2)])
def test_take_is_always_full_and_runs_across_epochs(num_items: int, batch_size: int) -> None:
    order = Order(num_items, batch_size, seed=3)
    taken = [order.take(step) for step in range(num_items)]  # batch_size whole epochs
    assert all(len(items) == batch_size for items in taken)
    stream = list(chain.from_iterable(taken))
    epochs = [stream[i : i + num_items] for i in range(0, len(stream), num_items)]
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
    assert Counter(stream) == dict.fromkeys(range(num_items), batch_size)
    assert stream == [i for step in range(order.steps(batch_size)) for i in order.batch(step)]


def test_the_order_is_a_function_of_the_seed_and_the_step() -> None:
    order = Order(100, 8, seed=1)
    later = [order.batch(step) for step in (40, 7, 12)]
    assert [Order(100, 8, seed=1).batch(step) for step in (40, 7, 12)] == later
    assert order.batch(0) != Order(100, 8, seed=2).batch(0)
    assert order.batch(0) != order.batch(order.steps_per_epoch) != list(range(8))
    assert Order(5, 5, seed=0).batch(0) == [1, 2, 4, 3, 0]  # the same on every machine and in every version


def test_an_order_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^expected num_items >= 1, got 0$"):
        Order(0, 4)
    with pytest.raises(ValueError, match=r"^expected batch_size >= 1, got 0$"):
        Order(4, 0)
