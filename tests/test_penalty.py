"""The penalty on leaving the reference and the rewards of tokens, against plain autograd in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from tests.models import ids, model
from twinhead.engine import losses, penalty, ppo
from twinhead.engine.batch import Rollout, cumulative
from twinhead.engine.experience import Experience
from twinhead.engine.penalty import Penalty
from twinhead.engine.policy import Policy
from twinhead.kernels import gae

Box = dict[str, str]
KINDS = ("k1", "k2", "k3", "full")
COEF = 0.3


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


@pytest.fixture(scope="module")
def pair() -> tuple[Policy, Policy]:
    """A policy and a narrower reference with the same words, in float64."""
    reference = Policy(model("cohere2", seed=1, hidden_size=16).double(), "none")
    return Policy(model("granite").double()), reference.requires_grad_(False)


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    noise = torch.Generator().manual_seed(0)
    return [
        Rollout(
            tokens[:3], tokens[3:], *(torch.randn(len(tokens) - 3, generator=noise).double() for _ in range(2)), True
        )
        for tokens in ids((8, 5, 9, 4))
    ]


def config(**changes: Any) -> ppo.Config:
    chosen = {"temperature": 0.7, "minibatches": 1, "device": "cpu"} | changes
    return ppo.Config(model="m", prompts="p", steps=1, **chosen)


def distributions(policy: Policy, rollouts: list[Rollout], temperature: float) -> list[Tensor]:
    """(len(response), V) log-probs of every rollout, by transformers' own forward."""
    stock = copy.deepcopy(policy.model)
    stock.set_attn_implementation("sdpa")
    found = []
    for r in rollouts:
        logits = stock(input_ids=torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1))
    return found


def nats(kind: str, ours: Tensor, theirs: Tensor, tokens: list[int]) -> Tensor:
    """(len(response),) as the formulas stand in the literature."""
    if kind == "full":
        return (ours.exp() * (ours - theirs)).sum(-1)
    at = torch.arange(len(tokens)), torch.tensor(tokens)
    d = ours[at] - theirs[at]
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_charged(kind: str, pair: tuple[Policy, Policy], rollouts: list[Rollout]) -> None:
    """With gamma = lam = 1 the first return is the sum of a response's rewards."""
    chosen = config(kl_kind=kind, lam=1.0, old_logprobs="recompute", missing_eos_penalty=0.0)
    scores = torch.tensor([1.0, -2.0, 0.5, 0.0])
    batch, measured = ppo.examine(*pair, rollouts, scores, COEF, chosen, 0)
    ours, theirs = (distributions(p, rollouts, 0.7) for p in pair)
    every = [nats(kind, a, b, r.response) for a, b, r in zip(ours, theirs, rollouts, strict=True)]
    expected = {
        tuple(r.response): s.item() - COEF * n.sum().item() for r, s, n in zip(rollouts, scores, every, strict=True)
    }
    for e in batch[0]:
        counts = e.packed.cu_rows.diff().tolist()
        for returns, targets in zip(e.returns.split(counts), e.packed.targets.split(counts), strict=True):
            assert returns[0].item() == pytest.approx(expected[tuple(targets.tolist())], rel=1e-6)
    k1 = [nats("k1", a, b, r.response).sum().item() for a, b, r in zip(ours, theirs, rollouts, strict=True)]
    assert measured["objective/kl"] == pytest.approx(sum(k1) / 4)
    assert measured["objective/non_score_reward"] == pytest.approx(-COEF * sum(n.sum().item() for n in every) / 4)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("tokens_per_micro", [1000, 12])
