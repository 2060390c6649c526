"""What four models on one base learn: task A with adapters and `share=all`, beside models that stand apart.

whole    policy and reward model learn all weights, the critic is a head on the policy: what quality.py calls healthy
apart    the same with a critic that is a network of its own: four models
shared   adapters on one frozen base, which with them and two heads weighs at most 1.15 times as much

An adapter of the policy must reach the head of the vocabulary, and one of the reward model the embedding: the language
model says praise and complaint as often as each other, so both matrices hold their words nearly equal.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.quality import HEALTHY, Reviews, accuracy, curve
from twinhead.engine import backbone, lora
from twinhead.engine.checkpoint import write_file
from twinhead.engine.lora import Lora
from twinhead.engine.policy import Policy, RewardModel

# Chosen on seed 0. Where all weights learn: policy 3e-4 and value_lr_scale 30, reward model 1e-3
JUDGE: dict[str, Any] = {"lora_rank": 4, "lora_targets": ("all-linear", "embed_tokens"), "learning_rate": 5e-3}
POLICY: dict[str, Any] = {
    "lora_rank": 2, "lora_targets": ("all-linear", "lm_head"), "learning_rate": 1e-3, "value_lr_scale": 9.0,
}  # fmt: skip
BUDGET: dict[str, Any] = {"steps": 20, "kl_coef": 0.05, "eval_every": 5}
ARMS = ("whole", "apart", "shared")


def main(seeds: Sequence[int], runs: Path, results: Path) -> None:
    """Run what has not run yet for every seed; write JSON into `results` and print the table."""
    found = {seed: measured(Reviews(runs, seed)) for seed in seeds}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    said = {"task": "A, reviews", "versions": versions, "judge": JUDGE, "policy": POLICY, "seeds": found}
    results.mkdir(parents=True, exist_ok=True)
    write_file(results / "quality_sharing.json", json.dumps(said, indent=1) + "\n")
    Console().print(table(found))


def measured(task: Reviews) -> dict[str, Any]:
    """Of one seed: the curve of every arm, accuracies of the reward models, and weights (the base's are 1)."""
    task.sft()
    task.reward_model("reward", HEALTHY, task.path("sft"))
    task.reward_model("reward_adapter", HEALTHY, task.path("sft"), rankings="reward", **JUDGE)
    whole = {"learning_rate": 3e-4} | BUDGET
    arms = {
        "whole": task.ppo("ppo", "reward", **whole),
        "apart": task.ppo("ppo_apart", "reward", critic="separate", **whole),
        "shared": task.ppo("ppo_shared", "reward_adapter", share="all", **POLICY | BUDGET),
    }
    return {
        "reward_accuracy": {name: accuracy(task, name) for name in ("reward", "reward_adapter")},
        "weights": weights(task.path("sft"), task.path("reward"), task.path("reward_adapter")),
        "curves": {name: curve(run) for name, run in arms.items()},
    }


def weights(model: str, judge: str, adapter: str) -> dict[str, float]:
    """What policy, critic, reference and reward model of every arm weigh together, where the base weighs 1."""
    rank, targets = POLICY["lora_rank"], POLICY["lora_targets"]
    policy, whole, apart = (
        Policy.from_pretrained(model, critic, lora=chosen)
        for critic, chosen in (("shared", Lora(rank, 2 * rank, targets)), ("shared", None), ("separate", None))
    )
    frozen = (whole.frozen_copy(), RewardModel.from_pretrained(judge))
    held: dict[str, tuple[nn.Module, ...]] = {
        "whole": (whole, *frozen),
        "apart": (apart, *frozen),
        "shared": (policy, backbone.GuestRewardModel(policy, adapter)),
    }
    one = nbytes(lora.base(policy.model).values())
    return {name: nbytes(p for module in modules for p in module.parameters()) / one for name, modules in held.items()}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each of which is counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def table(found: Mapping[int, Mapping[str, Any]]) -> Table:
    """One row per arm: what its runs end with, seed by seed, and on average."""
    rows = Table("models", "weights", *(f"seed {seed}" for seed in found), "mean", title="Task A: win rate, gold, KL")
    for arm in ARMS:
        last = [seed["curves"][arm][-1] for seed in found.values()]
        mean = {key: statistics.mean(point[key] for point in last) for key in ("win_rate", "gold", "kl")}
        size = next(iter(found.values()))["weights"][arm]
        cells = (f"{p['win_rate']:.3f} / {p['gold']:.2f} / {p['kl']:.1f}" for p in (*last, mean))
        rows.add_row(arm, f"{size:.3f}", *cells)
    return rows
