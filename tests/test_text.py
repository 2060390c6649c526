"""Text: BOS and EOS exactly once, one border between prompt and completion, and the assistant's turns alone learned."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerFast

from twinhead.engine.text import PLAIN_TEMPLATE, Text

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["what is red? red is a color. is it? yes, it is.", "User:\nhello\n\nAssistant:\nhello to you\n"] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is red?"},
    {"role": "assistant", "content": "a color"},
    {"role": "user", "content": "is it?"},
    {"role": "assistant", "content": "yes"},
]


def tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", chat_template: str | None = None, automatic=False):
    """A byte-level BPE that knows every byte, the words of CORPUS and SPECIAL."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    known = {"special_tokens": SPECIAL, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=360, show_progress=False, **known)
    bpe.train_from_iterator(CORPUS, trainer)
    if automatic:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat_template, **tokens)


def spelled(text: Text, ids: list[int]) -> str:
    """The text of ids with its special tokens."""
    return text.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def plain() -> Text:
    return Text(tokenizer())


@pytest.mark.parametrize(
    ("made", "begin"),
    [
        (tokenizer(), ["<s>"]),
        (tokenizer(automatic=True), ["<s>"]),
        (tokenizer(bos="</s>"), ["</s>"]),  # GPT-2: one token for both
        (tokenizer(bos=None), []),
    ],
    ids=["named", "automatic", "same as EOS", "none"],
)
def test_bos_once_and_eos_once(made: PreTrainedTokenizerFast, begin: list[str], tmp_path: Path) -> None:
    text = Text(made)
    spell = "".join(begin)
    assert spelled(text, text.prompt("what is red?")) == f"{spell}what is red?"
    assert text.prompt("") == made.convert_tokens_to_ids(begin)
    assert spelled(text, text.prompt("<s>what")) == ("<s>what" if spell != "</s>" else "</s><s>what")
    assert spelled(text, text.completion("a color")) == "a color</s>"
    assert spelled(text, text.completion("a color</s>")) == "a color</s>"
    assert spelled(text, text.completion("a color</s></s>")) == "a color</s>"
    assert spelled(text, text.completion("a color", append_eos=False)) == "a color"
    assert spelled(text, text.document("it is.")) == f"{spell}it is.</s>"

    text.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved("what is red?")["input_ids"] == text.prompt("what is red?")
    assert saved.pad_token == "</s>"


def test_gpt2_records_its_bos(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = GPT2Tokenizer(vocab={**vocabulary, "<|endoftext|>": 256}, merges=[])
    assert 256 not in made("red")["input_ids"]
    Text(made).save_pretrained(tmp_path)
    text = Text.from_pretrained(tmp_path)
    assert text.tokenizer("red")["input_ids"] == text.prompt("red")
    assert text.prompt("red")[0] == text.eos_id == 256


def test_a_pad_token_of_its_own_stays() -> None:
    made = tokenizer()
    made.pad_token = "<|im_start|>"
    assert Text(made).tokenizer.pad_token == "<|im_start|>"


def test_the_border_does_not_depend_on_merges(plain: Text) -> None:
    whole = plain.tokenizer.encode("what is red", add_special_tokens=False)
    halves = plain.completion("what is r", append_eos=False) + plain.completion("ed", append_eos=False)
    assert whole != halves
    assert plain.decode(whole) == plain.decode(halves)


@settings(max_examples=100, deadline=None, database=None)
@given(string=st.text())
def test_decode_returns_what_was_encoded(plain: Text, string: str) -> None:
    assert plain.decode(plain.completion(string)) == string


def test_decode_leaves_out_special_tokens_and_tidies_nothing(plain: Text) -> None:
    assert plain.decode([plain.bos_id, *plain.completion("it is . do n't  go")]) == "it is . do n't  go"
    assert plain.decode([]) == ""


def test_the_plain_template_reads_like_a_page() -> None:
    text = Text(tokenizer())
    assert text.tokenizer.chat_template is None
    assert spelled(text, text.prompt(CHAT[:4])) == (
        "<s>System:\nbe brief\n\nUser:\nwhat is red?\n\nAssistant:\na color</s>\n\nUser:\nis it?\n\nAssistant:\n"
    )
    assert text.tokenizer.chat_template == PLAIN_TEMPLATE
    assert spelled(Text(tokenizer(bos=None)), text.prompt(CHAT[1:2])[1:]) == "User:\nwhat is red?\n\nAssistant:\n"


def test_the_plain_template_travels_with_the_tokenizer(tmp_path: Path) -> None:
    text = Text(tokenizer())
    ids = text.prompt(CHAT[:4])
    text.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.apply_chat_template(CHAT[:4], add_generation_prompt=True, return_dict=False) == ids
    assert Text.from_pretrained(tmp_path).conversation(CHAT) == text.conversation(CHAT)


def test_a_text_that_never_saw_a_conversation_saves_no_template(plain: Text, tmp_path: Path) -> None:
    fresh = Text(tokenizer())
    fresh.prompt("what")
    assert fresh.stop_ids == [fresh.eos_id]
    fresh.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


@pytest.mark.parametrize("automatic", [False, True])
def test_a_template_that_writes_bos_gets_no_second_one(automatic: bool) -> None:
    text = Text(tokenizer(chat_template="{{ bos_token }}" + CHATML, automatic=automatic))
    ids = text.prompt(CHAT[:2])
    assert ids.count(text.bos_id) == 1
    assert ids[0] == text.bos_id
    assert ids == text.tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)


