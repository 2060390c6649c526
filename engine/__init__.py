"""Train language models with human feedback: one backbone, two heads, from pre-training to PPO."""

from __future__ import annotations

from twinhead.engine import dpo, grpo, ppo, reward, sft
from twinhead.engine.batch import Example, Packed, Rollout, pack
from twinhead.engine.best_of import best_of
from twinhead.engine.generate import generate, stream
from twinhead.engine.lora import Lora
from twinhead.engine.policy import Policy, RewardModel, Scored
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

__all__ = [
    "Example",
    "Lora",
    "Packed",
    "Policy",
    "RewardModel",
    "Rollout",
    "Sampling",
    "Scored",
    "Text",
    "best_of",
    "dpo",
    "generate",
    "grpo",
    "pack",
    "ppo",
    "reward",
    "sft",
    "stream",
]