def test_the_loss_is_charged_with_its_gradient(
    kind: str, tokens_per_micro: int, pair: tuple[Policy, Policy], rollouts: list[Rollout]
) -> None:
    """Zero advantages and value_coef 0 leave the penalty alone: its gradient is plain autograd's."""
    policy, reference = copy.deepcopy(pair[0]), pair[1]
    chosen = config(kl_kind=kind, kl_in="loss", value_coef=0.0, tokens_per_micro=tokens_per_micro)
    batch, measured = ppo.examine(policy, reference, rollouts, torch.zeros(4), COEF, chosen, 0)
    assert measured["objective/non_score_reward"] == 0.0
    num_tokens = sum(e.packed.num_targets for e in batch[0])
    ref_kl = 0.0
    for e in batch[0]:
        still = Experience(
            e.packed,
            e.sampled,
            e.logprobs,
            e.values,
            torch.zeros_like(e.advantages),
            e.returns,
            e.ref_logprobs,
            e.ref_rows,
        )
        charged = Penalty.in_loss(chosen, reference, COEF)
        stats, _ = ppo.learn(policy, still, num_tokens, chosen, charged, warming=False)
        ref_kl += stats["ref_kl"].item()
    twin = copy.deepcopy(policy.model)
    twin.set_attn_implementation("sdpa")
    twin.zero_grad()
    theirs = distributions(reference, rollouts, 0.7)
    total = torch.zeros((), dtype=torch.float64)
    for r, other in zip(rollouts, theirs, strict=True):
        logits = twin(input_ids=torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
        total = total + nats(kind, (logits / 0.7).log_softmax(-1), other.detach(), r.response).sum()
    (COEF * total / num_tokens).backward()
    assert ref_kl == pytest.approx(total.item() / num_tokens, rel=1e-6)
    for (name, p), expected in zip(policy.model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and expected.grad is not None, name
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-6, atol=1e-9)


def test_without_it_the_loss_is_charged_nothing(pair: tuple[Policy, Policy]) -> None:
    assert Penalty.in_loss(config(kl_kind="k3"), pair[1], COEF) is None
    assert Penalty.in_loss(config(kl_kind="k3", kl_in="loss"), pair[1], COEF).reference is None  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"kl_kind": "full"}, {"kl_kind": "k3", "kl_in": "loss"}])
def test_the_controller_is_fed_nats_per_sequence(options: dict[str, Any], box: Box, tmp_path: Path) -> None:
    run = toys.train(
        "ppo", box, tmp_path / "run", kl_target_nats=0.3, kl_horizon=20, learning_rate=5e-3, steps=5, **options
    )
    lines = toys.metrics(run.dir)
    coefs, kls = ([line[name] for line in lines] for name in ("objective/kl_coef", "objective/kl"))
    assert coefs[0] == 0.05 and len(set(coefs)) == 5
    for before, after, kl in zip(coefs, coefs[1:], kls, strict=False):
        assert after == pytest.approx(before * (1 + min(max(kl / 0.3 - 1, -0.2), 0.2) * 8 / 20))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_loss_holds_the_policy_back(kind: str, box: Box, tmp_path: Path) -> None:
    long = {"steps": 8, "rollouts_per_step": 32, "epochs": 3, "learning_rate": 3e-3, "kl_in": "loss", "kl_kind": kind}
    loose, tight = (
        toys.metrics(toys.train("ppo", box, tmp_path / str(c), kl_coef=c, **long).dir)[-1] for c in (0.0, 1.0)
    )
    assert tight["objective/kl"] < 0.5 * loose["objective/kl"]
    assert tight["policy/ref_kl"] > 0.0


def test_k1_in_the_loss_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^kl_in: expected reward, or loss with another kl_kind than k1, whose expected gradient there is",
    ):
        config(kl_in="loss")


@pytest.mark.parametrize(
    ("architecture", "changes", "sentence"),
    [
        ("phi", {}, "expects a language-model head without bias and softcap, got one with a bias"),
        ("gemma2", {}, "expects a language-model head without bias and softcap, got one with a softcap"),
        ("llama", {"vocab_size": 70}, "expects a reference with the policy's 61 rows of vocabulary, got 70"),
    ],
)
def test_heads_without_an_exact_divergence_are_refused(
    architecture: str, changes: dict[str, Any], sentence: str
) -> None:
    policy, reference = Policy(model(), "none"), Policy(model(architecture, **changes), "none")
    with pytest.raises(ValueError, match=f"^kl_kind: full {sentence}$"):
        penalty.check_heads(policy, reference)


def test_a_run_with_such_a_head_is_refused(box: Box, tmp_path: Path) -> None:
    wide = toys.language_model(tmp_path / "wide", vocab_size=20)
    with pytest.raises(ValueError, match=r"^kl_kind: full expects a reference with the policy's 16 rows"):
        toys.train("ppo", box, tmp_path / "run", reference=wide, kl_kind="full")


# -- bandits, and the rewards of tokens --------------------------------------------------------------------------------


