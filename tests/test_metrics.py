"""Metrics add up, and their file holds whole lines of strict JSON whatever happened to the last one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from twinhead.engine.metrics import JsonLines, Sums

# -- Sums --------------------------------------------------------------------------------------------------------------


def test_sums_are_divided_by_the_count_and_maxima_are_not() -> None:
    sums = Sums()
    for loss, ratio, gap in ((1.0, 1.5, 0.1), (2.0, 1.25, 0.3), (4.5, 0.5, 0.2)):
        sums.add({"loss": loss, "ratio_max": torch.tensor(ratio), "first_gap": gap})
    assert sums.take(3, prefix="policy/") == {
        "policy/loss": pytest.approx(2.5),
        "policy/ratio_max": 1.5,
        "policy/first_gap": pytest.approx(0.3),
    }


def test_names_may_come_and_stay_away() -> None:
    sums = Sums()
    sums.add({"a": 1.0})
    sums.add({"b": 2.0, "b_max": -5.0})
    sums.add({"a": 3.0})
    assert sums.take() == {"a": 4.0, "b": 2.0, "b_max": -5.0}


def test_nothing_sums_to_nothing() -> None:
    assert Sums().take(3) == {}


def test_many_small_shares_lose_nothing() -> None:
    sums = Sums()
    for _ in range(10_000):
        sums.add({"x": torch.tensor(0.1)})
    assert sums.take(10_000)["x"] == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


def test_sums_hold_no_graph() -> None:
    sums, weight = Sums(), torch.tensor(2.0, requires_grad=True)
    for _ in range(2):
        sums.add({"loss": weight * 3, "loss_max": weight})
    assert not any(total.requires_grad for total in sums._totals.values())
    assert sums.take() == {"loss": 12.0, "loss_max": 2.0}


def test_nan_stays_visible() -> None:
    sums = Sums()
    sums.add({"a": 1.0, "a_max": 1.0})
    sums.add({"a": math.nan, "a_max": math.nan})
    sums.add({"a": 1.0, "a_max": 2.0})
    found = sums.take()
    assert math.isnan(found["a"])
    assert math.isnan(found["a_max"])


# -- JsonLines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path: Path) -> JsonLines:
    return JsonLines(tmp_path / "metrics.jsonl")


def test_records_come_back_in_order(lines: JsonLines) -> None:
    assert list(lines) == []
    lines.write({"stage": "sft", "config": {"data": [1, "é"]}})
    lines.write({"step": 1, "loss": 0.1 + 0.2, "n": 3, "ok": True, "none": None})
    lines.write({"step": 2, "loss": torch.tensor(0.5), "count": torch.tensor(7)})
    assert list(lines) == [
        {"stage": "sft", "config": {"data": [1, "é"]}},
        {"step": 1, "loss": 0.1 + 0.2, "n": 3, "ok": True, "none": None},
        {"step": 2, "loss": 0.5, "count": 7},
    ]
    assert lines.path.read_text(encoding="utf-8").count("\n") == 3


def test_what_json_cannot_say_becomes_null(lines: JsonLines) -> None:
    lines.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan), "e": 0.0})
    line = lines.path.read_text()
    assert json.loads(line, parse_constant=lambda word: pytest.fail(f"expected strict JSON, got {word}"))
    assert list(lines) == [{"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 0.0}]


def test_every_line_is_on_disk_at_once(lines: JsonLines) -> None:
    for step in range(3):
        lines.write({"step": step})
        assert lines.path.read_text().count("\n") == step + 1


@pytest.mark.parametrize("rest", [b'{"step": 3, "lo', b'{"step": 3}', b'{"name": "\xc3', b"\x00\x00\x00", b"{"])
def test_a_line_without_its_end_is_none(rest: bytes, lines: JsonLines) -> None:
    for step in (1, 2):
        lines.write({"step": step})
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole + rest)
    assert [record["step"] for record in lines] == [1, 2]
    lines.keep_until(2)
    assert lines.path.read_bytes() == whole
    lines.write({"step": 3})
    assert [record["step"] for record in lines] == [1, 2, 3]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n", "\n"])
def test_a_text_may_hold_any_sign(mark: str, lines: JsonLines) -> None:
    lines.write({"config": {"data": [f"one{mark}two"]}})
    lines.write({"step": 1})
    assert [record.get("config") for record in lines] == [{"data": [f"one{mark}two"]}, None]


def test_keep_until_forgets_later_steps_and_only_those(lines: JsonLines) -> None:
    lines.write({"stage": "ppo"})
    for step in range(1, 6):
        lines.write({"step": step, "loss": 1 / step, "nan": math.nan})
    before = lines.path.read_bytes().splitlines(keepends=True)
    lines.keep_until(3)
    assert lines.path.read_bytes() == b"".join(before[:4])
    lines.keep_until(0)
    assert list(lines) == [{"stage": "ppo"}]
    lines.keep_until(-1)
    assert list(lines) == []
    assert [path.name for path in lines.path.parent.iterdir()] == ["metrics.jsonl"]


def test_keep_until_replaces_the_file_as_a_whole(lines: JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        lines.write({"step": step})
    before = lines.path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lines.keep_until(1)
    assert lines.path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "missing" / "metrics.jsonl")
    with pytest.raises(OSError, match=r"^could not write .*missing/metrics.jsonl: .*No such file"):
        lines.write({"step": 1})
