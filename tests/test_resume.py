"""A run that is killed at any moment and started again ends as if nothing had happened: same metrics, same weights."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toys
from twinhead.engine import checkpoint, cli
from twinhead.engine.metrics import JsonLines
from twinhead.engine.policy import Policy
from twinhead.engine.run import Run

# A server that has imported everything and forks a child for each run that is to be killed.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["twinhead.engine.cli"])

SCHEDULE = {"schedule": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.01}
SAVING = {"save_every": 3, "keep_checkpoints": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 10, **SCHEDULE},
    "sft": {"steps": 10, **SCHEDULE},
    "reward": {"demonstrations": "{demonstrations}", **SCHEDULE},
    "reward with everything": {"loss": "listwise", "centring_coef": 0.1, "eval_data": "{conflict}", **SCHEDULE},
    "ppo": {"steps": 10, "reward_model": "{reward_model}", "reward_functions": (), "value_init": "reward_model"},
    "ppo with an ensemble": {
        "steps": 10, "reward_models": ("{reward_model}", "{small_reward_model}"), "ensemble": "mean_std",
        "ensemble_coef": 0.5, "reward_functions": (),
    },
    "ppo with everything": {
        "steps": 10, "reward_model": "{reward_model}", "reward_functions": ("{rewards}:goodness", "{rewards}:patience"),
        "reward_weights": (0.5, 1.0, 0.5), "ptx_data": "{documents}", "ptx_batch_size": 4, "ptx_max_length": 8,
        "kl_target_nats": 0.1, "kl_horizon": 50, "kl_stop": 0.002, "old_logprobs": "recompute",
        "entropy_coef": 0.01, "learning_rate": 5e-3, "normalise_scores": True, "reference": "{small_model}",
    },
    "ppo with a branch": {
        "steps": 10, "critic": "branch", "branch_layers": 1, "critic_warmup": 4, "kl_kind": "full", "kl_in": "loss",
        "ema_decay": 0.9, "process_function": "{rewards}:progress", "eval_every": 2, "eval_prompts": "{heldout}",
        "best_by": "eval_ema/score", "learning_rate": 5e-3,
    },
    "ppo with a separate critic": {
        "steps": 10, "critic": "separate", "value_init": "reward_model", "reward_model": "{small_reward_model}",
        "reward_functions": (), "critic_learning_rate": 1e-3, "critic_warmup": 4, "kl_kind": "k3", "kl_in": "loss",
        "bootstrap_truncated": True, "learning_rate": 5e-3, **SCHEDULE,
    },
    "grpo": {"steps": 10, **SCHEDULE},
    "grpo with everything": {
        "steps": 10, "reward_model": "{reward_model}", "reward_functions": ("{rewards}:goodness", "{rewards}:patience"),
        "reward_weights": (0.5, 1.0, 0.5), "process_function": "{rewards}:progress", "loss": "gspo", "beta": 0.05,
        "resample": 2, "missing_eos_penalty": 0.5, "overlong_buffer": 2, "old_logprobs": "recompute",
        "importance_cap": 2.0, "learning_rate": 5e-3,
    },
    "dpo": {"reference": "{model}", **SCHEDULE},
    "dpo with a table": {"precompute_reference": True, "loss": "robust", "label_smoothing": 0.1, **SCHEDULE},
    "dpo of answers": {
        "data": "{unpaired}", "eval_data": "{labelled}", "loss": "kto", "desirable_weight": 1.5, **SCHEDULE,
    },
}  # fmt: skip
PATIENCE = """