def learned(text: Text, messages: list[dict[str, str]], first: int = 0) -> tuple[str, list[str]]:
    """The prompt of a conversation and its runs of learned tokens, spelled out."""
    example = text.conversation(messages, first)
    runs: list[list[int]] = []
    before = False
    for token, learn in zip(example.response, example.learn, strict=True):
        if learn:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = learn
    assert before, "a response ends in a learned token"
    return spelled(text, example.prompt), [spelled(text, run) for run in runs]


def test_only_the_assistant_is_learned() -> None:
    text = Text(tokenizer(eos="<|im_end|>", bos=None, chat_template=CHATML))
    prompt, turns = learned(text, CHAT)
    assert prompt == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is red?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert turns == ["a color<|im_end|>", "yes<|im_end|>"]
    example = text.conversation(CHAT)
    between = "\n<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(text, example.response) == f"a color<|im_end|>{between}yes<|im_end|>"
    assert text.stop_ids == [text.eos_id]


def test_training_reads_the_ids_that_generation_starts_from() -> None:
    for text in (Text(tokenizer(eos="<|im_end|>", chat_template=CHATML)), Text(tokenizer())):
        example = text.conversation(CHAT)
        assert example.prompt == text.prompt(CHAT[:2])
        reply = example.learn.index(False)
        last = len(example.learn) - example.learn[::-1].index(False)
        assert example.prompt + example.response[:last] == text.prompt(CHAT[:4])
        assert example.response[:reply] == text.completion("a color")
        assert example.response[last:] == text.completion("yes")


def test_only_turns_from_first_on_are_learned() -> None:
    text = Text(tokenizer(eos="<|im_end|>", chat_template=CHATML))
    prompt, turns = learned(text, CHAT, first=3)
    assert prompt == spelled(text, text.prompt(CHAT[:4]))
    assert turns == ["yes<|im_end|>"]
    assert learned(text, [*CHAT, {"role": "user", "content": "what?"}], first=3) == (prompt, turns)


def test_an_opening_assistant_message_is_context() -> None:
    text = Text(tokenizer(eos="<|im_end|>", bos=None, chat_template=CHATML))
    prompt, turns = learned(text, [{"role": "assistant", "content": "hello"}, *CHAT[3:]])
    assert prompt.startswith("<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user")
    assert turns == ["yes<|im_end|>"]


def test_an_end_of_turn_that_is_not_eos_is_learned_and_stops() -> None:
    text = Text(tokenizer(chat_template=CHATML))  # a base model: EOS ends documents, <|im_end|> ends turns
    assert learned(text, CHAT)[1] == ["a color<|im_end|>", "yes<|im_end|>"]
    assert text.stop_ids == text.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


def test_a_token_that_is_not_special_does_not_end_a_turn() -> None:
    made = tokenizer(chat_template=CHATML.replace("'<|im_end|>", "'</answer><|im_end|>"))
    made.add_tokens(["</answer>"])
    assert learned(Text(made), CHAT)[1] == ["a color</answer><|im_end|>", "yes</answer><|im_end|>"]


