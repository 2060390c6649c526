"""Options come from a YAML file and from the command line, which wins, and mean the same either way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from twinhead.engine import ppo, reward, sft
from twinhead.engine.cli import COMMANDS, EvaluateConfig, GenerateConfig
from twinhead.engine.config import RunConfig, check, hidden, parse, read_yaml

CONFIGS = [config for config, _ in COMMANDS.values()]
NEEDED = {"model": "m", "data": "d.jsonl", "prompts": "p.jsonl", "steps": 3, "run": "r", "text": "t.txt"}
PPO = ["--model", "m", "--prompts", "p.jsonl", "--steps", "3"]


def needed(config: type) -> dict[str, Any]:
    """The options without which a command does not start."""
    names = {f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING}
    if config is GenerateConfig:
        names |= {"prompts"}
    if config is EvaluateConfig:
        names = {"model", "text"}
    return {name: NEEDED[name] for name in names}


def words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_line_the_file_and_python_agree(config: type, tmp_path: Path) -> None:
    options = needed(config)
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(options))
    assert parse(config, words(options), "twinhead") == config(**options)
    assert parse(config, ["--config", str(file)], "twinhead") == config(**options)
    assert parse(config, [f"--config={file}"], "twinhead") == config(**options)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_can_hold_every_option(config: type, tmp_path: Path) -> None:
    """The defaults, written down, are the defaults."""
    default = config(**needed(config))
    values = {f.name: getattr(default, f.name) for f in dataclasses.fields(config) if not hidden(f)}
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}))
    assert parse(config, ["--config", str(file)], "twinhead") == default


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model: m\nprompts: p.jsonl\nsteps: 3\nseed: 1\nreward_weights: [1, 2]\ntensorboard: true\n")
    given = ["--seed", "2", "--config", str(file), "--steps", "4", "--no_tensorboard", "--reward_weights", "3"]
    config = parse(ppo.Config, given, "twinhead ppo")
    assert (config.seed, config.steps, config.tensorboard, config.reward_weights) == (2, 4, False, (3.0,))
    assert config.prompts == "p.jsonl"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # YAML 1.1 reads a text here
        ("learning_rate: 0.001", "learning_rate", 1e-3),
        ("kl_stop: null", "kl_stop", None),
        ("kl_stop: 0.5", "kl_stop", 0.5),
        ("tensorboard: true", "tensorboard", True),
        ("tensorboard: false", "tensorboard", False),
        ("reward_functions: [a.py:f, b.py:g]", "reward_functions", ("a.py:f", "b.py:g")),
        ("reward_functions: a.py:f", "reward_functions", ("a.py:f",)),
        ("reward_weights: []", "reward_weights", ()),
        ("reward_weights: [-1, 0.5]", "reward_weights", (-1.0, 0.5)),
        ("output_dir: 'with space/é'", "output_dir", "with space/é"),
        ("missing_eos_penalty: -0.5", "missing_eos_penalty", -0.5),
    ],
)
def test_values_of_a_file(line: str, name: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(line + "\n", encoding="utf-8")
    config = parse(ppo.Config, [*PPO, "--config", str(file)], "twinhead ppo")
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--tensorboard"], "tensorboard", True),
        (["--reward_functions", "a.py:f", "b.py:g"], "reward_functions", ("a.py:f", "b.py:g")),
        (["--kl_stop", "None"], "kl_stop", None),
        (["--missing_eos_penalty", "-1"], "missing_eos_penalty", -1.0),
        (["--ptx_data", "texts"], "ptx_data", "texts"),
    ],
)
def test_values_of_the_command_line(args: list[str], name: str, value: Any) -> None:
    assert getattr(parse(ppo.Config, [*PPO, *args], "twinhead ppo"), name) == value


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("learnin_rate: 1", "^unknown option 'learnin_rate', did you mean 'learning_rate'\\?$"),
        ("zzz: 1", "^unknown option 'zzz'; the options are output_dir, seed, .*, eval_data"),
        ("3: 1", "^unknown option '3'"),
        ("- model", "options.yaml: expected a mapping of options, got list$"),
        ("", "options.yaml: expected a mapping of options, got NoneType$"),
        ("model: [", "options.yaml: not valid YAML \\("),
        ("model: &a *b", "options.yaml: not valid YAML \\("),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_yaml(sft.Config, str(file))
    assert "\n" not in str(error.value)


def test_rows_may_be_given_in_python_only() -> None:
    rows = [{"prompt": "one", "completion": "two"}]
    assert sft.Config(model="m", data=rows).data == rows
    assert sft.Config(model="m", data=rows).eval_data == ""


def test_a_config_cannot_be_changed_and_takes_no_unknown_option() -> None:
    config = sft.Config(model="m", data="d")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    with pytest.raises(TypeError, match="learnin_rate"):
        sft.Config(model="m", data="d", learnin_rate=1)
    with pytest.raises(TypeError):
        sft.Config("m", "d")


def test_the_first_broken_rule_is_told() -> None:
    class Options:
        small, large = 1, 9

    with pytest.raises(ValueError, match=r"^large: expected at most 3, got 9$"):
        check(
            Options(), small=(True, "at least 1"), large=(Options.large <= 3, "at most 3"), missing=(False, "anything")
        )
    check(Options(), small=(True, "at least 1"))


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": ""}, {"device": "tpu"}, {"dtype": "float16"}, {"learning_rate": -1e-9}, {"schedule": "step"},
        {"warmup_ratio": -0.1}, {"warmup_ratio": 1.1}, {"max_grad_norm": -1.0}, {"tokens_per_micro": 0},
        {"save_every": -1}, {"keep_checkpoints": 0}, {"learning_rate": float("nan")},
    ],
)  # fmt: skip
def test_every_stage_checks_the_shared_options(changes: dict[str, Any]) -> None:
    for config in (sft.Config, sft.PretrainConfig, reward.Config, ppo.Config):
        with pytest.raises(ValueError, match=f"^{next(iter(changes))}: expected .*, got "):
            config(**needed(config) | changes)


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.0}, {"warmup_ratio": 1.0}, {"max_grad_norm": 0.0}, {"save_every": 0}, {"tokens_per_micro": 1}],
)
def test_the_ends_of_what_is_allowed_are_allowed(changes: dict[str, Any]) -> None:
    assert RunConfig(output_dir="run", **changes)


def test_types_of_numbers() -> None:
    assert RunConfig(output_dir="run").torch_dtype is torch.float32
    assert RunConfig(output_dir="run", dtype="bfloat16").torch_dtype is torch.bfloat16
    assert RunConfig(output_dir="run", device="cpu").torch_device == torch.device("cpu")
