"""Presets: the hyper-parameters of published recipes, as options of a stage, where one's own come on top.

lecture08     a lecture's table for SFT, reward model and PPO. Its adaptive KL has no target there: 6 nats and 10,000
              sequences are Ziegler et al.'s (2019). Its top_p of 0.9 while sampling is left out: log-probs of the
              unfiltered policy would not be those of what was drawn
instructgpt   Ouyang et al. 2022, as quoted where its text can be read: PPO's batch, epochs, schedule, critic's
              learning rate and lengths are from memory, the actor's learning rate and lambda are not known and stay at
              our defaults. Its SFT dropout of 0.2 has no counterpart. ptx_coef is in its units, for sums over eight
              times as many examples: 1.0 did well with our mean over tokens
blog_beta01   the constants of a blog's PPO: beta 0.1, gamma 1, lambda 0.95, epsilon 0.2
ppo_max       Zheng et al. 2023's bundle: scores normalised and clipped, advantages whitened (always so here), a critic
              that learns first, a KL penalty. The numbers are ours
seed          a tutorial's GRPO: 4 answers, epsilon 0.2, KL 0.01
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from twinhead.engine import dpo, grpo, ppo, reward, sft
from twinhead.engine.config import RunConfig

C = TypeVar("C", bound=RunConfig)

PRESETS: dict[str, dict[type[RunConfig], dict[str, Any]]] = {
    "lecture08": {
        sft.Config: {
            "learning_rate": 2e-5, "batch_size": 32, "epochs": 1, "schedule": "cosine", "warmup_ratio": 0.03,
            "max_length": 2048, "max_grad_norm": 1.0,
        },
        reward.Config: {
            "learning_rate": 9e-6, "batch_size": 64, "epochs": 1, "schedule": "cosine", "warmup_ratio": 0.05,
            "max_length": 2048, "max_grad_norm": 1.0,
        },
        ppo.Config: {
            "critic": "separate", "learning_rate": 1.5e-5, "critic_learning_rate": 5e-6, "value_lr_scale": 1.0,
            "schedule": "cosine", "warmup_ratio": 0.0, "rollouts_per_step": 512, "minibatches": 8, "epochs": 4,
            "max_prompt_tokens": 512, "max_new_tokens": 256, "temperature": 0.7, "kl_coef": 0.02,
            "kl_target_nats": 6.0, "kl_horizon": 10_000, "clip_low": 0.2, "clip_high": 0.2, "lam": 0.95, "gamma": 1.0,
            "max_grad_norm": 1.0,
        },
    },
    "instructgpt": {
        sft.Config: {
            "learning_rate": 9.65e-6, "batch_size": 32, "epochs": 16, "schedule": "cosine", "warmup_ratio": 0.0,
            "adam_beta1": 0.9, "adam_beta2": 0.95,
        },
        reward.Config: {"learning_rate": 9e-6, "batch_size": 64, "epochs": 1, "loss": "pairwise"},
        ppo.Config: {
            "critic": "separate", "value_init": "reward_model", "critic_learning_rate": 9e-6, "value_lr_scale": 1.0,
            "schedule": "constant", "warmup_ratio": 0.02, "steps": 500, "rollouts_per_step": 512, "minibatches": 8,
            "epochs": 1, "max_prompt_tokens": 1024, "max_new_tokens": 1024, "temperature": 1.0, "kl_coef": 0.02,
            "kl_target_nats": None, "clip_low": 0.2, "clip_high": 0.2, "gamma": 1.0, "ema_decay": 0.992,
            "ptx_coef": 27.8,
        },
    },
    "blog_beta01": {ppo.Config: {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95, "clip_low": 0.2, "clip_high": 0.2}},
    "ppo_max": {
        ppo.Config: {
            "normalise_scores": True, "score_clip": 5.0, "critic": "separate", "value_init": "reward_model",
            "critic_warmup": 10, "kl_coef": 0.05,
        },
    },
    "seed": {
        grpo.Config: {
            "group_size": 4, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.01, "learning_rate": 1e-6,
            "max_new_tokens": 128,
        },
    },
}  # fmt: skip
STAGES = {"sft": sft.Config, "reward": reward.Config, "ppo": ppo.Config, "dpo": dpo.Config, "grpo": grpo.Config}


def stages() -> dict[str, list[str]]:
    """The stages that each preset has options for."""
    return {name: [stage for stage, config in STAGES.items() if config in of] for name, of in PRESETS.items()}


def options(name: str, stage: str) -> dict[str, Any]:
    """The options of a preset for a stage. Raises ValueError for a preset that is unknown or has none for it."""
    known = [preset for preset, has in stages().items() if stage in has]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        expected = f"one of {', '.join(known)}" if known else f"none, as {stage} has none"
        raise ValueError(f"preset: expected {expected}, got {name!r}{f', did you mean {near[0]!r}?' if near else ''}")
    return dict(PRESETS[name][STAGES[stage]])


def apply(name: str, config: type[C], **chosen: Any) -> C:
    """A stage's Config with the preset's options under the chosen ones: apply("ppo_max", ppo.Config, model=...)."""
    stage = next(stage for stage, its in STAGES.items() if issubclass(config, its))
    return config(**options(name, stage) | chosen)
