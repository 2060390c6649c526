"""No option is dead: each one of every stage is turned once, and what it should change has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import toys
from twinhead.engine import attention, grpo, ppo, trunk
from twinhead.engine.config import RunConfig

Box = dict[str, str]


@dataclass(frozen=True)
class Traces:
    """What a run leaves behind."""

    metrics: list[dict[str, Any]]
    weights: dict[str, list[float]]
    files: list[str]
    passes: list[int]  # tokens of every pass through the trunk, and of every layer's attention


@dataclass(frozen=True)
class Turn:
    """An option at another value, and the traces that must differ for it; `given` holds on both sides."""

    value: Any
    seen_in: str
    given: dict[str, Any] = field(default_factory=dict)


RUN = {
    "seed": Turn(1, "metrics"),
    "dtype": Turn("bfloat16", "weights"),
    "learning_rate": Turn(0.003, "weights"),
    "schedule": Turn("linear", "weights"),
    "warmup_ratio": Turn(0.7, "weights"),
    "weight_decay": Turn(0.5, "weights"),
    "adam_beta1": Turn(0.5, "weights"),
    "adam_beta2": Turn(0.9, "weights"),
    "adam_eps": Turn(0.01, "weights"),
    "max_grad_norm": Turn(0.01, "weights", {"adam_eps": 0.01}),
    "tokens_per_micro": Turn(20, "passes"),
    "gradient_checkpointing": Turn(True, "passes"),
    "lora_rank": Turn(2, "weights"),
    "lora_alpha": Turn(64, "weights", {"lora_rank": 2}),
    "lora_targets": Turn(("q_proj",), "weights", {"lora_rank": 2}),
    "save_every": Turn(1, "files", {"keep_checkpoints": 9}),
    "keep_checkpoints": Turn(2, "files", {"save_every": 1}),
    "tensorboard": Turn(True, "files"),
}
ASKED = [{"instruction": "one two", "output": "two two"}]
UNEVEN = [{"prompt": "one", "completion": words, "text": words} for words in ("two", "two four six eight")]
VOTED = [{"prompt": "one", "chosen": "good", "rejected": "bad", "score_ratio": ratio} for ratio in (3.0, 1.5)]
TWO = ("{reward_model}", "{small_reward_model}")
LABELLED = {"loss": "kto", "data": "{unpaired}", "eval_data": "{labelled}"}
FIT = {
    "model": Turn("{other}", "metrics"),
    "data": Turn("{heldout}", "metrics"),
    "eval_data": Turn("", "metrics"),
    "epochs": Turn(2, "metrics", {"steps": 0}),
    "steps": Turn(2, "metrics"),
    "batch_size": Turn(8, "metrics"),
    "max_length": Turn(4, "metrics"),
    "reduction": Turn("seq_mean", "weights", {"data": UNEVEN}),
    "template": Turn("alpaca", "metrics", {"data": ASKED, "max_length": 64}),
}
ADAPTED = {  # there is nothing to adapt where nothing has been learned yet
    "lora_rank": Turn(2, "weights", {"model": "{model}"}),
    "lora_alpha": Turn(64, "weights", {"model": "{model}", "lora_rank": 2}),
    "lora_targets": Turn(("q_proj",), "weights", {"model": "{model}", "lora_rank": 2}),
}
TURNS: dict[str, dict[str, Turn]] = {
    "pretrain": RUN | FIT | ADAPTED | {"data": Turn("{texts}", "metrics"), "template": Turn("alpaca", "files")},
    "sft": RUN | FIT,
    "reward": RUN
    | {
        "model": Turn("{other}", "metrics"),
        "data": Turn("{ranked}", "metrics"),
        "eval_data": Turn("", "metrics"),
        "demonstrations": Turn("{demonstrations}", "metrics"),
        "epochs": Turn(2, "metrics"),
        "batch_size": Turn(8, "metrics"),
        "max_length": Turn(4, "metrics"),
        "min_score_ratio": Turn(2.0, "metrics", {"data": VOTED}),
        "loss": Turn("listwise", "weights"),
        "centring_coef": Turn(1.0, "weights"),
        "normalisation": Turn("mean_std", "weights"),
        "flatten_pairs": Turn(True, "passes"),
    },
    "ppo": RUN
    | {
        "model": Turn("{other}", "metrics"),
        "reference": Turn("{other}", "metrics"),
        "prompts": Turn("{heldout}", "metrics"),
        "steps": Turn(2, "metrics"),
        "reward_model": Turn("{reward_model}", "metrics"),
        "reward_models": Turn(("{reward_model}",), "metrics"),
        "ensemble": Turn("min", "metrics", {"reward_models": TWO}),
        "ensemble_coef": Turn(3.0, "metrics", {"reward_models": TWO, "ensemble": "mean_std"}),
        "reward_functions": Turn(("{rewards}:shortness",), "metrics"),
        "reward_weights": Turn((2.0,), "metrics"),
        "rollouts_per_step": Turn(6, "metrics"),
        "epochs": Turn(1, "metrics"),
        "minibatches": Turn(1, "metrics"),
        "max_prompt_tokens": Turn(3, "metrics"),
        "max_new_tokens": Turn(4, "metrics"),
        "temperature": Turn(0.5, "metrics"),
        "num_slots": Turn(2, "passes"),
        "cache_bytes": Turn(20_000, "passes"),
        "old_logprobs": Turn("recompute", "passes"),
        "mismatch_alarm": Turn(1e-12, "metrics"),
        "importance_cap": Turn(0.5, "weights", {"old_logprobs": "recompute"}),
        "critic": Turn("detached", "weights"),
        "branch_layers": Turn(2, "weights", {"critic": "branch", "model": "{deep_model}", "branch_layers": 1}),
        "critic_model": Turn("{other}", "weights", {"critic": "separate"}),
        "critic_learning_rate": Turn(0.01, "weights", {"critic": "separate"}),
        "critic_warmup": Turn(2, "weights"),
        "share": Turn("all", "passes", {"reward_model": "{adapted_reward_model}", "lora_rank": 2}),
        "value_init": Turn("reward_model", "metrics", {"reward_model": "{reward_model}"}),
        "value_lr_scale": Turn(3.0, "weights"),
        "kl_coef": Turn(0.5, "weights"),
        "kl_kind": Turn("full", "weights"),
        "kl_in": Turn("loss", "weights", {"kl_kind": "k3"}),
        "kl_target_nats": Turn(0.01, "metrics", {"kl_horizon": 20}),
        "kl_horizon": Turn(20, "metrics", {"kl_target_nats": 0.01}),
        "missing_eos_penalty": Turn(3.0, "metrics"),
        "normalise_scores": Turn(True, "metrics"),
        "score_clip": Turn(0.01, "metrics"),
        "process_function": Turn("{rewards}:progress", "weights"),
        "advantage": Turn("bandit", "weights"),
        "gamma": Turn(0.5, "weights"),
        "lam": Turn(0.5, "weights"),
        "bootstrap_truncated": Turn(True, "weights"),
        "clip_low": Turn(0.0, "metrics"),
        "clip_high": Turn(0.0, "metrics"),
        "value_clip": Turn(0.0, "metrics"),
        "value_coef": Turn(5.0, "weights"),
        "entropy_coef": Turn(0.5, "weights"),
        "kl_stop": Turn(0.0, "metrics"),
        "ptx_data": Turn("{documents}", "metrics"),
        "ptx_coef": Turn(3.0, "weights", {"ptx_data": "{documents}"}),
        "ptx_batch_size": Turn(2, "metrics", {"ptx_data": "{documents}"}),
        "ptx_max_length": Turn(4, "metrics", {"ptx_data": "{documents}"}),
        "ema_decay": Turn(0.9, "files"),
        "stop_kl_nats": Turn(1e-9, "metrics"),
        "eval_every": Turn(1, "metrics"),
        "eval_prompts": Turn("{heldout}", "metrics", {"eval_every": 1}),
        "best_by": Turn("eval/answer", "files", {"eval_every": 1}),
        "patience": Turn(1, "metrics", {"eval_every": 1, "best_by": "eval/answer"}),
    },
    "grpo": RUN
    | {
        "model": Turn("{other}", "metrics"),
        "prompts": Turn("{heldout}", "metrics"),
        "steps": Turn(2, "metrics"),
        "reward_model": Turn("{reward_model}", "metrics"),
        "reward_functions": Turn(("{rewards}:shortness",), "metrics"),
        "reward_weights": Turn((2.0,), "metrics"),
        "process_function": Turn("{rewards}:progress", "weights"),
        "prompts_per_step": Turn(2, "metrics"),
        "group_size": Turn(3, "metrics"),
        "epochs": Turn(1, "metrics"),
        "minibatches": Turn(1, "metrics"),
        "max_prompt_tokens": Turn(3, "metrics"),
        "max_new_tokens": Turn(4, "metrics"),
        "temperature": Turn(0.5, "metrics"),
        "num_slots": Turn(2, "passes"),
        "cache_bytes": Turn(20_000, "passes"),
        "old_logprobs": Turn("recompute", "passes"),
        "importance_cap": Turn(0.5, "weights", {"old_logprobs": "recompute"}),
        "mismatch_alarm": Turn(1e-12, "metrics"),
        "loss": Turn("rloo", "weights"),
        "clip_low": Turn(0.0, "metrics"),
        "clip_high": Turn(0.0, "metrics"),
        "beta": Turn(0.5, "weights"),
        "resample": Turn(1, "metrics"),
        "missing_eos_penalty": Turn(3.0, "metrics"),
        "overlong_buffer": Turn(3, "metrics"),
        "overlong_penalty": Turn(2.0, "metrics", {"overlong_buffer": 3}),
        "eval_every": Turn(1, "metrics"),
    },
    "dpo": RUN
    | {
        "model": Turn("{other}", "metrics"),
        "data": Turn("{ranked}", "metrics"),
        "eval_data": Turn("", "metrics"),
        "reference": Turn("{other}", "metrics"),
        "precompute_reference": Turn(True, "files"),
        "epochs": Turn(2, "metrics"),
        "batch_size": Turn(8, "metrics"),
        "max_length": Turn(4, "metrics"),
        "loss": Turn("hinge", "metrics"),
        "beta": Turn(0.5, "weights"),
        "label_smoothing": Turn(0.3, "weights"),
        "desirable_weight": Turn(2.0, "weights", LABELLED),
        "undesirable_weight": Turn(2.0, "weights", LABELLED),
    },
}
ELSEWHERE = {
    "adam_bits": "test_optim.py: the toys have no matrix that is large enough",
    "shard_optimizer": "test_ranks.py: it takes two processes",
    "offload": "test_residence.py, and test_offload_needs_a_device_of_its_own",
    "output_dir": "every run of every test has its own",
    "device": "test_a_device_that_is_not_there_is_refused",
    "cuda_graphs": "test_ppo_asks_for_graphs",
}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    folder = tmp_path_factory.mktemp("box")
    paths = toys.box(folder)
    other = toys.language_model(folder / "other", seed=1)
    paths["adapted_reward_model"] = str(folder / "adapted")
    toys.train("reward", paths, folder / "adapted", lora_rank=2)
    deep = toys.language_model(folder / "deep", seed=3, num_hidden_layers=3)
    return paths | {
        "other": other,
        "deep_model": deep,
        "texts": toys.write(folder / "texts.jsonl", toys.documents(12, seed=9)),
    }


@pytest.fixture(scope="module")
def traces(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Traces]:
    """Runs a stage with some options changed, each combination once."""
    known: dict[str, Traces] = {}

    def find(stage: str, changes: dict[str, Any]) -> Traces:
        key = f"{stage} {changes}"
        if key not in known:
            known[key] = traced(stage, box, tmp_path_factory.mktemp("traced") / "run", changes)
        return known[key]

    return find


def traced(stage: str, box: Box, folder: Path, changes: dict[str, Any]) -> Traces:
    passes: list[int] = []
    forward, ragged = trunk._forward, attention._ragged

    def counted(model: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(tokens.numel())
        return forward(model, tokens, *rest)

    def attended(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(query.shape[2])
        return ragged(query, *rest)

    evaluate = {"evaluate": lambda policy: {"answer": 42.0}} if stage in ("ppo", "grpo") else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk, "_forward", counted)
        patch.setattr(attention, "_ragged", attended)
        given = {name: toys.filled(value, box) for name, value in changes.items()}
        toys.train(stage, box, folder, **evaluate, **given)
    weights = {name: tensor.flatten().tolist() for name, tensor in load_file(folder / "model.safetensors").items()}
    head = folder / "value_head.safetensors"
    beside = (head, folder / "value_branch.safetensors", folder / "critic" / "model.safetensors")
    for file in filter(Path.exists, beside):
        weights |= {f"{file.stem} {name}": tensor.flatten().tolist() for name, tensor in load_file(file).items()}
    files = [re_named(name) for name in toys.files(folder)]
    return Traces(toys.metrics(folder), weights, files, passes)


def re_named(file: str) -> str:
    """TensorBoard's files have the time in their names."""
    return "tensorboard" if file.startswith("tensorboard") else file


