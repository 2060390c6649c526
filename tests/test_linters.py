"""ruff and mypy have no complaint, and would have one: each rule that the house relies on is planted."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FUTURE = "from __future__ import annotations\n"
REFUSED_BY_RUFF = {
    "TID251": FUTURE + "from kernels import gae\n",
    "TID252": FUTURE + "from .batch import pack\n",
    "T201": 'print("hello")\n',
    "E722": "try:\n    f()\nexcept:\n    pass\n",
    "BLE001": "try:\n    f()\nexcept Exception:\n    pass\n",
    "FIX002": "x = 1  # TO" + "DO later\n",
    "FIX003": "x = 1  # XX" + "X later\n",
    "PGH003": FUTURE + "import os  # type: " + "ignore\n",
    "PGH004": FUTURE + "import os  # no" + "qa\n",
    "ERA001": "# x = f(1)\n",
    "I002": "import os\n\nx = os.name\n",
}


def run_tool(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    if find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (the dev extra has it)")
    return subprocess.run(
        [sys.executable, "-P", "-m", *command], cwd=ROOT, input=stdin, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_has_no_complaint(command: str) -> None:
    result = run_tool("ruff", *command.split(), "--output-format", "concise")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("code", REFUSED_BY_RUFF)
def test_ruff_sees_a_planted_violation(code: str) -> None:
    planted = ["--stdin-filename", "engine/planted.py", "--output-format", "concise", "--no-cache", "-"]
    assert code in run_tool("ruff", "check", *planted, stdin=REFUSED_BY_RUFF[code]).stdout


def test_mypy_has_no_complaint_and_sees_the_mapped_packages(tmp_path: Path) -> None:
    result = run_tool("mypy")
    assert result.returncode == 0, result.stdout + result.stderr
    planted = tmp_path / "planted.py"
    planted.write_text("from twinhead.engine.batch import pack\n\npack('not a list of examples')\n")
    result = run_tool("mypy", str(planted))
    assert "[arg-type]" in result.stdout, result.stdout + result.stderr