def test_a_template_that_ends_every_rendering_in_eos() -> None:
    text = Text(tokenizer(chat_template=CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"))
    assert learned(text, CHAT)[1] == ["a color<|im_end|>", "yes<|im_end|>"]


def test_a_template_that_does_not_end_turns_gets_eos() -> None:
    unmarked = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    text = Text(tokenizer(chat_template=unmarked + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"))
    assert learned(text, CHAT)[1] == ["a color</s>", "yes</s>"]
    assert text.stop_ids == [text.eos_id]
    spelled_out = spelled(text, text.conversation(CHAT).response)
    assert spelled_out == "a color</s>\nuser: is it?\nassistant: yes</s>"


def test_an_end_of_turn_spelled_in_the_content_ends_it_once() -> None:
    text = Text(tokenizer(eos="<|im_end|>", chat_template=CHATML))
    marked = [*CHAT[:2], {"role": "assistant", "content": "a color<|im_end|>"}]
    assert learned(text, marked) == learned(text, CHAT[:3])


def test_a_template_that_rewrites_replies_teaches_one_turn_at_a_time() -> None:
    mark = "('<think>' if loop.last and m['role'] == 'assistant' else '')"
    thinking = CHATML.replace("m['content']", f"{mark} + m['content']")
    text = Text(tokenizer(eos="<|im_end|>", chat_template=thinking))
    with pytest.raises(ValueError, match=r"rewrites earlier replies.*give every assistant turn a row"):
        text.conversation(CHAT)
    assert learned(text, CHAT, first=3)[1] == ["<think>yes<|im_end|>"]


def test_a_generation_prompt_that_replies_do_not_follow() -> None:
    text = Text(tokenizer(eos="<|im_end|>", chat_template=CHATML.replace("assistant\n", "assistant\n<think>")))
    with pytest.raises(ValueError, match="asks for a reply in other words than it stores one with"):
        text.conversation(CHAT)
    assert spelled(text, text.prompt(CHAT[:2])).endswith("<think>")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "expected at least one message, got an empty list"),
        (["hello"], "message 1: expected an object with role and content, got str"),
        ([CHAT[0], {"role": "user"}], "message 2: expected the keys role and content, got role"),
        ([{}], "message 1: expected the keys role and content, got none"),
        ([{"from": "human", "value": "hi"}], "message 1: expected the keys role and content, got from, value"),
        ([{"role": "user", "content": None}], "message 1: expected content to be text, got null"),
        ([{"role": 3, "content": "hello"}], "message 1: expected role to be text, got int"),
    ],
)
def test_malformed_messages(plain: Text, messages: list, sentence: str) -> None:
    for read in (plain.prompt, plain.conversation):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            read(messages)


def test_conversations_without_a_turn_to_learn(plain: Text) -> None:
    for messages, first in ((CHAT[:2], 0), (CHAT[2:3], 0), (CHAT[:4], 3)):
        with pytest.raises(ValueError, match="expected at least one assistant turn that answers something, got none"):
            plain.conversation(messages, first)


def test_a_prompt_ends_before_the_assistant_speaks(plain: Text) -> None:
    with pytest.raises(ValueError, match="expected a prompt that ends before the assistant speaks"):
        plain.prompt(CHAT)


def test_a_template_may_refuse() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r"the chat template refuses these messages \(no system role\)"):
        Text(tokenizer(chat_template=strict)).prompt(CHAT[:2])


def test_a_tokenizer_needs_eos(tmp_path: Path) -> None:
    sentence = (
        "expected a tokenizer with an end-of-sequence token, got none: set one of its tokens with tokenizer.eos_token"
    )
    with pytest.raises(ValueError, match=sentence):
        Text(tokenizer(eos=None))
    tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: {sentence}"):
        Text.from_pretrained(tmp_path)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "weights")
    (tmp_path / "empty").mkdir()
    tokenizer().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, sentence in (
        ("weights", "found no vocabulary there"),
        ("empty", "found none that loads"),
        ("broken", "found none that loads"),
    ):
        with pytest.raises(ValueError, match=f"^expected a tokenizer in '{tmp_path / name}', {sentence}"):
            Text.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a checkpoint folder, got .*nowhere', which does not exist"):
        Text.from_pretrained(tmp_path / "nowhere")


def test_a_word_outside_the_vocabulary() -> None:
    words = Tokenizer(models.WordLevel({"red": 0, "</s>": 1, ".": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = Text(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"))
    assert text.completion("red red .") == [0, 0, 2, 1]
    assert text.decode([0, 0, 2, 1]) == "red red ."
    with pytest.raises(ValueError, match="the tokenizer cannot spell 'red green'"):
        text.prompt("red green")
