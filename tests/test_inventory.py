"""The inventory of docs/inventory.md: no row is missing, and every place and every test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "inventory.md"
COUNTS = {"P": 22, "F": 15, "R": 19, "O": 25, "K": 8, "D": 6, "G": 7, "T": 18, "N": 15, "M": 8}
ROWS = [f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)]
# What its people know by its words alone.
DOCUMENTATION = {"F14", "R17", "R18", "O25", "D1", "D5", "N10", "N11", "N12", "N15", "M7"}


def rows() -> dict[str, list[str]]:
    """Row -> its cells: what, where it lives, tests. Raises ValueError for a row that stands twice."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        row, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if re.fullmatch(r"[A-Z]\d+", row):
            if row in found:
                raise ValueError(f"{row} stands twice")
            found[row] = cells
    return found


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a file, and as `Class.name` what a class holds."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= set(names(node))
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in names(inner)}
    return frozenset(found)


def names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    imported = [alias.asname or alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
    return [target.id for target in targets if isinstance(target, ast.Name)] + imported


def exists(place: str, below: Path = ROOT) -> bool:
    file, _, name = place.partition("::")
    path = below / file
    return path.is_file() and (not name or name in definitions(path))


def test_no_row_is_missing() -> None:
    assert list(rows()) == ROWS
    for row, cells in rows().items():
        assert len(cells) == 3, row
        assert cells[0], row


@pytest.mark.parametrize("row", ROWS)
def test_every_place_and_every_test_of_a_row_exists(row: str) -> None:
    _, where, proof = rows()[row]
    missing = [place for place in named(where) if not exists(place)]
    missing += [test for test in named(proof) if not exists(test, ROOT / "tests")]
    assert not missing
    assert all(name.rpartition("::")[2].startswith("test_") for name in named(proof))


@pytest.mark.parametrize("row", ROWS)
def test_only_what_is_documentation_has_no_test(row: str) -> None:
    _, where, proof = rows()[row]
    words = re.sub(r"`[^`]+`|[, ]", "", proof)
    assert words == ("documentation" if row in DOCUMENTATION else "")
    assert bool(named(proof)) != (row in DOCUMENTATION)
    assert named(where)


def test_what_is_documentation_has_its_sentences() -> None:
    """A heading in docs/background.md names its rows, and text follows."""
    page = (ROOT / "docs" / "background.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## .+? \(([A-Z0-9, ]+)\)\n\n(.+?)(?=\n## |\Z)", page, re.MULTILINE | re.DOTALL))
    told = {row for rows_told, text in sections.items() if len(text.split()) > 20 for row in rows_told.split(", ")}
    assert told == DOCUMENTATION


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ("engine/ppo.py", True),
        ("engine/ppo.py::train", True),
        ("engine/ppo.py::Config", True),
        ("engine/rollout_options.py::PPO.kl_coef", True),
        ("engine/policy.py::Policy.value_from", True),
        ("engine/ppo.py::trained", False),
        ("engine/rollout_options.py::PPO.kl_coeff", False),
        ("engine/no.py", False),
    ],
)
def test_a_place_that_is_not_there_is_seen(place: str, there: bool) -> None:
    assert exists(place) == there
