"""Measures: perplexity as transformers counts it, ordered pairs, win rates with a published interval, and contests."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import EOS, classifier, ids, model, tokenizer
from twinhead.engine.batch import Example, Packed, Rollout, pack
from twinhead.engine.data import Comparison, Prompt
from twinhead.engine.evaluate import Contest, describe, distinct, objective, perplexity, reward_accuracy, win_rate
from twinhead.engine.experience import Experience
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

EXAMPLES = [Example(p, r) for p, r in zip(ids((3, 1, 7, 2)), ids((4, 9, 2, 5), seed=1), strict=True)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(model())


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_micro", [1, 17, 1000])
def test_perplexity_is_the_loss_of_transformers_weighted_by_tokens(policy: Policy, tokens_per_micro: int) -> None:
    holes = Example(EXAMPLES[3].prompt, EXAMPLES[3].response, [True, False, True, True, False])
    total, count = 0.0, 0
    for example in [*EXAMPLES[:3], holes]:
        learn = torch.tensor([False] * len(example.prompt) + (example.learn or [True] * len(example.response)))
        tokens = torch.tensor(example.prompt + example.response)
        labels = tokens.where(learn, -100)
        with torch.no_grad():
            loss = model()(input_ids=tokens[None], labels=labels[None]).loss.item()
        total += loss * learn.sum().item()
        count += learn.sum().item()
    found = perplexity(policy, [*EXAMPLES[:3], holes], tokens_per_micro)
    assert found.num_targets == count == 18
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.ppl == pytest.approx(exp(total / count), rel=1e-4)


def test_perplexity_needs_something_to_predict(policy: Policy) -> None:
    for nothing in ([], [Example([5], [])], [Example([5], [6], [False])]):
        with pytest.raises(ValueError, match="perplexity: expected at least one target token, got none"):
            perplexity(policy, nothing)


# -- reward accuracy ---------------------------------------------------------------------------------------------------


class LastToken(RewardModel):
    """Scores a sequence by the number of its last token."""

    def raw(self, packed: Packed) -> Tensor:
        return packed.tokens[packed.last].float()


def compared(scores: list[int], ranks: list[int], margin: float = 0.0) -> Comparison:
    return Comparison([Example([50], [score]) for score in scores], ranks, margin)


def test_reward_accuracy_counts_ties_by_hand() -> None:
    comparisons = [
        compared([9, 7], [0, 1]),  # right
        compared([9, 7], [1, 0]),  # wrong
        compared([8, 8], [0, 1]),  # the model cannot tell: one half
        compared([5, 5, 4], [0, 0, 1]),  # the labeler cannot tell the first two: 2 pairs, both right
        compared([3, 2, 2, 1], [0, 1, 2, 3], 0.5),  # 6 pairs: 5 right, 1 half
    ]
    found = reward_accuracy(LastToken(classifier()), comparisons)
    assert found.micro == pytest.approx((1 + 0 + 0.5 + 2 + 5.5) / (1 + 1 + 1 + 2 + 6))
    assert found.macro == pytest.approx((1 + 0 + 0.5 + 1 + 5.5 / 6) / 5)

    def loss(lead: float) -> float:
        return log(1 + exp(-lead))

    margined = [loss(lead - 0.5) for lead in (1, 1, 2, 0, 1, 1)]
    losses = [loss(2), loss(-2), loss(0), loss(1), sum(margined) / 6]
    assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-5)


@pytest.mark.parametrize("tokens_per_micro", [1, 30])
def test_reward_accuracy_does_not_depend_on_micro_batches(tokens_per_micro: int) -> None:
    answers = iter(ids((3, 9, 2, 5, 7, 1, 4), seed=1))
    ranked = ([0, 1], [2, 0, 1], [1, 0])
    groups = [Comparison([Example([5, 6], next(answers)) for _ in ranks], ranks) for ranks in ranked]
    reward = RewardModel(classifier())
    whole, cut = reward_accuracy(reward, groups), reward_accuracy(reward, groups, tokens_per_micro)
    assert (cut.micro, cut.macro) == (whole.micro, whole.macro)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    reward.mean = 100.0  # shifts every score alike
    assert reward_accuracy(reward, groups).loss == pytest.approx(whole.loss, rel=1e-5)


# -- win rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "num", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_one_published(wins: int, num: int, low: float, high: float) -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 1998, table I."""
    found = win_rate([1.0] * wins + [0.0] * (num - wins), [0.5] * num)
    assert (found.rate, found.num) == (pytest.approx(wins / num), num)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    lost = win_rate([0.5] * num, [1.0] * wins + [0.0] * (num - wins))
    assert (1 - lost.high, 1 - lost.low) == (pytest.approx(found.low), pytest.approx(found.high))


def test_a_tie_is_half_a_win() -> None:
    found = win_rate(torch.tensor([2.0, 1.0, 1.0, 0.0]), [1.0, 1.0, 1.0, 1.0])
    assert found.rate == 0.5
    assert (found.low, found.high) == (pytest.approx(0.1500, abs=5e-5), pytest.approx(0.8500, abs=5e-5))
    assert win_rate([1.0, 1.0], [1.0, 0.0]).rate == 0.75
    assert win_rate([3.0] * 10, [1.0] * 10).high == pytest.approx(1.0)


