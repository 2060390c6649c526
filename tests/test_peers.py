"""Losses, advantages and rewards beside the trainers that others use, on random inputs, gradients included.

Runs where the peers' folder is installed (python -m benchmarks peers). The losses of the DPO family stand beside TRL in
test_dpo.py, those of the GRPO family in test_grpo_stage.py, and the kernels' numbers beside everybody in the benchmark.
Padded rows are what the peers read: B rows of T places, of which the mask keeps the actions.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.peers import TRL, TRL_PPO, TRL_TRAINER, VERL, Peer, load
from twinhead import kernels
from twinhead.engine import losses
from twinhead.engine.batch import cumulative

GROUP, T = 4, 11
LENGTHS = (4, 1, 7, 3, 11, 2, 5, 8)
CU_ROWS = cumulative(LENGTHS)
RAGGED = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
WHOLE = torch.ones(len(LENGTHS), T, dtype=torch.bool)
HOLES = RAGGED & (torch.arange(T) % 3 != 1)


def needs(*peers: Peer) -> pytest.MarkDecorator:
    missing = ", ".join(peer.label for peer in peers if not peer.folder.is_dir())
    return pytest.mark.skipif(bool(missing), reason=f"needs {missing}: python -m benchmarks peers")


def core(name: str) -> Any:
    return VERL.function("verl.trainer.ppo.core_algos", name)


def noise(seed: int, spread: float = 1.0, shape: tuple[int, ...] = (len(LENGTHS), T)) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(seed: int) -> dict[str, Tensor]:
    """What one PPO update reads (B, T): some ratios and some values are far enough from 1 and the old ones to clip."""
    old = -noise(seed).abs()
    values = noise(seed + 2)
    return {
        "logprobs": (old + noise(seed + 1, 0.3)).requires_grad_(), "old_logprobs": old, "advantages": noise(seed + 3),
        "values": (values + noise(seed + 4, 0.3)).requires_grad_(), "old_values": values, "returns": noise(seed + 5),
    }  # fmt: skip


def assert_alike(ours: Tensor, theirs: Tensor, *to: Tensor, rtol: float = 1e-10) -> None:
    """The same number and the same gradients, which are not all 0."""
    assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    gradients = [torch.autograd.grad(loss, to, retain_graph=True) for loss in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        assert_close(mine, other, rtol=rtol, atol=1e-12)


# -- verl --------------------------------------------------------------------------------------------------------------


def actor(low: float, high: float, dual: float) -> Any:
    """The options that verl's losses ask for."""
    chosen = {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high, "global_batch_info": {}}
    config = type("Chosen", (core("ActorConfig"),), {"__init__": lambda self: None, **chosen})
    config.get = lambda self, name, default: dual if name == "clip_ratio_c" else default
    config.__abstractmethods__ = frozenset()
    return config()


@needs(VERL)
@pytest.mark.parametrize("dual_clip", [None, 3.0, 1.05])
@pytest.mark.parametrize("mask", [RAGGED, HOLES, WHOLE], ids=["ragged", "holes", "whole"])
@pytest.mark.parametrize("seed", range(3))
def test_the_ppo_loss_is_verls(seed: int, mask: Tensor, dual_clip: float | None) -> None:
    given, low, high = step(seed), 0.15, 0.25
    policy, measured = core("compute_policy_loss_vanilla")(
        given["old_logprobs"], given["logprobs"], given["advantages"], mask, config=actor(low, high, dual_clip or 1e9)
    )
    value, clipped = core("compute_value_loss")(
        given["values"], given["returns"], given["old_values"], mask.double(), 0.2
    )
    ours, stats = kernels.ppo_loss(
        **given, mask=mask, clip_low=low, clip_high=high, dual_clip=dual_clip, value_clip=0.2, value_coef=0.7
    )
    assert_alike(ours, policy + 0.7 * value, given["logprobs"], given["values"])
    assert stats["clipfrac"].item() == pytest.approx(measured["actor/pg_clipfrac"])
    assert stats["approx_kl"].item() == pytest.approx(measured["actor/ppo_kl"])
    assert stats["vf_clipfrac"].item() == pytest.approx(clipped.item())
    if dual_clip == 1.05:
        assert measured["actor/pg_clipfrac_lower"] > 0


