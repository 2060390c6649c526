"""Presets hold the numbers of their tables, and what a user says wins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests import toys
from twinhead.engine import cli, grpo, ppo, presets, reward, sft

NEEDED: dict[str, dict[str, Any]] = {
    "sft": {"model": "m", "data": "d"},
    "reward": {"model": "m", "data": "d"},
    "ppo": {"model": "m", "prompts": "p", "steps": 7, "reward_model": "r"},
    "grpo": {"model": "m", "prompts": "p", "steps": 7},
}
TABLES: dict[tuple[str, str], dict[str, Any]] = {
    # the lecture's table: LR, batch, epochs, schedule, length, warm-up, gradient clipping
    ("lecture08", "sft"): {
        "learning_rate": 2e-5, "batch_size": 32, "epochs": 1, "schedule": "cosine", "max_length": 2048,
        "warmup_ratio": 0.03, "max_grad_norm": 1.0,
    },
    ("lecture08", "reward"): {
        "learning_rate": 9e-6, "batch_size": 64, "epochs": 1, "schedule": "cosine", "max_length": 2048,
        "warmup_ratio": 0.05, "max_grad_norm": 1.0, "loss": "pairwise",
    },
    ("lecture08", "ppo"): {
        "learning_rate": 1.5e-5, "critic_learning_rate": 5e-6, "rollouts_per_step": 512, "epochs": 4,
        "schedule": "cosine", "warmup_ratio": 0.0, "max_prompt_tokens": 512, "max_new_tokens": 256, "kl_coef": 0.02,
        "kl_target_nats": 6.0, "kl_horizon": 10_000, "clip_low": 0.2, "clip_high": 0.2, "lam": 0.95, "gamma": 1.0,
        "max_grad_norm": 1.0, "temperature": 0.7, "critic": "separate", "value_coef": 0.5,
    },
    # Ouyang et al. 2022
    ("instructgpt", "sft"): {
        "learning_rate": 9.65e-6, "batch_size": 32, "epochs": 16, "schedule": "cosine", "warmup_ratio": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.95,
    },
    ("instructgpt", "reward"): {"learning_rate": 9e-6, "batch_size": 64, "epochs": 1, "loss": "pairwise"},
    ("instructgpt", "ppo"): {
        "critic_learning_rate": 9e-6, "schedule": "constant", "rollouts_per_step": 512, "epochs": 1, "kl_coef": 0.02,
        "kl_target_nats": None, "clip_low": 0.2, "clip_high": 0.2, "gamma": 1.0, "temperature": 1.0, "ema_decay": 0.992,
        "ptx_coef": 27.8, "max_prompt_tokens": 1024, "max_new_tokens": 1024, "critic": "separate",
        "value_init": "reward_model", "normalise_scores": False, "score_clip": None,
    },
    ("blog_beta01", "ppo"): {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95, "clip_low": 0.2, "clip_high": 0.2},
    ("ppo_max", "ppo"): {
        "normalise_scores": True, "score_clip": 5.0, "critic": "separate", "value_init": "reward_model",
        "critic_warmup": 10, "kl_coef": 0.05,
    },
    ("seed", "grpo"): {
        "group_size": 4, "clips": (0.2, 0.2), "beta": 0.01, "learning_rate": 1e-6, "max_new_tokens": 128,
        "adam_bits": 32,
    },
}  # fmt: skip


def test_every_preset_has_its_table() -> None:
    assert {(name, stage) for name, stages in presets.stages().items() for stage in stages} == TABLES.keys()


@pytest.mark.parametrize(("name", "stage"), TABLES)
def test_a_preset_has_the_numbers_of_its_table(name: str, stage: str) -> None:
    config = presets.apply(name, presets.STAGES[stage], **NEEDED[stage])
    assert {option: getattr(config, option) for option in TABLES[name, stage]} == TABLES[name, stage]


def test_minibatches_and_warm_ups_in_units_of_the_tables() -> None:
    lecture, paper = (presets.options(name, "ppo") for name in ("lecture08", "instructgpt"))
    for preset in (lecture, paper):
        assert preset["rollouts_per_step"] // preset["minibatches"] == 64
    assert paper["steps"] * paper["rollouts_per_step"] == 256_000
    assert round(paper["warmup_ratio"] * paper["steps"]) == 10
    for critic in (lecture, paper):  # the whole critic learns at the table's rate, its head too
        assert critic["value_lr_scale"] == 1.0


def test_what_is_chosen_wins() -> None:
    config = presets.apply("instructgpt", ppo.Config, **NEEDED["ppo"], kl_coef=0.5)
    assert (config.kl_coef, config.steps, config.ema_decay) == (0.5, 7, 0.992)
    assert presets.apply("instructgpt", cli.PPOConfig, **NEEDED["ppo"], plan=True).plan
    for config_type in (sft.Config, reward.Config, grpo.Config):
        assert dataclasses.is_dataclass(config_type)


@pytest.mark.parametrize(
    ("name", "stage", "sentence"),
    [
        (
            "lecture8",
            "ppo",
            "preset: expected one of lecture08, instructgpt, blog_beta01, ppo_max, got 'lecture8', did you",
        ),
        ("seed", "ppo", "preset: expected one of lecture08, instructgpt, blog_beta01, ppo_max, got 'seed'"),
        ("seed", "dpo", "preset: expected none, as dpo has none, got 'seed'"),
    ],
)
def test_a_preset_that_is_not_there_is_refused(name: str, stage: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        presets.options(name, stage)
    assert str(error.value).startswith(sentence)


# -- on the command line -----------------------------------------------------------------------------------------------


def chosen(monkeypatch: pytest.MonkeyPatch, *words: str) -> ppo.Config:
    """What `twinhead ppo` makes of these words."""
    taken: list[ppo.Config] = []
    monkeypatch.setattr(ppo, "train", taken.append)
    assert cli.main(["ppo", "--model", "m", "--prompts", "p", *words]) == 0
    return taken[0]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("kl_coef: 0.3\nclip_low: 0.1\nsteps: 9\n")
    given = ["--clip_low", "0.15", "--preset", "instructgpt", "--config", str(file), "--reward_model", "r"]
    config = chosen(monkeypatch, *given)
    assert (config.clip_low, config.kl_coef, config.steps, config.ema_decay) == (0.15, 0.3, 9, 0.992)
    assert config.kl_target_nats is None
    max_config = chosen(monkeypatch, "--preset=ppo_max", "--steps", "2", "--reward_model", "r")
    assert max_config.normalise_scores and max_config.critic_warmup == 10


def test_a_preset_by_a_wrong_name_ends_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", "--preset", "lecture9", "--model", "m"]) == 1
    assert capsys.readouterr().err.startswith("twinhead ppo: preset: expected one of lecture08, ")
    assert cli.main(["ppo", "--model", "m", "--preset"]) == 1
    assert capsys.readouterr().err == "twinhead ppo: --preset: expected a name, got nothing\n"
    assert cli.main(["report", "--preset", "seed"]) == 1
    assert capsys.readouterr().err.startswith("twinhead report: unknown option 'preset'")


def test_the_help_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "lecture08 sft, reward, ppo" in printed and "seed grpo" in printed


def test_a_preset_trains(tmp_path: Path) -> None:
    box = toys.box(tmp_path / "box")
    given = toys.options("ppo", box) | {"reward_model": box["reward_model"], "output_dir": str(tmp_path / "run")}
    del given["reward_functions"]
    words = toys.command("ppo", given)
    with toys.one_thread():
        assert cli.main([*words, "--preset", "ppo_max"]) == 0
    assert len(toys.metrics(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "critic" / "config.json").is_file()
