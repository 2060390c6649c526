"""Formats: what each published schema becomes, from every kind of source, and that a checkpoint keeps its template."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests import toys
from twinhead.engine import cli, formats
from twinhead.engine.batch import Example
from twinhead.engine.data import comparisons, demonstrations, documents, prompts, unpaired
from twinhead.engine.rows import rows, stream
from twinhead.engine.selection import distinct, split
from twinhead.engine.templates import TEMPLATES
from twinhead.engine.text import Text

FIXTURES = Path(__file__).parent / "data" / "formats"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: everything can be spelled, and read back."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelled = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=spelled, bos_token="<s>", eos_token="</s>")


def written(template: str = "roles") -> Text:
    return Text(tokenizer(), template)


def spelled(text: Text, example: Example) -> str:
    """The prompt, a bar, and the response of which [what is not learned] stands in brackets."""
    learn = example.learn or [True] * len(example.response)
    out = text.tokenizer.decode(example.prompt) + " | "
    borders = [i for i in range(len(learn)) if i == 0 or learn[i] != learn[i - 1]]
    for start, end in zip(borders, [*borders[1:], len(learn)], strict=True):
        run = text.tokenizer.decode(example.response[start:end])
        out += run if learn[start] else f"[{run}]"
    return out


# -- what every format becomes -----------------------------------------------------------------------------------------

DEMONSTRATIONS = {
    "alpaca": [
        "<s>[USER]Name a colour of the sky.[ASSISTANT] | Blue.</s>",
        "<s>[USER]Make the sentence a question.\n\nThe bus is late.[ASSISTANT] | Is the bus late?</s>",
        "<s>[USER]Count to three.[ASSISTANT] | One, two, three.</s>",
    ],
    "dolly": [
        "<s>[USER]Who wrote the note?\n\nThe note on the door is signed by Ada.[ASSISTANT] | Ada did.</s>",
        "<s>[USER]Give me a name for a boat.[ASSISTANT] | Second Wind.</s>",
        "<s>[USER]Is ice lighter than water?[ASSISTANT] | Yes, it floats.</s>",
    ],
    "sharegpt": [
        "<s>[SYSTEM]Be brief.[USER]Hello[ASSISTANT] | Hello!</s>[[USER]What is two and two?[ASSISTANT]]Four.</s>",
        "<s>[USER]Name a fruit.[ASSISTANT] | A pear.</s>",
        "<s>[USER]One word, please.[ASSISTANT] | Word.</s>",
    ],
    "flan": [
        "<s>[USER]Premise: It rains.\nHypothesis: It is wet.\nDoes the premise entail the hypothesis?[ASSISTANT] "
        "| yes</s>",
        "<s>[USER]Translate to German: good morning[ASSISTANT] | Guten Morgen</s>",
        "<s>[USER]What comes after Monday?[ASSISTANT] | Tuesday</s>",
    ],
    "oasst": [
        "<s>[USER]What is a lemma?[ASSISTANT] | A helping theorem.</s>",
        "<s>[USER]What is a lemma?[ASSISTANT]A small proven statement.</s>[USER]Helping with what?[ASSISTANT] "
        "| With a larger proof.</s>",
    ],
    "ultrafeedback": [
        "<s>[USER]Name a prime.[ASSISTANT] | Two is one.</s>",
        "<s>[USER]Say nothing odd.[ASSISTANT] | Good day.</s>",
    ],
    "ultrafeedback_binarized": [
        "<s>[USER]Name a metal.[ASSISTANT] | Iron.</s>",
        "<s>[USER]Name a river.[ASSISTANT] | The Rhine.</s>",
    ],
    "trl": [
        "<s>Name a tree. |  An oak.</s>",
        "<s>[USER]Name a bird.[ASSISTANT] | A wren.</s>",
        "<s>[USER]Name a fish.[ASSISTANT] | A trout.</s>",
        "<s>Name a stone. | Flint.</s>",
    ],
}
COMPARISONS: dict[str, list[tuple[str, dict[str, int]]]] = {
    "oasst": [
        (
            "<s>[USER]What is a lemma?[ASSISTANT]",
            {"A small proven statement.</s>": 1, "A helping theorem.</s>": 0, "A fruit.</s>": 2},
        )
    ],
    "hh_rlhf": [
        (
            "<s>[USER]How do I boil an egg?[ASSISTANT]",
            {"Put it in boiling water for eight minutes.</s>": 0, "Put it in the oven.</s>": 1},
        ),
        (
            "<s>[USER]Hi[ASSISTANT]Hello, what can I do?</s>[USER]Tell me a joke[ASSISTANT]",
            {"Sure: why did the hen stop?</s>": 0, "Sure.</s>": 1},
        ),
        (
            "<s>[USER]Is it late?[ASSISTANT]",
            {
                "It is.</s>[[USER]How late?[ASSISTANT]]Past ten.</s>": 0,
                "It is.</s>[[USER]Why?[ASSISTANT]]Who knows.</s>": 1,
            },
        ),
    ],
    "ultrafeedback": [
        ("<s>[USER]Name a prime.[ASSISTANT]", {"Seven.</s>": 1, "Nine.</s>": 2, "Two is one.</s>": 0, "Four.</s>": 2})
    ],
    "ultrafeedback_binarized": [("<s>[USER]Name a metal.[ASSISTANT]", {"Iron.</s>": 0, "Wood.</s>": 1})],
    "shp": [
        (
            "<s>[USER]My bread does not rise. What do I do?[ASSISTANT]",
            {"Check whether your yeast is still alive.</s>": 0, "Buy another.</s>": 1},
        ),
        ("<s>[USER]Salt or sugar first?[ASSISTANT]", {"It does not matter.</s>": 0, "Yes.</s>": 1}),
    ],
    "trl_pairs": [
        ("<s>Name a tree.", {" An oak.</s>": 0, " A cod.</s>": 1}),
        ("<s>The sky is", {" blue.</s>": 0, " tall.</s>": 1}),
        ("<s>[USER]Name a bird.[ASSISTANT]", {"A wren.</s>": 0, "A cod.</s>": 1}),
    ],
    "ranked": [("<s>Name a number under ten.", {"Four.</s>": 0, "Ten.</s>": 1, "Nine.</s>": 0, "Dog.</s>": 2})],
}
UNPAIRED = {
    "kto": [
        ("<s>Name a tree. | An oak.</s>", True),
        ("<s>[USER]Name a bird.[ASSISTANT] | A trout.</s>", False),
        ("<s>[USER]Name a fish.[ASSISTANT] | A trout.</s>", True),
    ],
    "shp": [
        (
            "<s>[USER]My bread does not rise. What do I do?[ASSISTANT] | Check whether your yeast is still alive.</s>",
            True,
        ),
        ("<s>[USER]My bread does not rise. What do I do?[ASSISTANT] | Buy another.</s>", False),
        ("<s>[USER]Salt or sugar first?[ASSISTANT] | It does not matter.</s>", True),
        ("<s>[USER]Salt or sugar first?[ASSISTANT] | Yes.</s>", False),
    ],
    "ultrafeedback_binarized": [
        ("<s>[USER]Name a metal.[ASSISTANT] | Iron.</s>", True),
        ("<s>[USER]Name a metal.[ASSISTANT] | Wood.</s>", False),
    ],
}
PROMPTS = {
    "prompts": ["<s>Name a tree.", "<s>[USER]Name a bird.[ASSISTANT]"],
    "alpaca": [line.partition(" | ")[0] for line in DEMONSTRATIONS["alpaca"]],
    "dolly": [line.partition(" | ")[0] for line in DEMONSTRATIONS["dolly"]],
    "flan": [line.partition(" | ")[0] for line in DEMONSTRATIONS["flan"]],
    "sharegpt": [
        "<s>[SYSTEM]Be brief.[USER]Hello[ASSISTANT]Hello!</s>[USER]What is two and two?[ASSISTANT]",
        "<s>[USER]Name a fruit.[ASSISTANT]A pear.</s>[USER]Another?[ASSISTANT]",
        "<s>[USER]One word, please.[ASSISTANT]",
    ],
    "oasst": [
        "<s>[USER]What is a lemma?[ASSISTANT]",
        "<s>[USER]What is a lemma?[ASSISTANT]A small proven statement.</s>[USER]Helping with what?[ASSISTANT]",
        "<s>[USER]What is a lemma?[ASSISTANT]A helping theorem.</s>[USER]Thanks.[ASSISTANT]",
    ],
    "hh_rlhf": [prompt for prompt, _ in COMPARISONS["hh_rlhf"]],
    "ultrafeedback": [
        "<s>[USER]Name a prime.[ASSISTANT]",
        "<s>[USER]Say nothing odd.[ASSISTANT]",
        "<s>[USER]Pick one: tea or soup?[ASSISTANT]",
    ],
    "ultrafeedback_binarized": ["<s>[USER]Name a metal.[ASSISTANT]", "<s>[USER]Name a river.[ASSISTANT]"],
    "shp": [prompt for prompt, _ in COMPARISONS["shp"]],
    "ranked": ["<s>Name a number under ten.", "<s>Name any number."],
}
# What each reader says of a fixture, where that is more than its number of rows.
SUMMARIES = {
    (demonstrations, "sharegpt"): "4 rows of sharegpt, 1 dropped (no well-formed question with its answer: row 3), "
    "3 malformed turns left out (row 2)",
    (demonstrations, "oasst"): "8 rows of oasst, 2 dropped (empty completion: row 7; "
    "part of the thread is missing: row 8)",
    (comparisons, "oasst"): "8 rows of oasst, 3 dropped (fewer than two answers: rows 5, 7; "
    "part of the thread is missing: row 8)",
    (demonstrations, "ultrafeedback"): "3 rows of ultrafeedback, 1 dropped (empty completion: row 3)",
    (comparisons, "ultrafeedback"): "3 rows of ultrafeedback, 2 dropped (all answers tied: row 2; "
    "fewer than two answers: row 3)",
    (comparisons, "ultrafeedback_binarized"): "2 rows of ultrafeedback_binarized, 1 dropped (all answers tied: row 2)",
    (unpaired, "ultrafeedback_binarized"): "2 rows of ultrafeedback_binarized, 1 dropped (all answers tied: row 2)",
    (comparisons, "ranked"): "2 rows, 1 dropped (all answers tied: row 2)",
    (demonstrations, "trl"): "4 rows",
    (comparisons, "hh_rlhf"): "3 rows of hh_rlhf",
}


def read(reader: Any, source: Any, text: Text) -> list[Any]:
    """What a reader makes of a source, spelled as the tables above."""
    loaded = reader(source, text, 400)
    if reader is comparisons:
        return [
            (
                text.tokenizer.decode(item.examples[0].prompt),
                {spelled(text, e).partition(" | ")[2]: rank for e, rank in zip(item.examples, item.ranks, strict=True)},
            )
            for item in loaded
        ]
    if reader is unpaired:
        return [(spelled(text, item.example), item.label) for item in loaded]
    return [text.tokenizer.decode(item.tokens) if reader is prompts else spelled(text, item) for item in loaded]


TABLES = {demonstrations: DEMONSTRATIONS, comparisons: COMPARISONS, unpaired: UNPAIRED, prompts: PROMPTS}
GOLDEN = [(reader, name) for reader, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("reader", "name"), GOLDEN)
def test_what_a_format_becomes(reader: Any, name: str) -> None:
    text = written()
    path = FIXTURES / f"{name}.jsonl"
    assert read(reader, path, text) == TABLES[reader][name]
    if (reader, name) in SUMMARIES:
        assert reader(path, text, 400).summary() == SUMMARIES[reader, name]


def test_plain_text_stays_plain() -> None:
    text = written()
    path = FIXTURES / "text.jsonl"
    assert [spelled(text, e) for e in documents(path, text, 400)] == [f"<s> | {r['text']}</s>" for r in rows(path)]
    messages = FIXTURES / "oasst.jsonl"  # their column text is as good as any for pre-training
    assert documents(messages, text, 400).summary() == "8 rows"


def test_every_format_has_a_fixture_that_is_recognised() -> None:
    known = {one.name for one in formats.FORMATS}
    assert known <= {path.stem for path in FIXTURES.iterdir()}
    for path in FIXTURES.iterdir():
        found = {
            getattr(formats.recognised(row), "name", path.stem) for _, row in formats.threads(enumerate(rows(path)))
        }
        assert found == {path.stem}
        assert path.stem in {name for table in TABLES.values() for name in table} | {"text"}


MIXED = ("trl", "trl_pairs", "kto", "prompts")  # text and messages in one column: parquet has no such thing


@pytest.mark.parametrize(("reader", "name"), [case for case in GOLDEN if case[1] not in MIXED])
def test_from_parquet_as_from_lines(reader: Any, name: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(FIXTURES / f"{name}.jsonl")).to_parquet(tmp_path / "table.parquet")
    assert read(reader, tmp_path / "table.parquet", written()) == TABLES[reader][name]


def test_a_folder_that_datasets_reads_and_a_slice_of_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text((FIXTURES / "flan.jsonl").read_text())
    (folder / "test.jsonl").write_text((FIXTURES / "flan.jsonl").read_text().splitlines()[2] + "\n")
    text = written()
    assert read(demonstrations, folder, text) == DEMONSTRATIONS["flan"]
    assert read(demonstrations, f"{folder}:test", text) == DEMONSTRATIONS["flan"][2:]
    assert read(demonstrations, f"{folder}:train[:2]", text) == DEMONSTRATIONS["flan"][:2]
    with pytest.raises(ValueError, match=r"datasets.load_dataset finds with a dev split, found none"):
        rows(f"{folder}:dev")


def test_rows_pass_through_one_at_a_time(tmp_path: Path) -> None:
    endless = ({"inputs": "red", "targets": "blue" if n < 3 else None} for n in count())
    with pytest.raises(ValueError, match=r"^data in memory row 4 \(flan\): expected targets to be text, got null$"):
        demonstrations(endless, written(), 400)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{')
    passing = stream(path)
    assert [next(passing), next(passing)] == [{"n": 1}, {"n": 2}]
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        next(passing)
    datasets.Dataset.from_list([{"n": n} for n in range(3000)]).to_parquet(tmp_path / "rows.parquet")
    assert [row["n"] for row in stream(tmp_path / "rows.parquet")] == list(range(3000))


# -- single formats ----------------------------------------------------------------------------------------------------


def test_the_dialogues_of_hh_rlhf_are_written_down_again_as_they_were() -> None:
    text = written("dialogue")
    path = FIXTURES / "hh_rlhf.jsonl"
    for item, row in zip(comparisons(path, text, 400), rows(path), strict=True):
        for example, whole in zip(item.examples, (row["chosen"], row["rejected"]), strict=True):
            assert text.decode(example.prompt + example.response) == whole
        assert text.decode(item.examples[0].prompt).endswith("\n\nAssistant:")
    assert [text.decode(p.tokens) for p in prompts(path, text, 400)] == [
        text.decode(item.examples[0].prompt) for item in comparisons(path, text, 400)
    ]


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        ("\n\nHuman: what?\n\nAssistant: no", "answers to different questions"),
        ("\n\nAssistant: no", "a dialogue that does not begin with a human"),
        ("Human: who?\n\nAssistant: no", "a dialogue that does not begin with a human"),
        ("\n\nHuman: who?\n\nAssistant:", "empty completion"),
        ("\n\nHuman: who?\n\nAssistant: me", "all answers the same"),
    ],
)
def test_dialogues_that_cannot_be_compared_are_dropped(rejected: str, reason: str) -> None:
    good = {"chosen": "\n\nHuman: who?\n\nAssistant: me", "rejected": "\n\nHuman: who?\n\nAssistant: you"}
    loaded = comparisons([good, good | {"rejected": rejected}], written(), 400)
    assert loaded.dropped == {reason: [2]}


def test_weak_preferences_of_shp_can_be_left_out() -> None:
    loaded = comparisons(FIXTURES / "shp.jsonl", written(), 400, min_score_ratio=2)
    assert loaded.summary() == "2 rows of shp, 1 dropped (score ratio below 2: row 2)"
    assert len(comparisons(FIXTURES / "shp.jsonl", written(), 400, min_score_ratio=1.5)) == 2


@pytest.mark.parametrize(
    ("turns", "kept", "left_out"),
    [
        ("h:a g:b x:c h:d g:e", "a b", 3),  # nobody known says it
        ("g:z h:a g:b", "a b", 1),
        ("s:z g:y h:a g:b", "z a b", 1),
        ("h:a g:b g:c h:d g:e", "a b", 3),  # not its speaker's turn
        ("h:a g:b s:c h:d g:e", "a b", 3),
        ("h:a g:b h: g:c", "a b", 2),  # nothing said
        ("h:a g:b h:c", "a b c", 0),
    ],
)
def test_a_conversation_ends_before_a_malformed_turn(turns: str, kept: str, left_out: int) -> None:
    names = {"h": "human", "g": "gpt", "s": "system", "x": "bing"}
    parts = [turn.split(":") for turn in turns.split()]
    row = formats.sharegpt({"conversations": [{"from": names[who], "value": value} for who, value in parts]})
    assert [message["content"] for message in row["messages"]] == kept.split()
    assert row[formats.LEFT_OUT] == left_out


@pytest.mark.parametrize("turn", [None, "a", {}, {"from": "human"}, {"from": "human", "value": 3}])
def test_a_conversation_of_nothing_but_malformed_turns_is_dropped(turn: Any) -> None:
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    loaded = demonstrations([good, {"conversations": [turn, *good["conversations"]]}], written(), 400)
    assert loaded.dropped == {"no well-formed question with its answer": [2]}


def test_trees_come_in_any_order_and_without_what_was_deleted() -> None:
    table = rows(FIXTURES / "oasst.jsonl")
    text = written()
    assert sorted(read(demonstrations, table[::-1], text)) == sorted(DEMONSTRATIONS["oasst"])
    without = [row | {"deleted": row["message_id"] == "m3"} for row in table]
    loaded = demonstrations(without, text, 400)
    assert spelled(text, loaded[0]).endswith("A small proven statement.</s>")
    assert loaded.dropped == {"part of the thread is missing": [7, 8]}
    circle = table[:3] + [{**table[0], "message_id": a, "parent_id": b} for a, b in ("xy", "yx")]
    assert demonstrations(circle, text, 400).dropped == {"part of the thread is missing": [4, 5]}


@pytest.mark.parametrize(
    ("reader", "name", "change", "sentence"),
    [
        (demonstrations, "alpaca", {"output": None}, "expected output to be text, got null"),
        (demonstrations, "alpaca", {"input": 3}, "expected input to be text, got int"),
        (demonstrations, "dolly", {"instruction": ["a"]}, "expected instruction to be text, got list"),
        (demonstrations, "flan", {"inputs": 1}, "expected inputs to be text, got int"),
        (demonstrations, "sharegpt", {"conversations": "a"}, "expected conversations to be a list of turns, got str"),
        (demonstrations, "oasst", {"role": "robot"}, "expected role to be prompter or assistant, got 'robot'"),
        (demonstrations, "oasst", {"text": None}, "expected text to be text, got null"),
        (comparisons, "hh_rlhf", {"rejected": 1}, "expected rejected to be text, got int"),
        (comparisons, "shp", {"labels": 2}, r"expected labels to be 1 \(A is better\) or 0, got 2"),
        (comparisons, "shp", {"score_ratio": "3"}, "expected score_ratio to be a finite number, got '3'"),
        (comparisons, "ultrafeedback", {"completions": ["a"]}, "expected completions to be a list of objects with .*"),
        (comparisons, "alpaca", {}, "expected the columns chosen and rejected .*, got the columns prompt, completion"),
        (
            demonstrations,
            "hh_rlhf",
            {},
            "expected the columns prompt and .*, got the columns chosen, rejected",
        ),
    ],
)
def test_a_malformed_row_is_named_with_its_format(reader: Any, name: str, change: dict, sentence: str) -> None:
    row = rows(FIXTURES / f"{name}.jsonl")[0]
    with pytest.raises(ValueError, match=rf"^data in memory row 1 \({name}\): {sentence}$"):
        reader([row | change], written(), 400)


def test_ranks_are_whole_numbers() -> None:
    tree = rows(FIXTURES / "oasst.jsonl")[:3]
    for rank, sentence in ((0.5, "0.5"), (True, "True"), ("1", "'1'")):
        with pytest.raises(ValueError, match=rf"^data in memory row 1 \(oasst\): expected rank .*, got {sentence}$"):
            comparisons([*tree[:2], tree[2] | {"rank": rank}], written(), 400)
    assert comparisons([*tree[:2], tree[2] | {"rank": 0.0}], written(), 400)[0].ranks == [1, 0]


JUNK = [None, True, 0, 0.5, float("nan"), "", "red", [], ["red"], [None], {}, {"role": []}, [{"from": ["human"]}], [[]]]


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.iterdir()))
@pytest.mark.parametrize("reader", [demonstrations, comparisons, unpaired, prompts, documents])
def test_junk_in_any_column_is_read_dropped_or_named(reader: Any, name: str) -> None:
    table, text = rows(FIXTURES / f"{name}.jsonl"), written()
    for column in {column for row in table for column in row}:
        for junk in JUNK:
            try:
                said = reader([table[0] | {column: junk}, *table[1:]], text, 400).summary()
            except ValueError as error:
                said = str(error)
            assert said.startswith((f"{len(table)} row", "data in memory"))


@pytest.mark.parametrize("label", [None, 1, "true"])
def test_a_label_is_a_boolean(label: Any) -> None:
    good = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(ValueError, match=f"^data in memory row 2: expected label to be true or false, got {label!r}$"):
        unpaired([good, good | {"label": label}], written(), 400)


def test_unpaired_rows_that_teach_nothing() -> None:
    good = {"prompt": "a", "completion": "b c", "label": True}
    loaded = unpaired([good, good | {"completion": " "}, good | {"prompt": "a" * 9}], written(), 4)
    assert loaded.summary() == (
        "3 rows, 2 dropped (empty completion: row 2; prompt alone fills 4 tokens: row 3), 1 cut (row 1)"
    )
    with pytest.raises(
        ValueError, match=r"expected the columns prompt, completion and label, .* got the columns prompt$"
    ):
        unpaired([{"prompt": "a"}], written(), 4)
    with pytest.raises(ValueError, match=r"^expected max_length >= 2"):
        unpaired([good], written(), 1)


def test_native_columns_come_before_a_format() -> None:
    both = {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}
    text = written()
    assert [spelled(text, e) for e in demonstrations([both], text, 400)] == ["<s>a | b</s>"]
    mixed = demonstrations([both, {"instruction": "c", "output": "d"}], text, 400)
    assert mixed.summary() == "2 rows of native and alpaca"


def test_rows_that_nobody_knows_are_told_what_is_known() -> None:
    with pytest.raises(ValueError) as raised:
        demonstrations([{"question": "a", "reply": "b"}], written(), 400)
    said = str(raised.value)
    assert "got the columns question, reply; other known formats are hh_rlhf (chosen, rejected), " in said
    assert all(f"{known.name} ({', '.join(known.columns)})" in said for known in formats.FORMATS)


def test_reference_answers_reach_reward_functions_and_rankings_do_not() -> None:
    asked = prompts(FIXTURES / "ultrafeedback.jsonl", written(), 400)
    assert asked[0].columns == {"completion": "Two is one."}
    assert prompts(FIXTURES / "alpaca.jsonl", written(), 400)[0].columns == {"completion": "Blue."}


# -- templates ---------------------------------------------------------------------------------------------------------

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nMake the sentence a question.\n\n### Input:\nThe bus is late.\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour of the sky.\n\n### Response:"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]
CHATS = {
    "plain": "<s>System:\nBe brief.\n\nUser:\nOne?\n\nAssistant:\n | Two.</s>"
    "[\n\nUser:\nThree?\n\nAssistant:\n]Four.</s>",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nOne?\n\n### Response: | Two.</s>"
    "[\n\n### Instruction:\nThree?\n\n### Response:]Four.</s>",
    "short": "<s>Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n | Two.</s>"
    "[\n\n### Instruction:\nThree?\n\n### Response:\n]Four.</s>",
    "roles": "<s>[SYSTEM]Be brief.[USER]One?[ASSISTANT] | Two.</s>[[USER]Three?[ASSISTANT]]Four.</s>",
    "tags": "<s><|system|>\nBe brief.\n<|user|>\nOne?\n<|assistant|>\n | Two.</s>"
    "[\n<|user|>\nThree?\n<|assistant|>\n]Four.</s>",
    "dialogue": "<s>\n\nSystem: Be brief.\n\nHuman: One?\n\nAssistant: |  Two.</s>"
    "[\n\nHuman: Three?\n\nAssistant:] Four.</s>",
}


def test_alpaca_chooses_its_text_by_an_empty_input() -> None:
    text = written("alpaca")
    without, with_input, missing = demonstrations(FIXTURES / "alpaca.jsonl", text, 400)
    assert text.decode(without.prompt) == WITHOUT_INPUT
    assert text.decode(with_input.prompt) == WITH_INPUT
    assert text.decode(missing.prompt) == WITHOUT_INPUT.replace("Name a colour of the sky.", "Count to three.")
    assert text.decode(with_input.response) == "Is the bus late?"
    assert [example.prompt.count(text.bos_id) for example in (without, with_input)] == [1, 1]
    assert without.response[-1] == text.eos_id


def test_the_short_template_keeps_the_input() -> None:
    text = written("short")
    without, with_input, _ = demonstrations(FIXTURES / "alpaca.jsonl", text, 400)
    assert text.decode(without.prompt) == "### Instruction:\nName a colour of the sky.\n\n### Response:\n"
    assert text.decode(with_input.prompt) == (
        "### Instruction:\nMake the sentence a question.\n\n### Input:\nThe bus is late.\n\n### Response:\n"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_replies_are_learned_each_with_its_eos_and_bos_stands_once(template: str) -> None:
    text = written(template)
    assert spelled(text, text.conversation(CHAT)) == CHATS[template]
    example = text.conversation(CHAT)
    assert (example.prompt + example.response).count(text.bos_id) == 1
    first = example.learn.index(False)
    assert example.prompt == text.prompt(CHAT[:2])
    assert (example.prompt + example.response)[: len(text.prompt(CHAT[:4]))] == text.prompt(CHAT[:4])
    assert example.response[first - 1] == example.response[-1] == text.eos_id
    assert text.stop_ids == [text.eos_id]


def test_a_template_needs_no_bos() -> None:
    made = tokenizer()
    made.bos_token = None
    for template in TEMPLATES:
        assert "None" not in spelled(Text(made, template), Text(made, template).conversation(CHAT))


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] + '~' }}{% endfor %}")
    text = written(str(tmp_path / "own.jinja"))
    assert spelled(text, text.conversation(CHAT[:3])) == "Be brief.~One?~ | Two.~</s>"
    for name in ("alpacca", str(tmp_path / "none.jinja"), "tests/conftest.py"):
        sentence = f"^template: expected one of plain, alpaca, .*, or a .jinja file, got '{name}'$"
        with pytest.raises(ValueError, match=sentence):
            Text.from_pretrained(tmp_path, name)


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama over bytes, without a chat template."""
    folder = tmp_path_factory.mktemp("model") / "bytes"
    made = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": len(made), "max_position_embeddings": 512, "pad_token_id": 1}
        LlamaForCausalLM(toys.shape(**size)).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def taught(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It has seen Alpaca's rows, in the short template."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    command(["sft", "--model", model, "--data", str(FIXTURES / "alpaca.jsonl"), "--template", "short"], folder)
    return str(folder)


@toys.one_thread()
def command(words: list[str], folder: Path | None = None) -> None:
    assert cli.main([*words, *(["--output_dir", str(folder), "--device", "cpu"] if folder else [])]) == 0


def test_the_checkpoint_keeps_its_template(taught: str, tmp_path: Path) -> None:
    text = Text.from_pretrained(taught)
    assert text.tokenizer.chat_template == TEMPLATES["short"]
    seen = demonstrations(FIXTURES / "alpaca.jsonl", text, 400)
    asked = prompts([{"instruction": row["instruction"], "input": row["input"]}
                     for row in rows(FIXTURES / "alpaca.jsonl")[:2]], text, 400)  # fmt: skip
    assert [prompt.tokens for prompt in asked] == [example.prompt for example in seen[:2]]
    command(["reward", "--model", taught, "--data", str(FIXTURES / "shp.jsonl")], tmp_path / "reward")
    assert Text.from_pretrained(tmp_path / "reward").tokenizer.chat_template == TEMPLATES["short"]


# -- selection ---------------------------------------------------------------------------------------------------------


def test_prompts_that_begin_alike_are_one() -> None:
    table = [
        {"prompt": text, "n": n} for n, text in enumerate(["name a tree", "name a bird", "name", "name", "a tree"])
    ]
    for prefix, kept in ((1, [0, 4]), (7, [0, 2, 4]), (8, [0, 1, 2, 4]), (99, [0, 1, 2, 4])):
        assert [row["n"] for row in distinct(table, prefix)] == kept
    with pytest.raises(ValueError, match=r"^expected prefix >= 1 character, got 0$"):
        distinct(table, 0)
    with pytest.raises(
        ValueError, match=r"^data in memory row 1: expected the column prompt, got the columns colour; other"
    ):
        distinct([{"colour": "red"}], 9)


def test_conversations_that_begin_alike_are_one() -> None:
    text = written()
    for name in ("oasst", "hh_rlhf", "sharegpt"):
        path = FIXTURES / f"{name}.jsonl"
        kept = distinct(path, 10_000)
        assert read(prompts, kept, text) == PROMPTS[name]
        assert read(prompts, distinct([*kept, *kept], 10_000), text) == PROMPTS[name]
    assert len(distinct(FIXTURES / "oasst.jsonl", 22)) == 1  # "user: What is a lemma?"


def test_a_user_is_on_one_side() -> None:
    table = [{"prompt": str(n), "user": f"user {n % 50}"} for n in range(1000)]
    train, heldout = split(table, "user", 0.3)
    assert len(train) + len(heldout) == 1000
    assert not {row["user"] for row in train} & {row["user"] for row in heldout}
    assert 5 <= len({row["user"] for row in heldout}) <= 25
    assert split(table[::-1], "user", 0.3) == (train[::-1], heldout[::-1])
    assert (split(table, "user", 0), split(table, "user", 1)) == ((table, []), ([], table))
    with pytest.raises(ValueError, match=r"^expected share to be between 0 and 1, got 2$"):
        split(table, "user", 2)
    with pytest.raises(
        ValueError, match=r"^data in memory row 1: expected the column name, got the columns prompt, user$"
    ):
        split(table, "name", 0.5)
