"""Task A: its language, its tokenizer and its judge."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks import reviews
from benchmarks.reviews import COMPLETION_TOKENS, NEGATIVE, NEUTRAL, POSITIVE, PROMPT_TOKENS, TOPICS, gold, judge


@pytest.fixture(scope="module")
def demonstrations() -> list[dict[str, str]]:
    return reviews.demonstrations(4000, seed=0)


def test_the_tokenizer_has_one_token_per_word(demonstrations: list[dict[str, str]], tmp_path: Path) -> None:
    tokenizer = reviews.tokenizer()
    assert len(tokenizer) == len(set(reviews.VOCABULARY)) == 53
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for row in demonstrations[:200]:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        assert len([1, *prompt]) == PROMPT_TOKENS
        assert prompt[-1] == 3
        assert len([*completion, 2]) <= COMPLETION_TOKENS
        assert tokenizer.decode([*completion, 2], skip_special_tokens=True) == row["completion"]
    tokenizer.save_pretrained(tmp_path)
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert read.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("excellent")


def test_demonstrations_follow_the_grammar_at_its_rates(demonstrations: list[dict[str, str]]) -> None:
    topics = [row["prompt"].removesuffix(" <sep>") for row in demonstrations]
    texts = [row["completion"].split() for row in demonstrations]
    assert set(topics) == set(TOPICS)
    assert max(map(len, texts)) == COMPLETION_TOKENS - 1  # three long sentences are cut
    assert all(reviews.grammatical(text) == 1 for text in texts if len(text) < COMPLETION_TOKENS - 1)
    kinds = [sum(word in kind for text in texts for word in text) for kind in (POSITIVE, NEGATIVE, NEUTRAL)]
    assert all(abs(count / sum(kinds) - 1 / 3) < 0.02 for count in kinds)
    subjects = [(word == topic) for topic, text in zip(topics, texts, strict=True) for word in text if word in TOPICS]
    assert abs(sum(subjects) / len(subjects) - 0.82) < 0.02  # 0.8 on purpose, a tenth of the others by chance
    score = sum(judge([row["prompt"] for row in demonstrations], [" ".join(t) for t in texts], finished=[True] * 4000))
    assert 0.0 < score / 4000 < 0.35  # 0.19: a policy that imitates has four points to gain


def test_a_seed_is_a_data_set() -> None:
    for rows in (reviews.demonstrations, reviews.prompts):
        assert rows(50, seed=1) == rows(50, seed=1) != rows(50, seed=2)
    assert {row["prompt"] for row in reviews.prompts(500, seed=0)} == {f"{topic} <sep>" for topic in TOPICS}


@pytest.mark.parametrize(
    ("text", "finished", "score", "term"),
    [
        ("the room was clean and warm . the room is quiet and safe .", True, 4.5, "the best there is"),
        ("the room was clean and warm . the room is quiet and safe and lovely .", True, 4.5, "praise saturates"),
        ("the room was clean and warm . the room is quiet and safe .", False, 4.0, "cut off"),
        ("the room is clean .", True, 1.5, "one positive word"),
        ("the room is clean and clean .", True, 0.5, "praise repeated"),
        ("the room is dirty and dirty .", True, -1.5, "every negative word counts"),
        ("the room is plain .", True, 0.5, "neutral words are free"),
        ("the pool is clean .", True, 0.5, "off topic"),
        ("the room is clean . the pool is plain .", True, 1.0, "one topic besides"),
        ("the room is clean . room clean .", True, 1.5 - 1 - 1, "half of the sentences are no grammar"),
        ("clean warm quiet safe", True, 4 - 2, "praise without grammar or topic"),
        ("the room is .", True, 0.5, "the last period counts as a word"),
        ("the room is . the room is plain .", True, 0.5 - 1, "and only the last"),
        (". .", True, -2.0, "no sentence"),
        ("", False, -2.5, "nothing"),
    ],
)
def test_each_term_of_the_judge(text: str, finished: bool, score: float, term: str) -> None:
    assert gold("room", text, finished) == pytest.approx(score), term
    assert judge(["room <sep>"], [text], finished=[finished], label=["ignored"]) == pytest.approx([score])


def test_the_judge_refuses_prompts_that_are_none() -> None:
    for prompt in ("room", "castle <sep>", "<sep>"):
        with pytest.raises(ValueError, match="expected a prompt of one topic and <sep>"):
            judge([prompt], ["the room is clean ."], finished=[True])


def test_write_is_json_lines(tmp_path: Path) -> None:
    rows = reviews.demonstrations(random.Random(0).randrange(2, 9), seed=3)
    reviews.write(tmp_path / "demonstrations.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").read_text().splitlines()] == rows
