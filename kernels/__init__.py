"""Fused operations for training with human feedback; they need torch and nothing else.

A folder per operation: `__init__.py` says what it means, `reference.py` is the oracle, the other modules are backends.
"""

from __future__ import annotations

from twinhead.kernels.dpo import dpo_loss
from twinhead.kernels.gae import gae, whiten
from twinhead.kernels.grpo import grpo_loss
from twinhead.kernels.kl import full_kl, kl_estimate, linear_kl
from twinhead.kernels.linear import linear_cross_entropy, linear_logprob, linear_ppo_loss
from twinhead.kernels.logprob import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy
from twinhead.kernels.ppo import ppo_loss
from twinhead.kernels.sample import sample

__all__ = [
    # from logits
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "entropy_from_logits",
    # from hidden states: the logits never exist as a whole
    "linear_logprob",
    "linear_cross_entropy",
    "linear_ppo_loss",
    "linear_kl",
    # Kullback-Leibler
    "kl_estimate",
    "full_kl",
    # advantages
    "gae",
    "whiten",
    # losses from log-probs
    "ppo_loss",
    "grpo_loss",
    "dpo_loss",
    # sampling
    "sample",
]