def patience(prompts, completions, **columns):
    return [float("nan") if c.startswith("poor one") else 0.0 for c in completions]
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the children."""
    with toys.one_thread():
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths = toys.box(tmp_path_factory.mktemp("box"))
    with Path(paths["rewards"]).open("a") as file:
        file.write(PATIENCE)
    return paths


def command(case: str, box: dict[str, str], **changes: Any) -> list[str]:
    """Ten steps of a stage under runs/, as one types it."""
    stage = case.split()[0]
    chosen = toys.options(stage, box) | OPTIONS[case] | SAVING | {"output_dir": "run"} | changes
    return toys.command(stage, {name: toys.filled(value, box) for name, value in chosen.items() if value != ()})


@dataclass
class Straight:
    """Runs that nobody interrupts, one per case, made when they are first asked for."""

    root: Path
    box: dict[str, str]
    made: dict[str, Path] = field(default_factory=dict)

    def __getitem__(self, case: str) -> Path:
        if case not in self.made:
            folder = self.root / case.replace(" ", "_")
            folder.mkdir()
            run_in(folder, command(case, self.box))
            self.made[case] = folder
        return self.made[case]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, box: dict[str, str]) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"), box)


def run_in(folder: Path, args: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(args) == 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, due: Callable[..., bool]) -> None:
    """Die instead of the first call of owner.name whose arguments are due."""
    original = getattr(owner, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if due(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def in_a_line(due: Callable[[dict[str, Any]], bool]) -> None:
    """Die when half of a metrics line has reached the disk."""
    write = JsonLines.write

    def deadly(self: JsonLines, record: dict[str, Any]) -> None:
        write(self, record)
        if self.path.name == "metrics.jsonl" and due(record):
            lines = self.path.read_bytes().splitlines(keepends=True)
            self.path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
            die()

    JsonLines.write = deadly


def logged() -> int:
    """Steps in the log of the run in this folder."""
    return len(toys.metrics("run"))


# Every moment is after step 6 was saved (or before anything was), in runs that save after steps 3, 6, 9 and 10.
MOMENTS: dict[str, Callable[[], None]] = {
    "in the first line": lambda: in_a_line(lambda record: "config" in record),
    "in an update": lambda: before(torch.optim.AdamW, "step", lambda *_, **__: logged() == 7),
    "in a line": lambda: in_a_line(lambda record: record.get("step") == 8),
    "after a line": lambda: before(Run, "save", lambda self, step: step == 9),
    "in a checkpoint": lambda: before(checkpoint, "save_state", lambda folder, *_: "checkpoint-9" in folder.name),
    "before its state": lambda: before(Path, "write_text", lambda self, *_, **__: self.name == checkpoint.STATE),
    "before its renaming": lambda: before(Path, "rename", lambda self, _: self.name == ".checkpoint-9.tmp"),
    "in the removal of an old one": lambda: before(
        shutil, "rmtree", lambda path, **_: path.name == ".checkpoint-3.old"
    ),
    "in the final checkpoint": lambda: before(os, "replace", lambda _, to: Path(to).name == "model.safetensors"),
    "before its config": lambda: before(os, "replace", lambda _, to: Path(to) == Path("run/config.json")),
    "after everything": lambda: before(Path, "rmdir", lambda self: self.name == ".export"),
}


def doomed(folder: Path, args: list[str], moment: str) -> None:
    """What a child does."""
    os.chdir(folder)
    torch.set_num_threads(1)
    MOMENTS[moment]()
    cli.main(args)


def kill(folder: Path, args: list[str], moment: str) -> None:
    """Run a command in a process of its own, which dies at that moment."""
    child = FORKS.Process(target=doomed, args=(folder, args, moment))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL, f"expected a death {moment!r}, got exit code {child.exitcode}"


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same files with the same bytes, apart from how long things took."""
    found, wanted = (toys.files(f / "run") for f in (folder, expected))
    assert found.pop("timings.jsonl").count(b"\n") == wanted.pop("timings.jsonl").count(b"\n")
    assert found["metrics.jsonl"].decode().splitlines() == wanted["metrics.jsonl"].decode().splitlines()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("moment", ["in an update", "in a checkpoint"])
@pytest.mark.parametrize("case", OPTIONS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    case: str, moment: str, box: dict[str, str], straight: Straight, tmp_path: Path
) -> None:
    kill(tmp_path, command(case, box), moment)
    assert (tmp_path / "run/checkpoint-6/state.json").exists()
    assert not (tmp_path / "run/config.json").exists()
    run_in(tmp_path, command(case, box))
    assert_same_run(tmp_path, straight[case])


@pytest.mark.parametrize("moment", MOMENTS)
def test_any_moment_is_survived(moment: str, box: dict[str, str], straight: Straight, tmp_path: Path) -> None:
    kill(tmp_path, command("sft", box), moment)
    run_in(tmp_path, command("sft", box))
    assert_same_run(tmp_path, straight["sft"])


def test_a_run_that_is_killed_again_and_again(box: dict[str, str], straight: Straight, tmp_path: Path) -> None:
    for moment in MOMENTS:
        kill(tmp_path, command("ppo", box), moment)
    run_in(tmp_path, command("ppo", box))
    assert_same_run(tmp_path, straight["ppo"])


