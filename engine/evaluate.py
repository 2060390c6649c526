"""How good a checkpoint is: perplexity, reward accuracy, and paired win rates, always on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from twinhead.engine import losses, ranks
from twinhead.engine.batch import Example, Rollout, TokenSequence, cumulative, micro_batches, pack
from twinhead.engine.data import Prompt
from twinhead.engine.experience import Batch
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.ranks import Spread, alone
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import RewardFunction, model_scores, score_with
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit

MICRO = 16384  # tokens of one forward pass


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How surprised a policy is by held-out text."""

    loss: float  # nats per target token, weighted by tokens over the whole set
    ppl: float  # exp(loss)
    num_targets: int


@torch.no_grad()
def perplexity(
    policy: Policy, examples: Sequence[TokenSequence], tokens_per_micro: int = MICRO, spread: Spread = alone
) -> Perplexity:
    """The mean negative log-likelihood of every target token of a held-out set, and its exponential.

    spread: ranks.spread where all ranks call it together, each for its part of the examples.
    """
    check_fit(policy.model, examples)

    def measured(rows: range) -> tuple[float, int]:
        total, count = 0.0, 0
        part = examples[rows.start : rows.stop]
        for micro in micro_batches(part, [len(e.prompt) + len(e.response) for e in part], tokens_per_micro):
            packed = pack(micro, policy.device)
            total -= policy(packed, entropy=False).logprobs.double().sum().item()
            count += packed.num_targets
        return total, count

    total, count = map(sum, zip(*spread(measured, len(examples)), strict=True))
    if count == 0:
        raise ValueError("perplexity: expected at least one target token, got none")
    loss = total / count
    return Perplexity(loss, math.exp(min(loss, 700.0)), count)


class Ranked(Protocol):
    """Several responses to one prompt, ranked (twinhead.engine.data.Comparison)."""

    @property
    def examples(self) -> list[Example]: ...

    @property
    def ranks(self) -> list[int]: ...

    @property
    def margin(self) -> float: ...

    @property
    def labeler(self) -> str: ...


@dataclass(frozen=True, slots=True)
class RewardAccuracy:
    """How well a reward model orders held-out responses."""

    micro: float  # correct pairs / all decided pairs, equal scores count 1/2
    macro: float  # mean over prompts of their share of correct pairs
    loss: float  # mean over prompts of the K-wise loss


@torch.no_grad()
def reward_accuracy(
    model: RewardModel, comparisons: Sequence[Ranked], tokens_per_micro: int = MICRO, spread: Spread = alone
) -> RewardAccuracy:
    """How often the reward model orders a held-out pair as its ranking does. spread: as of perplexity()."""
    check_fit(model.model, [example for comparison in comparisons for example in comparison.examples])

    def measured(rows: range) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        part = comparisons[rows.start : rows.stop]
        lengths = [sum(len(e.prompt) + len(e.response) for e in c.examples) for c in part]
        for micro in micro_batches(part, lengths, tokens_per_micro):
            scores, ranks, cu_groups, margin = score_groups(model, micro)
            correct, pairs = losses.pair_accuracy(scores, ranks, cu_groups)
            found.append((correct, pairs, losses.kwise(scores, ranks, cu_groups, margin)))
        return found

    every = [micro for part in spread(measured, len(comparisons)) for micro in part]
    correct, pairs, loss = (torch.cat(column) for column in zip(*every, strict=True))  # (G,) each
    right, decided = correct.double(), pairs > 0
    return RewardAccuracy(
        micro=(right.sum() / pairs.sum()).item(),
        macro=(right[decided] / pairs[decided]).mean().item(),
        loss=loss[decided].double().mean().item(),
    )


def accuracies(
    model: RewardModel, comparisons: Sequence[Ranked], tokens_per_micro: int = MICRO, spread: Spread = alone
) -> dict[str, float]:
    """reward_accuracy() by the names of its fields, and as `labeler/<id>` its micro accuracy on those of a labeler."""
    found = asdict(reward_accuracy(model, comparisons, tokens_per_micro, spread))
    for name in sorted({c.labeler for c in comparisons} - {""}):
        theirs = [c for c in comparisons if c.labeler == name]
        found[f"labeler/{name}"] = reward_accuracy(model, theirs, tokens_per_micro, spread).micro
    return found


