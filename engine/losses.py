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
from twinhead.kernels import gae, kl_estimate

# -- demonstrations ----------------------------------------------------------------------------------------------------


def sequence_means(per_token: Tensor, cu_rows: Tensor) -> Tensor:
    """(S,): the mean of (R,) over the tokens of every sequence, 0 for one that has none."""
    return segment_sum(per_token, cu_rows) / cu_rows.diff().clamp(min=1)


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


def plackett_luce(scores: Tensor, ranks: Tensor, cu_groups: Tensor, margin: Tensor | None = None) -> Tensor:
    """(G,): -log P(ranking), by the number of choices that it is made of; 0 where there are none.

    Plackett 1975; Luce 1959; as a loss ListMLE (Xia et al. 2008): the best response is chosen from all, the next from
    the rest, and so on. Tied responses are not chosen from each other. Two responses make it bradley_terry().
    scores, ranks: (S,); margin: (G,), by how much a choice must lead the rest.
    """
    group = segment_ids(cu_groups)
    worse = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])
    rivals = scores[None, :] if margin is None else scores[None, :] + margin[group][:, None]
    rest = torch.cat([scores[:, None], rivals.expand_as(worse).masked_fill(~worse, -math.inf)], 1)
    zeros = scores.new_zeros(len(cu_groups) - 1)
    total = zeros.index_add(0, group, rest.logsumexp(1) - scores)
    return total / zeros.index_add(0, group, worse.any(1).to(scores.dtype)).clamp(min=1)


def centring(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> Tensor:
    """(G,): the mean of (winner + loser)^2 over each prompt's decided pairs, which pulls scores towards 0.

    Eisenstein et al. 2023, section 2: rankings alone leave it open where a prompt's scores lie. scores, ranks: (S,).
    """
    winner, loser, group = pairs(ranks, cu_groups)
    total = scores.new_zeros(len(cu_groups) - 1).index_add(0, group, (scores[winner] + scores[loser]).square())
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


def token_rewards(kl: Tensor, scores: Tensor, cu_rows: Tensor, kl_coef: float) -> Tensor:
    """(R,): -kl_coef * kl at every token, plus the sequence's score at its last one.

    Ziegler et al. 2019, equation 2, where kl (R,) is log pi - log pi_ref. The score of an empty response has no token
    to land on and is dropped.
    """
    rewards = -kl_coef * kl
    some = cu_rows.diff() > 0
    return rewards.index_add(0, cu_rows[1:][some].long() - 1, scores[some].to(rewards.dtype))


def bandit(rewards: Tensor, values: Tensor, cu_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) advantages and (R,) returns of whole responses: the response is one action and the prompt the only state.

    Every token's return is the sum of the response's rewards, and its advantage that less the value of the state before
    the first token. rewards, values: (R,). Where all reward comes at the end this is GAE with gamma = lam = 1 and that
    one value everywhere.
    """
    owner = segment_ids(cu_rows)
    returns = segment_sum(rewards, cu_rows)[owner]
    return returns - values[cu_rows[:-1].long()[owner]], returns


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


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(R,) half the larger squared error, of the value or of the value kept within `clip` of the old one; (R,) bool, is
    it the latter? (Schulman et al. 2017, as openai/baselines' ppo2 and Ziegler et al. 2019 have it.)"""
    error = (values - returns).square()
    # clamped to two borders, not moved by a clamped step: the step's rounding would look like a clip
    clipped_error = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(error, clipped_error) / 2, clipped_error > error


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
        centred = centred / (grouped.std(1, keepdim=True) + eps)
    elif kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif kind != "dr_grpo":
        raise ValueError(f"kind: expected 'grpo', 'dr_grpo' or 'rloo', got {kind!r}")
    flat = (grouped == grouped[:, :1]).all(1, keepdim=True)  # their mean is rounded, so they may differ from it
    return centred.masked_fill(flat, 0.0).reshape(-1)


def process_advantages(
    rewards: Tensor, cu_rows: Tensor, group_size: int, *, kind: str = "grpo", eps: float = 1e-4
) -> Tensor:
    """(R,): the sum of the relative rewards of all steps that end at a token or after it (Shao et al. 2024, section
    4.1.3: process supervision).

    rewards: (R,), NaN at tokens that end no step. A step is compared with all steps of its group of `group_size`
    responses, or for "rloo" with those of the other responses; one step per response makes it group_advantages().
    """
    steps = ~rewards.isnan()
    worth, response = rewards[steps], segment_ids(cu_rows)[steps]
    num_responses, ones = len(cu_rows) - 1, torch.ones_like(worth)
    group, num_groups = response // group_size, num_responses // group_size

    def total(of: Tensor, owner: Tensor, num: int) -> Tensor:
        return of.new_zeros(num).index_add(0, owner, of)[owner]

    sums, counts = (total(x, group, num_groups) for x in (worth, ones))
    if kind == "rloo":
        sums, counts = (x - total(y, response, num_responses) for x, y in ((sums, worth), (counts, ones)))
    elif kind not in ("grpo", "dr_grpo"):
        raise ValueError(f"kind: expected 'grpo', 'dr_grpo' or 'rloo', got {kind!r}")
    centred = worth - sums / counts.clamp(min=1)
    if kind == "grpo":
        variance = total(centred.square(), group, num_groups) / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    low, high = (
        worth.new_zeros(num_groups).scatter_reduce(0, group, worth, edge, include_self=False)[group]
        for edge in ("amin", "amax")
    )
    centred = centred.masked_fill(low == high, 0.0)
    relative = torch.zeros_like(rewards).masked_scatter(steps, centred)
    return gae(relative, torch.zeros_like(relative), gamma=1.0, lam=1.0, cu_seqlens=cu_rows)[1]


def response_ratio(logprobs: Tensor, old_logprobs: Tensor, cu_rows: Tensor) -> Tensor:
    """(R,): log-probs to which the ratio of every token is exp(mean of log pi - log pi_old), that of its response.

    GSPO in its token form (Zheng et al. 2025, equations 7 and 14): the ratio is the same for all tokens of a response,
    and its gradient passes through each token's own log-prob. Constants: no gradient passes through the result.
    """
    logprobs = logprobs.detach()
    means = segment_sum(logprobs - old_logprobs, cu_rows) / cu_rows.diff().clamp(min=1)
    return logprobs - means[segment_ids(cu_rows)]


def overlong(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """(S,) from 0 to -1: what is within `buffer` tokens of the limit is worth less, in proportion (soft over-long
    punishment; Yu et al. 2025, equation 13)."""
    return -((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, cu_rows: Tensor) -> Tensor:
    """(S,): the k1 estimate of KL(pi || pi_ref) of every sequence, in nats."""
    return segment_sum(kl_estimate(logprobs, ref_logprobs, kind="k1"), cu_rows)


# -- unpaired answers --------------------------------------------------------------------------------------------------


def kl_baseline(logratios: Tensor) -> Tensor:
    """0-dim: z0 = max(0, mean of log pi - log pi_ref) of answers to other prompts; no gradient passes.

    Ethayarajh et al. 2024, equation 7: a biased estimate of KL(pi || pi_ref), for which nothing has to be sampled.
    """
    return logratios.detach().mean().clamp(min=0)


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