@pytest.mark.parametrize("stage", TURNS)
def test_every_option_has_its_turn(stage: str) -> None:
    fields = {f.name for f in dataclasses.fields(toys.TRAIN[stage][0])}
    assert fields - ELSEWHERE.keys() == TURNS[stage].keys()


@pytest.mark.parametrize(("stage", "option"), [(stage, option) for stage, turns in TURNS.items() for option in turns])
def test_the_option_is_alive(stage: str, option: str, traces: Callable[..., Traces]) -> None:
    turn = TURNS[stage][option]
    before, after = traces(stage, turn.given), traces(stage, turn.given | {option: turn.value})
    assert getattr(before, turn.seen_in) != getattr(after, turn.seen_in)


@pytest.mark.parametrize("stage", TURNS)
def test_the_same_options_leave_the_same_traces(
    stage: str, box: Box, tmp_path: Path, traces: Callable[..., Traces]
) -> None:
    assert traced(stage, box, tmp_path / "again", {}) == traces(stage, {})


@pytest.mark.parametrize("option", ["save_every", "keep_checkpoints", "tensorboard"])
@pytest.mark.parametrize("stage", TURNS)
def test_free_options_change_neither_metrics_nor_weights(
    stage: str, option: str, traces: Callable[..., Traces]
) -> None:
    turn = TURNS[stage][option]
    before, after = traces(stage, turn.given), traces(stage, turn.given | {option: turn.value})
    assert (before.metrics, before.weights, before.passes) == (after.metrics, after.weights, after.passes)


