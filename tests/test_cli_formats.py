"""Every command of the command line on one fixture of each format that it accepts: tiny models, one step each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests import toys
from tests.test_formats import FIXTURES, PROMPTS, tokenizer
from twinhead.engine import cli, formats
from twinhead.engine.text import Text

README = Path(__file__).parent.parent / "README.md"
DEMONSTRATIONS = ("alpaca", "dolly", "flan", "sharegpt", "oasst", "ultrafeedback", "ultrafeedback_binarized", "trl")
COMPARISONS = ("oasst", "hh_rlhf", "ultrafeedback", "ultrafeedback_binarized", "shp", "ranked", "trl_pairs")
ANSWERS = ("kto", "hh_rlhf", "shp", "trl_pairs")  # UltraFeedback's fixture decides one prompt: too few for KTO
ASKED = ("prompts", "alpaca", "dolly", "flan", "sharegpt", "oasst", "hh_rlhf", "ultrafeedback",
         "ultrafeedback_binarized", "shp", "kto", "ranked")  # fmt: skip
# What a command does once, and with which of its options it reads a fixture.
STEP = ["--steps", "1"]
ROLLOUT = [*STEP, "--max_new_tokens", "2", "--reward_functions", "batch_diversity"]
PPO = [*ROLLOUT, "--rollouts_per_step", "2", "--minibatches", "1", "--epochs", "1"]
TRAINED = {
    "sft": (["sft", *STEP, "--data"], DEMONSTRATIONS),
    "pretrain": (["pretrain", *STEP, "--data"], ("text",)),
    "reward": (["reward", "--data"], COMPARISONS),
    "dpo": (["dpo", "--data"], COMPARISONS),
    "kto": (["dpo", "--loss", "kto", "--data"], ANSWERS),
    "ppo": (["ppo", *PPO, "--prompts"], ASKED),
    "ppo-ptx": (["ppo", *PPO, "--prompts", str(FIXTURES / "prompts.jsonl"), "--ptx_data"], ("text",)),
    "grpo": (["grpo", *ROLLOUT, "--prompts_per_step", "1", "--group_size", "2", "--prompts"], ASKED),
}
STAGES = {"sft": DEMONSTRATIONS, "reward": COMPARISONS, "ppo": ASKED}  # as the table in the README has them
NATIVE = {"trl", "trl_pairs", "ranked", "prompts", "kto", "text"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with toys.one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama over bytes, which writes conversations with [USER] and [ASSISTANT]."""
    folder = tmp_path_factory.mktemp("model") / "bytes"
    made = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"vocab_size": len(made), "max_position_embeddings": 512, "pad_token_id": 1}
        LlamaForCausalLM(toys.shape(**size)).save_pretrained(folder)
    Text(made, "roles").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("judge") / "run"
    assert cli.main(["reward", "--model", model, "--data", fixture("shp"), "--output_dir", str(folder)]) == 0
    return str(folder)


def fixture(name: str) -> str:
    return str(FIXTURES / f"{name}.jsonl")


def measured(printed: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"│ (\S+)\s+│ (\S+)\s+│", printed)}


CASES = [(command, name) for command, (_, names) in TRAINED.items() for name in names]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_stage_learns_from_its_formats(
    command: str, name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = TRAINED[command]
    folder = tmp_path / "run"
    assert cli.main([*words, fixture(name), "--model", model, "--device", "cpu", "--output_dir", str(folder)]) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(words[0])
    assert (f" of {name}" in said) == (name not in NATIVE), said
    steps = toys.metrics(folder)
    assert len(steps) == 1
    assert all(math.isfinite(value) for value in steps[0].values() if value is not None)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ASKED)
def test_generate_answers_every_format(name: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    words = ["generate", "--model", model, "--prompts", fixture(name), "--max_new_tokens", "1", "--output", str(out)]
    assert cli.main(words) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    num_rows = len(Path(fixture(name)).read_text().splitlines())
    assert len(answers) == (len(PROMPTS[name]) if name in PROMPTS else num_rows)


@pytest.mark.parametrize("name", [*DEMONSTRATIONS, "text"])
def test_evaluate_measures_a_policy_on_every_format(name: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = "text" if name == "text" else "data"
    assert cli.main(["evaluate", "--model", model, f"--{option}", fixture(name)]) == 0
    assert measured(capsys.readouterr().out)[f"{option}/ppl"] > 1


@pytest.mark.parametrize("name", COMPARISONS)
def test_evaluate_measures_a_reward_model_on_every_format(
    name: str, judge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--reward_model", judge, "--comparisons", fixture(name)]) == 0
    assert 0 <= measured(capsys.readouterr().out)["reward/micro"] <= 1


@pytest.mark.parametrize("name", ASKED)
def test_evaluate_holds_its_contest_on_every_format(
    name: str, model: str, judge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--model", model, "--baseline", model, "--reward_model", judge, "--max_new_tokens", "1"]
    assert cli.main([*words, "--prompts", fixture(name)]) == 0
    assert measured(capsys.readouterr().out)["win_rate/rate"] == 0.5


@pytest.mark.parametrize("stage", toys.TRAIN)
def test_report_draws_every_stage(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = toys.box(tmp_path / "box")
    toys.train(stage, box, tmp_path / "run", **({"epochs": 1} if stage in ("reward", "dpo") else {"steps": 1}))
    assert cli.main(["report", "--run", str(tmp_path / "run")]) == 0
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_no_fixture_is_left_out() -> None:
    """Every format of formats.py and every file of native columns is read by a stage, and as the README says."""
    read = {name for _, names in TRAINED.values() for name in names}
    assert read == {path.stem for path in FIXTURES.glob("*.jsonl")}
    assert {known.name for known in formats.FORMATS} == read - NATIVE
    table = re.findall(r"^\| ([\w -]+(?:, binarized)?) \| .+ \| ([a-z ]+) \| .+ \|$", README.read_text(), re.MULTILINE)
    spelled = {re.sub(r"\W+", "_", name.lower()): stages.split() for name, stages in table}
    assert {name: stages for name, stages in spelled.items() if name in read} == {
        known.name: [stage for stage, names in STAGES.items() if known.name in names] for known in formats.FORMATS
    }