def test_win_rate_needs_pairs() -> None:
    for ours, theirs in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match=f"two equally long, non-empty lists, got {len(ours)} and {len(theirs)}"):
            win_rate(ours, theirs)


# -- rollouts ----------------------------------------------------------------------------------------------------------


def answered(*responses: list[int]) -> list[Rollout]:
    return [Rollout([4], r, torch.zeros(len(r)), None, r[-1:] == [EOS]) for r in responses]


def test_distinct_is_the_share_of_different_responses() -> None:
    assert distinct(answered([5, 6], [5, 6], [6, 5], [5])) == 0.75
    assert distinct(answered([5], [5], [5], [5])) == 0.25
    assert distinct(answered([5])) == 1.0
    assert distinct([]) == 0.0


def test_rollouts_are_described() -> None:
    found = describe(answered([5, EOS], [5, EOS], [6, 7, 8, 9]), {"gold": torch.tensor([1.0, 2.0, 6.0])})
    lengths = {"rollout/length_mean": 8 / 3, "rollout/eos_rate": 2 / 3, "rollout/distinct": 2 / 3}
    assert found == pytest.approx(lengths | {"score/gold": 3.0})


def test_the_objective_is_described() -> None:
    def experience(values: list[float], returns: list[float], advantages: list[float]) -> Experience:
        packed = pack([Example([5], [6] * len(values))])
        tensors = (torch.tensor(x) for x in (values, advantages, returns))
        return Experience(packed, *[torch.zeros(len(values))] * 2, *tensors)

    batch = [[experience([1.0, 2.0], [2.0, 2.0], [1.0, -1.0])], [experience([3.0, 4.0], [4.0, 6.0], [0.5, -2.5])]]
    found = objective(batch, kl=torch.tensor([2.0, 6.0]), scores=torch.tensor([1.0, 2.0]), non_score=-0.4)
    expected = {
        "objective/kl": 4.0,
        "objective/kl_token": 2.0,
        "objective/score": 1.5,
        "objective/score_std": 0.5,
        "objective/non_score_reward": -0.4,
        "objective/rlhf_reward": 1.1,
        "value/explained_variance": 1 - 0.5 / 2.75,
        "value/mean": 2.5,
        "returns/mean": 3.5,
        "returns/std": 2.75**0.5,
        "adv/mean": -0.5,
        "adv/abs_mean": 1.25,
    }
    assert found == pytest.approx(expected)


# -- contests ----------------------------------------------------------------------------------------------------------

ASKED = [Prompt(tokens, "", {"wanted": i}) for i, tokens in enumerate(ids((3, 1, 4, 2, 5, 2)))]
STOPS = Sampling(max_new_tokens=10, stop=tuple(range(20, 30)), seed=3)


def early(completions: list[str], wanted: list[int], **_: Any) -> list[float]:
    """Prefers small words, and is told the columns of the prompt."""
    assert wanted == list(range(len(ASKED)))
    return [-sum(int(word[1:]) for word in c.split() if word[1:].isdigit()) / 100 for c in completions]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_a_contest_pairs_every_answer_with_the_baselines(temperature: float, policy: Policy) -> None:
    sampling = replace(STOPS, temperature=temperature)
    text, reward = Text(tokenizer()), RewardModel(classifier())
    reward.mean = 0.5
    challenger = Policy(model(seed=1), "none")
    found = Contest(policy, text, ASKED, early, sampling, reward)(challenger)

    prompts = [p.tokens for p in ASKED]
    ours = generate(challenger, prompts, sampling)
    theirs = generate(policy, prompts, replace(sampling, seed=4))
    judged = [early([text.decode(r.response) for r in side], list(range(len(ASKED)))) for side in (ours, theirs)]
    won = win_rate(*judged)
    assert found["win_rate"] == won.rate
    assert (found["win_rate_low"], found["win_rate_high"]) == (won.low, won.high)
    assert found["gold"] == pytest.approx(sum(judged[0]) / 6, rel=1e-5)
    packed = pack(ours)
    with torch.no_grad():
        scored = [p(packed, temperature=temperature or 1.0).logprobs for p in (challenger, policy)]
        rewards = reward(packed)
    assert found["kl"] == pytest.approx((scored[0] - scored[1]).sum().item() / 6, rel=1e-4, abs=1e-5)
    assert found["kl"] > 1
    assert found["reward"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert found["distinct"] == distinct(ours)
    assert found["eos_rate"] == pytest.approx(sum(r.finished for r in ours) / 6)
    assert found["length"] == pytest.approx(sum(len(r.response) for r in ours) / 6)


def test_a_baseline_against_itself_has_moved_nowhere(policy: Policy) -> None:
    contest = Contest(policy, Text(tokenizer()), ASKED, early, STOPS)
    found = contest(policy)
    assert found["kl"] == pytest.approx(0.0, abs=1e-5)
    assert "reward" not in found
    assert contest(policy) == found
    assert [r.response for r in contest.answers(policy)] == [
        r.response for r in generate(policy, [p.tokens for p in ASKED], STOPS)
    ]