def test_a_bandit_is_gae_with_one_value_where_all_reward_comes_last() -> None:
    noise = torch.Generator().manual_seed(0)
    cu_rows = cumulative([4, 0, 1, 3])
    values, rewards = torch.randn(8, generator=noise), torch.zeros(8)
    rewards[[3, 4, 7]] = torch.tensor([1.0, -2.0, 0.5])
    constant = torch.cat([values[0].expand(4), values[4].expand(1), values[5].expand(3)])
    expected = gae(rewards, constant, gamma=1.0, lam=1.0, cu_seqlens=cu_rows)
    for found, wanted in zip(losses.bandit(rewards, values, cu_rows), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_bandit_s_tokens_share_what_the_response_earned() -> None:
    advantages, returns = losses.bandit(
        torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 9.0, 1.0]), cumulative([2, 1])
    )
    assert returns.tolist() == [3.0, 3.0, 4.0]
    assert advantages.tolist() == [2.5, 2.5, 3.0]


@pytest.mark.parametrize("options", [{"gamma": 0.9}, {"bootstrap_truncated": True}])
def test_a_bandit_knows_no_time(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^advantage: expected one of gae, bandit, bandit with gamma=1 and without boot"
    ):
        config(advantage="bandit", **options)


@pytest.mark.parametrize("advantage", ["gae", "bandit"])
def test_a_token_s_own_reward_is_paid_where_it_is_earned(
    advantage: str, pair: tuple[Policy, Policy], rollouts: list[Rollout]
) -> None:
    chosen = config(lam=1.0, kl_coef=0.0, missing_eos_penalty=0.0, advantage=advantage)
    noise = torch.Generator().manual_seed(4)
    steps = torch.randn(sum(len(r.response) for r in rollouts), generator=noise)
    steps[[0, 3, 7]] = float("nan")
    scores = torch.tensor([1.0, -2.0, 0.5, 0.0])
    batch, measured = ppo.examine(*pair, rollouts, scores, 0.0, chosen, 5, steps)
    paid = steps.nan_to_num(0.0).split([len(r.response) for r in rollouts])
    expected = {}
    for r, score, rewards in zip(rollouts, scores, paid, strict=True):
        togo = rewards.flip(0).cumsum(0).flip(0) + score
        expected[tuple(r.response)] = togo if advantage == "gae" else togo[:1].expand(len(togo))
    for e in batch[0]:
        counts = e.packed.cu_rows.diff().tolist()
        for returns, targets in zip(e.returns.split(counts), e.packed.targets.split(counts), strict=True):
            torch.testing.assert_close(returns.float(), expected[tuple(targets.tolist())])
    assert measured["objective/non_score_reward"] == pytest.approx(sum(p.sum().item() for p in paid) / 4)


def test_a_process_function_teaches(box: Box, tmp_path: Path) -> None:
    """Each "good" is worth 1 and each "bad" -1 where it stands; whole responses are worth nothing."""

    def steps(completion_ids: list[list[int]], **_: Any) -> list[list[float | None]]:
        worth = {12: 1.0, 13: -1.0}
        return [[worth.get(token) for token in tokens] for tokens in completion_ids]

    def nothing(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    config = toys.TRAIN["ppo"][0](
        **toys.options("ppo", box) | {
            "output_dir": str(tmp_path / "run"), "reward_functions": (), "steps": 20, "rollouts_per_step": 32,
            "epochs": 3, "learning_rate": 3e-3, "missing_eos_penalty": 0.0, "kl_coef": 0.0,
        }
    )  # fmt: skip
    with toys.one_thread():
        lines = toys.metrics(ppo.train(config, [nothing], process=steps).dir)  # type: ignore[arg-type]
    earned = [line["objective/non_score_reward"] for line in lines]
    assert abs(earned[0]) < 0.4
    assert sum(earned[-3:]) / 3 > 1.0


def test_a_process_function_must_speak_of_every_token(box: Box, tmp_path: Path) -> None:
    file = tmp_path / "short.py"
    file.write_text("def short(completion_ids, **_):\n    return [[1.0] for _ in completion_ids]\n")
    with pytest.raises(
        ValueError, match=r"^reward function short: expected a list of \d step rewards for row 0, one per"
    ):
        toys.train("ppo", box, tmp_path / "run", process_function=f"{file}:short", seed=1)
    with pytest.raises(ValueError, match=r"^process_function: expected a function 'long' in "):
        toys.train("ppo", box, tmp_path / "run", process_function=f"{file}:long")