@needs(VERL)
def test_the_value_loss_of_the_stage_is_verls() -> None:
    given = step(7)
    theirs, clipped = core("compute_value_loss")(
        given["values"], given["returns"], given["old_values"], RAGGED.double(), 0.2
    )
    found, is_clipped = losses.value_loss(*(given[name][RAGGED] for name in ("values", "old_values", "returns")), 0.2)
    assert_alike(found.mean(), theirs, given["values"])
    assert is_clipped.double().mean().item() == pytest.approx(clipped.item()) != 0


@needs(VERL)
@pytest.mark.parametrize("mask", [RAGGED, HOLES, WHOLE], ids=["ragged", "holes", "whole"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.3)])
def test_advantages_and_returns_are_verls(gamma: float, lam: float, mask: Tensor) -> None:
    rewards, values = noise(1), noise(2)
    whitened, returns = core("compute_gae_advantage_return")(rewards, values, mask.double(), gamma, lam)
    ours, our_returns = kernels.gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
    assert_close(our_returns[mask], returns[mask], rtol=1e-10, atol=1e-12)
    assert_close(kernels.whiten(ours, mask, unbiased=True)[mask], whitened[mask], rtol=1e-7, atol=1e-7)
    if mask is RAGGED:
        packed, _ = kernels.gae(rewards[mask], values[mask], gamma=gamma, lam=lam, cu_seqlens=CU_ROWS)
        assert_close(packed, ours[mask])


