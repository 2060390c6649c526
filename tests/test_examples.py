"""The examples run as they are written, and what they claim is so: the same losses with our kernels as without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import TRL

ROOT = Path(__file__).parent.parent
# the example, once more with its function off by a little: what the comparison must notice
SPOILT = "import trl_grpo as e; e.linear_logprob = lambda *a, f=e.linear_logprob, **k: [x * 1.001 for x in f(*a, **k)]"


def output(*command: str, path: tuple[Path, ...] = ()) -> str:
    """What a Python command prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    child = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout


def test_one_step_of_an_own_loop_is_the_same_before_and_after() -> None:
    printed = output("examples/own_loop.py")
    before, after = (float(x) for x in re.findall(r"loss (\S+)", printed))
    assert before == pytest.approx(after, abs=2e-6)
    assert float(re.findall(r"at most (\S+)", printed)[0]) < 1e-5


@pytest.mark.skipif(not TRL.folder.is_dir(), reason=f"needs {TRL.label}: python -m benchmarks peers")
def test_the_grpo_trainer_of_trl_gets_the_same_losses() -> None:
    """Two steps, the second off-policy; loss, entropy, divergence from the reference, norm of the gradient."""
    path = (TRL.folder / "package", TRL.folder / "needs", ROOT / "examples")
    theirs, ours, spoilt = (
        re.findall(r"(loss|entropy|kl|grad_norm) (\S+)", output(*command, path=path))
        for command in (
            ["examples/trl_grpo.py", "--own"],
            ["examples/trl_grpo.py"],
            ["-c", f"{SPOILT}; e.main()"],
        )
    )
    assert len(theirs) == len(spoilt) == 8
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [float(x) for _, x in ours] == pytest.approx([float(x) for _, x in theirs], rel=1e-5, abs=2e-6)
    assert [float(x) for _, x in spoilt] != pytest.approx([float(x) for _, x in theirs], rel=1e-5, abs=2e-6)
