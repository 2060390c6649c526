"""Task C: its digits, its rule, and that practice against the rule helps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import sorting
from benchmarks.sorting import SEP, Length, Sorting, right
from tests import toys


def test_the_tokenizer_has_one_token_per_digit() -> None:
    tokenizer = sorting.tokenizer()
    assert len(tokenizer) == 14
    assert tokenizer("7 0 <sep>")["input_ids"] == [11, 4, 3]
    assert tokenizer.decode([4, 11, 2], skip_special_tokens=True) == "0 7"
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("10")


@pytest.mark.parametrize(
    ("completion", "finished", "score"),
    [("1 2 2 9", True, 1.0), ("1 2 2 9", False, 0.0), ("1 2 9", True, 0.0), ("1 2 2 9 9", True, 0.0),
     ("2 1 2 9", True, 0.0), ("", True, 0.0)],
)  # fmt: skip
def test_the_rule_sees_what_is_right(completion: str, finished: bool, score: float) -> None:
    assert right([f"2 9 1 2 {SEP}"], [completion], finished=[finished]) == [score]


def test_demonstrations_are_as_wrong_as_they_say() -> None:
    rows = sorting.demonstrations(6000, digits=5, seed=0)
    kinds: Counter[str] = Counter()
    for row in rows:
        answer, expected = row["completion"].split(), sorting.in_order(row["prompt"])
        assert len(expected) == 5
        if len(answer) == 4:
            assert sum((Counter(answer) - Counter(expected)).values()) == 0
        else:
            assert sorted(answer) == expected
        kinds["short" if len(answer) == 4 else "right" if answer == expected else "swapped"] += 1
    # 0.4 say it right, and neighbours that are equal are swapped for nothing: (K - 1) of 4 pairs, about 3 in 10
    assert kinds["short"] / 6000 == pytest.approx(0.3, abs=0.02)
    assert 0.4 < kinds["right"] / 6000 < 0.52
    assert rows == sorting.demonstrations(6000, digits=5, seed=0) != sorting.demonstrations(6000, digits=5, seed=1)


def test_practice_against_the_rule_helps(tmp_path: Path) -> None:
    """Three digits: the policy imitates for a few seconds, and practises for as long."""
    with toys.one_thread():
        task = Sorting(tmp_path, Length(digits=3, sft_steps=80, grpo_steps=14), seed=0)
        task.sft()
        run = task.grpo(eval_every=14)
    scores = [line["score/right"] for line in toys.metrics(run.dir)]
    before, after = sum(scores[:2]) / 2, sum(scores[-2:]) / 2
    assert after > before + 0.15
    assert toys.metrics(run.dir)[-1]["eval/sampled"] == pytest.approx(after, abs=0.12)


def test_the_benchmark_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sorting, "LENGTHS", {"tiny": Length(digits=3, sft_steps=2, grpo_steps=10)})
    monkeypatch.setattr(sorting, "CONTEST_PROMPTS", 32)
    with toys.one_thread():
        sorting.main([4, 5], tmp_path / "runs", tmp_path / "results")
        sorting.main([4, 5], tmp_path / "runs", tmp_path / "results")  # what is finished is not run again
    found = json.loads((tmp_path / "results" / "quality_sorting.json").read_text())
    assert found["task"] == "C, sorting"
    assert list(found["tiny"]) == ["4", "5"]
    for run in found["tiny"].values():
        assert [point["step"] for point in run["curve"]] == [10]
        assert 0 <= run["sft"]["sampled"] <= 1
    printed = capsys.readouterr().out
    assert printed.count("tiny") == 4
    assert "Task C: share of right answers, nats per answer" in printed