@needs(VERL)
@pytest.mark.parametrize(("ours", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_divergences_are_verls(ours: str, theirs: str) -> None:
    logprobs, ref_logprobs = noise(1, 0.5).requires_grad_(), noise(2, 0.5)
    penalty = core("kl_penalty")(logprobs, ref_logprobs, theirs)
    assert penalty.abs().max() < 10  # where verl clamps
    found = kernels.kl_estimate(logprobs, ref_logprobs, kind=ours)
    assert_close(found, penalty, rtol=1e-12, atol=1e-12)
    assert_alike((found * noise(3)).sum(), (penalty * noise(3)).sum(), logprobs)


@needs(VERL)
def test_the_kl_controller_is_verls() -> None:
    theirs, ours = core("AdaptiveKLController")(0.2, 6.0, 10_000), losses.AdaptiveKL(0.2, 6.0, 10_000)
    for kl in (0.1, 5.9, 6.5, 30.0, -0.3):
        theirs.update(kl, 256)
        assert ours.update(kl, 256) == pytest.approx(theirs.value, rel=1e-14)


ESTIMATORS = {
    "grpo": ("compute_grpo_outcome_advantage", {"epsilon": 1e-6}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {}),
}


@needs(VERL)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_advantages_in_a_group_are_verls(kind: str) -> None:
    scores = noise(5, 2.0, (len(LENGTHS),))
    name, settings = ESTIMATORS[kind]
    rewards = torch.zeros(len(LENGTHS), T, dtype=torch.float64).index_put_(
        (torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1), scores
    )
    groups = np.arange(len(LENGTHS)) // GROUP
    theirs, _ = core(name)(rewards, RAGGED.double(), groups, **settings)
    ours = losses.group_advantages(scores, GROUP, kind=kind, eps=1e-6)
    assert_close(ours[:, None] * RAGGED, theirs, rtol=1e-10, atol=1e-12)


AGGREGATIONS = {"grpo": "seq-mean-token-mean", "dapo": "token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


@needs(VERL)
@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "gspo"])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_losses_of_groups_are_verls(seed: int, loss_type: str, whole: bool) -> None:
    given, (low, high) = step(seed), (0.01, 0.02)
    advantages = noise(seed + 6, 1.0, (len(LENGTHS),))
    function = core("compute_policy_loss_gspo" if whole else "compute_policy_loss_vanilla")
    theirs, measured = function(
        given["old_logprobs"], given["logprobs"], advantages[:, None].expand(-1, T), RAGGED.double(),
        loss_agg_mode=AGGREGATIONS[loss_type], config=actor(low, high, 1e9),
    )  # fmt: skip
    new, old = given["logprobs"][RAGGED], given["old_logprobs"][RAGGED]
    old = losses.response_ratio(new, old, CU_ROWS) if whole else old
    ours, stats = kernels.grpo_loss(
        new, old, advantages, cu_seqlens=CU_ROWS, epsilon_low=low, epsilon_high=high, loss_type=loss_type
    )
    assert_alike(ours, theirs, given["logprobs"], rtol=1e-7)  # verl adds 1e-8 to a row's count
    assert stats["clipfrac"].item() == pytest.approx(measured["actor/pg_clipfrac"]) != 0


# -- TRL 1.12: the last release with a PPO trainer ---------------------------------------------------------------------


class Lines:
    """A passage of PPOTrainer.train, in which TRL's loss stands, run as it is on tensors of ours."""

    def __init__(self) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        self.module = load(TRL_TRAINER, "trl.experimental.ppo.ppo_trainer")
        self.source = inspect.getsource(self.module.PPOTrainer.train).splitlines()

    def run(self, first: str, last: str, **names: Any) -> SimpleNamespace:
        """What the names stand for after the lines from the one that begins with `first` to that with `last`."""
        (start,), (end,) = (
            [i for i, line in enumerate(self.source) if line.strip().startswith(words)] for words in (first, last)
        )
        space = {**vars(self.module), **names}
        exec(textwrap.dedent("\n".join(self.source[start : end + 1])), space)
        return SimpleNamespace(**{name: value for name, value in space.items() if not name.startswith("__")})


@needs(TRL_TRAINER)
@pytest.mark.parametrize("mask", [RAGGED, WHOLE], ids=["ragged", "whole"])
@pytest.mark.parametrize("seed", range(3))
def test_the_ppo_loss_is_that_of_trl(seed: int, mask: Tensor) -> None:
    given = step(seed)
    theirs = Lines().run(
        "vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef",
        new_logprobs=given["logprobs"], mb_logprobs=given["old_logprobs"], mb_advantage=given["advantages"],
        vpred=given["values"], mb_values=given["old_values"], mb_return=given["returns"],
        padding_mask=~mask, padding_mask_p1=~mask, micro_batch_inds=slice(None),  # theirs values one place more
        args=SimpleNamespace(cliprange=0.2, cliprange_value=0.3, vf_coef=0.4),
    )  # fmt: skip
    ours, stats = kernels.ppo_loss(**given, mask=mask, value_clip=0.3, value_coef=0.4)
    assert_alike(ours, theirs.loss, given["logprobs"], given["values"])
    assert_close(stats["pg_loss"], theirs.pg_loss.detach())
    assert_close(stats["vf_loss"], theirs.vf_loss.detach())
    assert stats["vf_clipfrac"].item() == pytest.approx(theirs.vf_clipfrac.item()) != 0


@needs(TRL_TRAINER)
def test_rewards_and_advantages_are_those_of_trl() -> None:
    """On whole rows: on others TRL pays the score one place later, where nothing was said."""
    logprobs, ref_logprobs, values, scores = -noise(1).abs(), -noise(2).abs(), noise(3), noise(4, 1.0, (len(LENGTHS),))
    lengths = torch.full((len(LENGTHS),), T)
    theirs = Lines().run(
        "logr = ref_logprobs - logprobs", "advantages = masked_whiten(",
        logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores, responses=logprobs,
        sequence_lengths=lengths - 1, sequence_lengths_p1=lengths, padding_mask=~WHOLE, padding_mask_p1=~WHOLE,
        args=SimpleNamespace(kl_estimator="k1", kl_coef=0.07, whiten_rewards=False, gamma=0.99, lam=0.95),
    )  # fmt: skip
    cu_rows = cumulative([T] * len(LENGTHS))
    charged = kernels.kl_estimate(logprobs.flatten(), ref_logprobs.flatten())
    rewards = losses.token_rewards(charged, scores, cu_rows, 0.07)
    assert_close(rewards, theirs.rewards.flatten())
    advantages, returns = kernels.gae(rewards, values.flatten(), gamma=0.99, lam=0.95, cu_seqlens=cu_rows)
    assert_close(returns, theirs.returns.flatten())
    assert_close(kernels.whiten(advantages, unbiased=True), theirs.advantages.flatten(), rtol=1e-7, atol=1e-7)
    assert_close(losses.sequence_kl(logprobs.flatten(), ref_logprobs.flatten(), cu_rows), theirs.kl.sum(1))


# -- TRL 1.16 and 0.11.4 -----------------------------------------------------------------------------------------------


@needs(TRL)
@pytest.mark.parametrize("margin", [None, 0.3])
@pytest.mark.parametrize("centring_coef", [None, 0.02])
def test_the_loss_of_a_reward_model_is_that_of_trl(margin: float | None, centring_coef: float | None) -> None:
    num = 6
    scores = noise(1, 2.0, (2 * num,)).requires_grad_()  # chosen, then rejected
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=same, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(center_rewards_coefficient=centring_coef), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {} if margin is None else {"margin": torch.full((num,), margin)}

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=scores[:, None])

    theirs = TRL.function("trl.trainer.reward_trainer", "RewardTrainer").compute_loss(trainer, model, inputs)
    woven = scores.view(2, num).T.flatten()
    ranks, cu_groups = torch.tensor([0, 1] * num), cumulative([2] * num)
    ours = losses.kwise(woven, ranks, cu_groups, None if margin is None else torch.full((num,), margin)).mean()
    ours = ours + (centring_coef or 0.0) * losses.centring(woven, ranks, cu_groups).mean()
    assert_alike(ours, theirs, scores)
    correct, pairs = losses.pair_accuracy(woven.detach(), ranks, cu_groups)
    assert (correct.sum() / pairs.sum()).item() == pytest.approx(trainer._metrics["eval"]["accuracy"][0])


