"""Runs the Triton cases of a test module on the CPU: one child process with TRITON_INTERPRET=1, a result for each case.

A test that asks for the fixture `backend` runs once for every backend that its operation declares. In test_gae.py:

    def test_nothing_follows_the_last_action(backend: str) -> None:     # [torch], [cpu], [triton]
        gae(rewards, values)                                            # TWINHEAD_KERNELS names the backend meanwhile
        gae(rewards, values, backend=backend)                           # the same

    pytestmark = pytest.mark.usefixtures("backend")                     # or: every test of this module

    @pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)     # or: these and no others

Triton decides when a kernel is defined whether it will be interpreted, so the cases called [triton] run in a child: the
first of a module that is reached starts it with all of the module's cases that this run selected, and each then reports
its own outcome. Inside the child, or with TRITON_INTERPRET=1 in the environment, they simply run. A case that wants a
small shape for the interpreter's sake asks `backend == "triton"`.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinhead.kernels._dispatch import Backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED = pytest.StashKey[Path]()  # of a case: a folder that all processes of this run see
OUTCOMES = pytest.StashKey[dict[str, dict[str, list[str]]]]()  # of the session: by module, by case


def backends(module: str) -> list[str]:
    """The backends that the operation of a test module declares: "...test_gae" -> what kernels/gae/__init__.py says."""
    operation = importlib.import_module(f"twinhead.kernels.{module.rpartition('test_')[2]}")
    declared = [value.modules for value in vars(operation).values() if isinstance(value, Backends)]
    return sorted(set().union(*declared), key=["torch", "cpu", "triton"].index)


def is_delegated(case: pytest.Function) -> bool:
    """Whether this case belongs to the child process and this is not the child."""
    return not INTERPRETED and hasattr(case, "callspec") and case.callspec.params.get("backend") == "triton"


def report(case: pytest.Function) -> None:
    """Ends as the case ended in the child: silently, as a skip, or as a failure with the child's own words."""
    known = case.session.stash.setdefault(OUTCOMES, {})
    if case.path.name not in known:
        peers = [other for other in case.session.items if other.path == case.path and is_delegated(other)]
        place = case.stash[SHARED] / case.path.stem
        known[case.path.name] = _run_once(case.config.rootpath, place, [other.nodeid for other in peers])
    outcome, words = known[case.path.name].get(case.nodeid, ["lost", known[case.path.name]["output"][1]])
    if outcome == "skipped":
        pytest.skip(words)
    if outcome != "passed":
        pytest.fail(f"{outcome} under TRITON_INTERPRET=1\n{words}", pytrace=False)


def _run_once(root: Path, place: Path, cases: list[str]) -> dict[str, list[str]]:
    """What became of each case, by id. The workers of pytest-xdist share one child: whoever comes first starts it."""
    place.mkdir(exist_ok=True)
    outcomes, chosen = place / "outcomes.json", place / "cases.txt"
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcomes.exists():
            chosen.write_text("\n".join(cases))
            child = subprocess.run(
                [sys.executable, "-m", "tests.kernels.interpreter", chosen, outcomes],
                cwd=root,
                env={k: v for k, v in os.environ.items() if "PYTEST" not in k} | {"TRITON_INTERPRET": "1"},
                capture_output=True,
                text=True,
            )
            found = json.loads(outcomes.read_text()) if outcomes.exists() else {}
            found["output"] = ["", f"exit code {child.returncode}\n{child.stdout[-4000:]}\n{child.stderr[-4000:]}"]
            outcomes.write_text(json.dumps(found))
    return json.loads(outcomes.read_text())


class Recorder:
    """The plugin of the child: writes down how each case ended, at once, in case the next one ends the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the call's outcome, or that of a set-up or tear-down that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            words = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.outcomes[report.nodeid] = [report.outcome, words.removeprefix("Skipped: ")]
            self.path.write_text(json.dumps(self.outcomes))


def main(chosen: str, outcomes: str) -> None:
    """The child: runs the cases that the file `chosen` lists and writes their outcomes to the file `outcomes`."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    pytest.main([f"@{chosen}", *options], [Recorder(Path(outcomes))])


if __name__ == "__main__":
    main(*sys.argv[1:])
