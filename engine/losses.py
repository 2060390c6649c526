"""Objectives and rewards as functions of ragged tensors, none of which reduces over the batch.

The loop owns the one global denominator of an optimizer step, so micro-batching cannot change the gradient.
R tokens in S sequences (`cu_rows`), S responses in G prompts (`cu_groups`), P preference pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twinhead.engine.batch import segment_ids, segment_sum
from twinhead.kernels import kl_estimate

# -- reward model ------------------------------------------------------------------------------------------------------


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """(P,): -log sigmoid(chosen - rejected - margin), finite for any difference (Ouyang et al. 2022, equation 1)."""
    return -F.logsigmoid(chosen - rejected - margin)


def pairs(ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) winner, (P,) loser, (P,) group: every pair of one prompt's responses that its ranking decides.

    ranks: (S,), smaller is better; equal ranks are ties and make no pair.
    """
    group = segment_ids(cu_groups)
    better = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])
    winner, loser = better.nonzero(as_tuple=True)
    return winner, loser, group[winner]


def num_pairs(ranks: Tensor, cu_groups: Tensor) -> Tensor:
    """(G,) int64: the decided pairs of every prompt; 0 where all responses are tied."""
    _, _, group = pairs(ranks, cu_groups)
    return torch.bincount(group, minlength=len(cu_groups) - 1)


def kwise(scores: Tensor, ranks: Tensor, cu_groups: Tensor, margin: Tensor | None = None) -> Tensor:
    """(G,): the mean of bradley_terry over each prompt's decided pairs, 0 where there are none (Ouyang et al. 2022).

    scores, ranks: (S,); margin: (G,), by how much a winner must lead.
    """
    winner, loser, group = pairs(ranks, cu_groups)
    loss = bradley_terry(scores[winner], scores[loser], 0.0 if margin is None else margin[group])
    total = scores.new_zeros(len(cu_groups) - 1).index_add(0, group, loss)
    return total / num_pairs(ranks, cu_groups).clamp(min=1)


def pair_accuracy(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) correctly ordered pairs (equal scores count 1/2) and (G,) decided pairs, of every prompt."""
    winner, loser, group = pairs(ranks, cu_groups)
    lead = scores[winner] - scores[loser]
    correct = (lead > 0).to(scores.dtype) + 0.5 * (lead == 0)
    total = scores.new_zeros(len(cu_groups) - 1).index_add(0, group, correct)
    return total, torch.bincount(group, minlength=len(cu_groups) - 1)


# -- rewards of a rollout ----------------------------------------------------------------------------------------------


def eos_rule(
    scores: Tensor, finished: Tensor, *, subtract: float | None = None, replace: float | None = None
) -> Tensor:
    """(S,): what a response that never stopped is worth: its score less a penalty, or a constant instead of it."""
    if subtract is not None and replace is not None:
        raise ValueError("missing EOS: expected a penalty to subtract or a score to replace with, got both")
    if subtract is not None:
        return torch.where(finished, scores, scores - subtract)
    if replace is not None:
        return torch.where(finished, scores, scores.new_tensor(replace))
    return scores


def token_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, cu_rows: Tensor, kl_coef: float) -> Tensor:
    """(R,): -kl_coef * (log pi - log pi_ref) at every token, plus the sequence's score at its last one.

    Ziegler et al. 2019, equation 2. The score of an empty response has no token to land on and is dropped.
    """
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, kind="k1")
    some = cu_rows.diff() > 0
    return rewards.index_add(0, cu_rows[1:][some].long() - 1, scores[some].to(rewards.dtype))


class AdaptiveKL:
    """Proportional control of the KL coefficient towards `target_nats` per sequence (Ziegler et al. 2019, section 2.2).
    Without a target the coefficient is fixed.

    The KL fed to update() is the mean over sequences of the sum of k1 over their tokens, in nats.
    """

    def __init__(self, init: float, target_nats: float | None, horizon: int) -> None:
        if horizon <= 0 or (target_nats is not None and target_nats <= 0):
            raise ValueError(f"adaptive KL: expected target and horizon above 0, got {target_nats} and {horizon}")
        self.coef, self.target_nats, self.horizon = init, target_nats, horizon

    def update(self, kl_nats: float, n: int) -> float:
        """Move the coefficient after a batch of n sequences; a non-finite KL moves nothing."""
        if self.target_nats is None:
            return self.coef
        if n >= 5 * self.horizon:
            raise ValueError(f"adaptive KL: expected fewer than 5 * horizon = {5 * self.horizon} sequences, got {n}")
        if math.isfinite(kl_nats):
            error = min(max(kl_nats / self.target_nats - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * n / self.horizon
        return self.coef


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """0-dim: 1 - Var(returns - values) / Var(returns); NaN where the returns hardly vary."""
    variance = returns.var(correction=0)
    explained = 1.0 - (returns - values).var(correction=0) / variance
    return torch.where(variance < 1e-8, torch.full_like(explained, float("nan")), explained)


def ratio_gap(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """0-dim: max |pi / pi_old - 1|; above rounding before the first update, sampler and trainer disagree."""
    if logprobs.numel() == 0:
        return logprobs.new_zeros(())
    return torch.expm1(logprobs.detach() - old_logprobs).abs().max()


# -- groups of responses to one prompt ---------------------------------------------------------------------------------


def group_advantages(scores: Tensor, group_size: int, *, kind: str = "grpo", eps: float = 1e-4) -> Tensor:
    """(S,): each score against its group of `group_size` neighbours; 0 where a group does not vary.

    "grpo": (r - mean) / (std + eps), ddof 1 (Shao et al. 2024); "dr_grpo": r - mean (Liu et al. 2025);
    "rloo": r - mean of the others (Ahmadian et al. 2024). A group of one has advantage 0.
    """
    if group_size < 1 or scores.numel() % group_size:
        raise ValueError(f"group_size: expected a divisor of {scores.numel()} scores, got {group_size}")
    if group_size == 1:
        return torch.zeros_like(scores)
    grouped = scores.view(-1, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    if kind == "grpo":
        std = grouped.std(1, keepdim=True)
        centred = torch.where(std > 0, centred / (std + eps), torch.zeros_like(centred))
    elif kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif kind != "dr_grpo":
        raise ValueError(f"kind: expected 'grpo', 'dr_grpo' or 'rloo', got {kind!r}")
    return centred.reshape(-1)


def kto(
    logratios: Tensor,
    labels: Tensor,
    z0: Tensor | float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """(S,): lambda_D (1 - sigmoid(beta (l - z0))) for good responses, lambda_U (1 - sigmoid(beta (z0 - l))) for bad.

    Ethayarajh et al. 2024, equation 8. logratios: (S,) sums of log pi - log pi_ref; labels: (S,) bool.
    """
    good = desirable_weight * (1.0 - torch.sigmoid(beta * (logratios - z0)))
    bad = undesirable_weight * (1.0 - torch.sigmoid(beta * (z0 - logratios)))
    return torch.where(labels.bool(), good, bad)


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, cu_rows: Tensor) -> Tensor:
    """(S,): the k1 estimate of KL(pi || pi_ref) of every sequence, in nats."""
    return segment_sum(kl_estimate(logprobs, ref_logprobs, kind="k1"), cu_rows)