@needs(TRL)
def test_logprobs_and_entropy_are_those_of_trl() -> None:
    logits, index = noise(1, 2.0, (5, 7, 31)).requires_grad_(), torch.randint(31, (5, 7))
    theirs = TRL.function("trl.trainer.utils", "selective_log_softmax")(logits, index)
    ours = kernels.selective_log_softmax(logits, index)
    assert_close(ours, theirs)
    assert_alike((ours * noise(2, 1.0, (5, 7))).sum(), (theirs * noise(2, 1.0, (5, 7))).sum(), logits)
    entropy = TRL.function("trl.trainer.utils", "entropy_from_logits")(logits)
    assert_close(kernels.entropy_from_logits(logits), entropy)


@needs(TRL_PPO)
def test_the_exact_divergence_is_that_of_trl() -> None:
    trainer = SimpleNamespace(config=SimpleNamespace(kl_penalty="full"))
    penalty = TRL_PPO.function("trl.trainer.ppo_trainer", "PPOTrainer")._kl_penalty
    logits, ref_logits = noise(1, 2.0, (6, 5, 17)).requires_grad_(), noise(2, 2.0, (6, 5, 17))
    theirs = penalty(trainer, logits.log_softmax(-1), ref_logits.log_softmax(-1))
    ours = kernels.full_kl(logits, ref_logits)
    assert_close(ours, theirs)
    assert_alike((ours * noise(3, 1.0, (6, 5))).sum(), (theirs * noise(3, 1.0, (6, 5))).sum(), logits)