@pytest.mark.parametrize("stage", TURNS)
def test_a_device_that_is_not_there_is_refused(
    stage: str, box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: expected cpu or auto on a machine without CUDA, got 'cuda'$"):
        toys.train(stage, box, tmp_path / "run", device="cuda")


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize("config_type", [ppo.Config, grpo.Config])
def test_offload_needs_a_device_of_its_own(
    config_type: type[RunConfig], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"model": "m", "prompts": "p", "steps": 1, "reward_model": "r", "offload": True}
    with pytest.raises(
        ValueError, match=r"^offload: expected False on the device cpu, which is the host itself, got T"
    ):
        config_type(**given, device=device)
    assert config_type(**given, device="cuda").offload


def test_grpo_offloads_what_it_has() -> None:
    given = {"model": "m", "prompts": "p", "steps": 1, "device": "cuda", "offload": True}
    for nobody in ({}, {"beta": 0.1, "lora_rank": 2}):
        with pytest.raises(ValueError, match=r"^offload: expected False without a reward model or a reference to send"):
            grpo.Config(**given, **nobody)
    for frozen in ({"beta": 0.1}, {"reward_model": "r", "lora_rank": 2}):
        assert grpo.Config(**given, **frozen).offload


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert RunConfig(output_dir="run").torch_device.type == kind