def score_groups(model: RewardModel, comparisons: Sequence[Ranked]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw scores (S,), ranks (S,), cu_groups (G+1,), margins (G,): one forward for each response, none for a pair."""
    packed = pack([e for c in comparisons for e in c.examples], model.device)
    ranks = torch.tensor([r for c in comparisons for r in c.ranks], device=model.device)
    cu_groups = cumulative([len(c.examples) for c in comparisons]).to(model.device)
    margin = torch.tensor([c.margin for c in comparisons], dtype=torch.float32, device=model.device)
    return model.raw(packed), ranks, cu_groups, margin


@dataclass(frozen=True, slots=True)
class WinRate:
    """A paired comparison with its 95% interval."""

    rate: float
    low: float  # Wilson 95% interval
    high: float
    num: int


def win_rate(ours: Tensor | Sequence[float], theirs: Tensor | Sequence[float]) -> WinRate:
    """The share of prompts on which our score is higher; ties count 1/2 (scores are paired by prompt).

    The interval is Wilson's (1927) at 95%, with ties as half successes.
    """
    a, b = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"win_rate: expected two equally long, non-empty lists, got {a.numel()} and {b.numel()}")
    n, p = a.numel(), ((a > b).double() + 0.5 * (a == b).double()).mean().item()
    z = 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return WinRate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def distinct(rollouts: Sequence[Rollout]) -> float:
    """The share of responses that no other response repeats word for word: collapse shows here first."""
    return len({tuple(r.response) for r in rollouts}) / max(len(rollouts), 1)


class Contest:
    """The same prompts and seed for every checkpoint, each answer paired with the baseline's to the same prompt."""

    def __init__(
        self, baseline: Policy, text: Text, asked: Sequence[Prompt], judge: RewardFunction, sampling: Sampling,
        reward_model: RewardModel | None = None,
    ) -> None:  # fmt: skip
        self.baseline, self.text, self.asked, self.judge = baseline, text, asked, judge
        self.sampling, self.reward_model = sampling, reward_model
        self.theirs = self._scores(self.answers(baseline, replace(sampling, seed=sampling.seed + 1)))

    def answers(self, policy: Policy, sampling: Sampling | None = None) -> list[Rollout]:
        """One answer to every prompt."""
        return generate(policy, [p.tokens for p in self.asked], sampling or self.sampling)

    def __call__(self, policy: Policy) -> dict[str, float]:
        """win_rate against the baseline with its 95% interval, gold (the judge), reward, kl in nats per sequence to the
        baseline, distinct, eos_rate, length."""
        rollouts = self.answers(policy)
        scores = self._scores(rollouts)
        won = win_rate(scores, self.theirs)
        found = {
            "win_rate": won.rate,
            "win_rate_low": won.low,
            "win_rate_high": won.high,
            "gold": scores.double().mean().item(),
            "kl": self._kl(rollouts),
            "distinct": distinct(rollouts),
            "eos_rate": sum(r.finished for r in rollouts) / len(rollouts),
            "length": sum(len(r.response) for r in rollouts) / len(rollouts),
        }
        if self.reward_model is not None:
            found["reward"] = model_scores(self.reward_model, rollouts, MICRO).double().mean().item()
        return found

    def _scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        return score_with(self.judge, rollouts, [self.text.decode(r.response) for r in rollouts], self.asked)

    @torch.no_grad()
    def _kl(self, rollouts: Sequence[Rollout]) -> float:
        total = 0.0
        for micro in micro_batches(rollouts, [len(r.prompt) + len(r.response) for r in rollouts], MICRO):
            packed = pack(micro, self.baseline.device)
            temperature = self.sampling.temperature or 1.0  # greedy log-probs are those of the untempered distribution
            theirs = self.baseline(packed, temperature=temperature, entropy=False).logprobs
            total += (torch.cat([r.logprobs for r in micro]) - theirs).double().sum().item()
        return total / len(rollouts)


def describe(rollouts: Sequence[Rollout], sources: dict[str, Tensor]) -> dict[str, float]:
    """Statistics of one step's responses, and the mean score of every reward source."""
    lengths = torch.tensor([float(len(r.response)) for r in rollouts])
    return {
        "rollout/length_mean": lengths.mean().item(),
        "rollout/eos_rate": sum(r.finished for r in rollouts) / len(rollouts),
        "rollout/distinct": distinct(rollouts),
        **{f"score/{name}": scores.double().mean().item() for name, scores in sources.items()},
    }


def objective(batch: Batch, kl: Tensor, scores: Tensor, non_score: float) -> dict[str, float]:
    """Statistics of what PPO maximises (spec 3.8). kl: (S,) nats per sequence, k1 whatever the penalty is; scores: (S,)
    after the EOS rule; non_score: the mean sum of a sequence's other rewards."""
    every = [e for minibatch in batch for e in minibatch]
    values, returns, advantages = (
        ranks.cat([getattr(e, name) for e in every]).double() for name in ("values", "returns", "advantages")
    )
    return {
        "objective/kl": kl.double().mean().item(),
        "objective/kl_token": kl.double().sum().item() / len(values),
        "objective/score": scores.double().mean().item(),
        "objective/score_std": scores.double().std(correction=0).item(),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": scores.double().mean().item() + non_score,
        "value/explained_variance": losses.explained_variance(values, returns).item(),
        "value/mean": values.mean().item(),
        "returns/mean": returns.mean().item(),
        "returns/std": returns.std(correction=0).item(),
        "adv/mean": advantages.mean().item(),
        "adv/abs_mean": advantages.abs().mean().item(),
    }