def test_the_command_survives_a_kill_from_outside(box: dict[str, str], tmp_path: Path) -> None:
    args = command("sft", box, steps=100, save_every=5)
    words = [sys.executable, "-c", "from twinhead.engine.cli import main; main()", *args]
    process = subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/checkpoint-10").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    expected = tmp_path / "straight"
    expected.mkdir()
    for folder in (tmp_path, expected):
        run_in(folder, args)
    assert_same_run(tmp_path, expected)


@pytest.fixture
def copy(straight: Straight, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(straight["sft"], tmp_path / "copy"))


def test_a_finished_run_is_left_alone(
    box: dict[str, str], copy: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "from_pretrained", lambda *_: pytest.fail("expected nothing to be loaded"))
    run_in(copy, command("sft", box))
    assert toys.files(copy) == toys.files(straight["sft"])


def test_a_finished_run_keeps_its_log_when_its_checkpoints_are_thrown_away(box: dict[str, str], copy: Path) -> None:
    for folder in (copy / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = toys.files(copy)
    run_in(copy, command("sft", box))
    assert toys.files(copy) == before


@pytest.mark.parametrize(
    ("stage", "changes", "difference"),
    [
        ("sft", {"learning_rate": 0.5}, "learning_rate = 0.01, but 0.5 was asked for"),
        ("sft", {"seed": 7}, "seed = 0, but 7 was asked for"),
        ("sft", {"data": "{heldout}"}, "data = "),
        ("pretrain", {}, "stage = 'sft', but 'pretrain' was asked for"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "unfinished", "without a checkpoint"])
def test_other_options_in_the_same_folder_are_refused(
    state: str, stage: str, changes: dict[str, Any], difference: str,
    box: dict[str, str], copy: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unmake(copy / "run", state)
    before = toys.files(copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        assert cli.main(command(stage, box, **changes)) == 1
    sentence = capsys.readouterr().err
    assert f"twinhead {stage}: output_dir: run holds a run with {difference}" in sentence
    assert "choose another folder, or the same options to resume it" in sentence
    assert toys.files(copy) == before


def unmake(run: Path, state: str) -> None:
    if state != "finished":
        (run / "config.json").unlink()
    if state == "without a checkpoint":
        for folder in run.glob("checkpoint-*"):
            shutil.rmtree(folder)


def test_free_options_may_change_on_the_way(box: dict[str, str], straight: Straight, tmp_path: Path) -> None:
    kill(tmp_path, command("sft", box), "in an update")
    (tmp_path / "run").rename(tmp_path / "moved")
    free = {"save_every": 1, "keep_checkpoints": 1, "tensorboard": True, "output_dir": "moved"}
    run_in(tmp_path, command("sft", box, **free))
    moved, expected = tmp_path / "moved", straight["sft"] / "run"
    assert toys.metrics(moved) == toys.metrics(expected)
    assert (moved / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert [path.name for path in moved.glob("checkpoint-*")] == ["checkpoint-10"]
    assert list((moved / "tensorboard").iterdir())


def test_a_half_written_checkpoint_is_none(box: dict[str, str], straight: Straight, tmp_path: Path) -> None:
    kill(tmp_path, command("sft", box), "in an update")
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-8")
    (run / "checkpoint-8" / checkpoint.STATE).unlink()
    shutil.copytree(run / "checkpoint-6", run / ".checkpoint-7.tmp")
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-latest")
    run_in(tmp_path, command("sft", box))
    assert not (run / ".checkpoint-7.tmp").exists()
    shutil.rmtree(run / "checkpoint-8")
    shutil.rmtree(run / "checkpoint-latest")
    assert_same_run(tmp_path, straight["sft"])


def test_a_run_that_failed_before_its_first_step_may_be_corrected(
    box: dict[str, str], straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command("sft", box, data="mistyped.jsonl")) == 1
    run_in(tmp_path, command("sft", box))
    assert_same_run(tmp_path, straight["sft"])


def test_a_folder_with_a_model_but_no_run_is_refused(
    box: dict[str, str], copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    (copy / "run/metrics.jsonl").unlink()
    before = toys.files(copy)
    for state in ("finished", "unfinished"):
        unmake(copy / "run", state)
        assert cli.main(command("sft", box)) == 1
        assert "output_dir: run holds checkpoints but no metrics.jsonl" in capsys.readouterr().err
    assert toys.files(copy) == {name: data for name, data in before.items() if name != "run/config.json"}
