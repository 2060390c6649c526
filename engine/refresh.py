"""Iterative refresh: where a policy has outgrown its reward model, its answers are compared and a new one is trained.

    label    the current policy answers, a labeler compares
    reward   a new reward model from the SFT trunk, on these comparisons and all before them
    ppo      the policy goes on against it, held to the reference that it began with

Ouyang et al. 2022 (InstructGPT), section 3.1: the steps iterate, with comparisons of what the policy says now.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twinhead.engine import checkpoint, data, ppo, reward, rows
from twinhead.engine.evaluate import reward_accuracy
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.scorers import RewardFunction
from twinhead.engine.text import Text

# f(policy, round from 1) -> rows of comparisons between its answers, such as twinhead.engine.labeler.compare() makes.
Label = Callable[[Policy, int], Sequence[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of label, reward, ppo: where its models stand, and what the refresh was good for."""

    policy: Path
    reward_model: Path
    stale: float | None  # micro accuracy, on held-out comparisons of this round, of the last round's reward model
    fresh: float  # and of this round's


def refresh(
    reward_config: reward.Config,
    ppo_config: ppo.Config,
    label: Label,
    rounds: int,
    output_dir: Path | str,
    *,
    held_out: float = 0.25,
    reward_funcs: Sequence[RewardFunction] = (),
) -> list[Round]:
    """Label, train a reward model and continue PPO, `rounds` times; everything stands in output_dir/round-N.

    The stages go by their configs, apart from data and folders: reward_config.data is what comparisons begin with,
    ppo_config.model the first policy, and ppo_config.steps those of one round. The last `held_out` share of each
    round's comparisons is never trained on. The same call goes on where it was interrupted; labels are asked for once.
    Raises ValueError for no rounds, a reward model that is given, a share outside (0, 1) or fewer than 2 comparisons.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    if given := (ppo_config.reward_model or ppo_config.reward_models):
        raise ValueError(f"reward_model: expected none, as every round trains its own, got {given!r}")
    text = Text.from_pretrained(reward_config.model)
    known = rows.rows(reward_config.data)
    policy, judge, done = Path(ppo_config.model), None, list[Round]()
    for number in range(1, rounds + 1):
        folder = Path(output_dir) / f"round-{number}"
        compared = labels(label, policy, number, folder, ppo_config)
        cut = len(compared) - min(max(1, round(held_out * len(compared))), len(compared) - 1)  # some of either
        known = known + compared[:cut]
        config = replace(reward_config, data=known, eval_data=compared[cut:], output_dir=str(folder / "reward"))
        refreshed = reward.train(config).dir
        samples = data.comparisons(compared[cut:], text, config.max_length, config.min_score_ratio)
        stale, fresh = (accuracy(model, samples, config) if model else None for model in (judge, refreshed))
        assert fresh is not None, "a reward model was trained"
        learned = ppo.train(
            replace(
                ppo_config, model=str(policy), reference=ppo_config.reference or ppo_config.model,
                reward_model=str(refreshed), seed=ppo_config.seed + number - 1, output_dir=str(folder / "ppo"),
            ),
            reward_funcs,
        )  # fmt: skip
        policy, judge = learned.dir, refreshed
        done.append(Round(policy, refreshed, stale, fresh))
    return done


def labels(label: Label, policy: Path, number: int, folder: Path, config: ppo.Config) -> list[rows.Row]:
    """The comparisons of a round, from its folder or, once, from the labeler."""
    file = folder / "comparisons.jsonl"
    if not file.is_file():
        compared = label(Policy.from_pretrained(policy, "none", config.torch_dtype, config.torch_device), number)
        if len(compared) < 2:
            raise ValueError(f"label: expected at least 2 comparisons of round {number}, got {len(compared)}")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in compared))
    return rows.rows(file)


def accuracy(folder: Path, samples: Sequence[data.Comparison], config: reward.Config) -> float:
    """The share of held-out pairs that a reward model orders as the labeler did."""
    model = RewardModel.from_pretrained(folder, config.torch_dtype, config.torch_device)
    return reward_accuracy(model, samples, config.tokens_per_micro).micro
