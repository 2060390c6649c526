"""Updates: how a batch is cut into micro-batches changes no gradient, and the logits of a batch are never built."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import classifier, ids, model
from tests.watch import Watch
from twinhead.engine import ppo, reward, sft
from twinhead.engine.batch import Example, pack
from twinhead.engine.data import Comparison
from twinhead.engine.evaluate import perplexity
from twinhead.engine.experience import Batch
from twinhead.engine.generate import generate
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.penalty import Penalty
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.sampling import Sampling
from twinhead.engine.trunk import checkpoint_gradients
from twinhead.kernels import ppo_loss

PROMPTS = ids((3, 1, 7, 2, 5, 4, 6, 2))
Gradients = dict[str, Tensor]


class Recorder:
    """An optimizer that keeps the gradients instead of following them."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.taken, self.num_steps = module, [], 0

    def step(self) -> dict[str, float]:
        self.taken.append({name: p.grad for name, p in self.module.named_parameters() if p.grad is not None})
        self.module.zero_grad(set_to_none=True)
        self.num_steps += 1
        return {}


def policy(architecture: str = "llama", critic: str = "shared", branch_layers: int = 2, **changes: Any) -> Policy:
    made = Policy(model(architecture, **changes), critic, branch_layers)
    if made.value_head is not None:
        nn.init.normal_(made.value_head.weight, generator=torch.Generator().manual_seed(1))
    return made


def demonstrations() -> list[Example]:
    """Responses of very different lengths, one of them with holes and one with nothing to learn."""
    responses = ids((9, 1, 14, 3, 6, 2, 8, 4), seed=1)
    batch = [Example(p, r) for p, r in zip(PROMPTS, responses, strict=True)]
    batch[2] = Example(PROMPTS[2], responses[2], [i % 3 == 0 for i in range(len(responses[2]))])
    batch[4] = Example(PROMPTS[4], responses[4], [False] * len(responses[4]))
    return batch


def sft_gradients(tokens_per_micro: int, reduction: str = "token_mean") -> tuple[list[Gradients], dict[str, float]]:
    """One update on demonstrations()."""
    trained = policy(critic="none")
    recorder = Recorder(trained)
    config = sft.Config(model="m", data="d", tokens_per_micro=tokens_per_micro, reduction=reduction)
    stats = sft.update(trained, recorder, demonstrations(), config)
    return recorder.taken, stats


def experience(architecture: str, critic: str, config: ppo.Config) -> tuple[Policy, Batch, dict[str, float]]:
    """Two minibatches of one step, and the policy after it has moved a little since it sampled."""
    sampler = policy(architecture, critic)
    sampling = Sampling(max_new_tokens=12, temperature=config.temperature, stop=tuple(range(4, 14)), seed=1)
    rollouts = generate(sampler, PROMPTS, sampling)
    assert len({len(r.response) for r in rollouts}) > 3
    scores, reference = torch.linspace(-1, 1, 8), Policy(model(architecture, seed=1), "none")
    batch, examined = ppo.examine(sampler, reference, rollouts, scores, 0.1, config, 0)
    trained = policy(architecture, critic)
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return trained, batch, examined


def ppo_config(tokens_per_micro: int, **options: Any) -> ppo.Config:
    chosen = {"temperature": 0.8, "clip_low": 0.05, "value_clip": 0.05, "entropy_coef": 0.1} | options
    shape = {"rollouts_per_step": 8, "minibatches": 2, "epochs": 1, "tokens_per_micro": tokens_per_micro}
    return ppo.Config(model="m", prompts="p", steps=1, **shape, **chosen)


def ppo_gradients(tokens_per_micro: int) -> tuple[list[Gradients], dict[str, float]]:
    config = ppo_config(tokens_per_micro)
    trained, batch, examined = experience("llama", "shared", config)
    recorder = Recorder(trained)
    updated = ppo.update(trained, recorder, batch, None, config, random.Random(0))
    return recorder.taken, examined | updated


def reward_gradients(tokens_per_micro: int) -> tuple[list[Gradients], dict[str, float]]:
    """Prompts with 2 to 4 answers, one of them with ties."""
    ranks = [[0, 1], [2, 0, 1], [0, 1, 1, 2], [1, 0]]
    answers = iter(ids((3, 9, 2, 5, 7, 1, 4, 4, 12, 3, 8), seed=1))
    batch = [
        Comparison([Example(p, next(answers)) for _ in r], r, 0.1) for p, r in zip(PROMPTS[:4], ranks, strict=True)
    ]
    trained = RewardModel(classifier())
    recorder = Recorder(trained)
    stats = reward.update(
        trained, recorder, batch, reward.Config(model="m", data="d", tokens_per_micro=tokens_per_micro)
    )
    return recorder.taken, stats


Update = Callable[[int], tuple[list[Gradients], dict[str, float]]]


def seq_mean_gradients(tokens_per_micro: int) -> tuple[list[Gradients], dict[str, float]]:
    return sft_gradients(tokens_per_micro, "seq_mean")


def sum_gradients(tokens_per_micro: int) -> tuple[list[Gradients], dict[str, float]]:
    return sft_gradients(tokens_per_micro, "sum")


@pytest.mark.parametrize("reduction", sft.REDUCTIONS)
def test_a_reduction_is_what_its_name_says(reduction: str) -> None:
    """Against one example after the other, in lists; the one that has nothing to learn counts nowhere."""
    with torch.no_grad():
        nll = [-policy(critic="none")(pack([example])).logprobs.double() for example in demonstrations()]
    some = [example for example in nll if len(example)]
    assert len(some) == len(nll) - 1
    expected = {
        "token_mean": sum(example.sum() for example in some) / sum(map(len, some)),
        "seq_mean": sum(example.mean() for example in some) / len(some),
        "sum": sum(example.sum() for example in some),
    }
    assert len({round(value.item(), 4) for value in expected.values()}) == 3
    for tokens_per_micro in (10_000, 30):
        _, stats = sft_gradients(tokens_per_micro, reduction)
        assert stats["loss"] == pytest.approx(expected[reduction].item(), rel=1e-5)


@pytest.mark.parametrize("update", [sft_gradients, seq_mean_gradients, sum_gradients, ppo_gradients, reward_gradients])
@pytest.mark.parametrize("tokens_per_micro", [60, 30, 1])
def test_the_micro_batch_size_changes_no_gradient(update: Update, tokens_per_micro: int) -> None:
    (whole, measured), (cut, remeasured) = update(10_000), update(tokens_per_micro)
    assert len(whole) == len(cut) == (2 if update is ppo_gradients else 1)
    for theirs, ours in zip(whole, cut, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: {error}"
    assert remeasured == pytest.approx(measured, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.0}, {"value_coef": 3.0, "value_clip": 1e-4}], ids=str)
@pytest.mark.parametrize(("architecture", "critic"), [("llama", "shared"), ("llama", "detached"), ("gemma2", "shared"),
                                                      ("phi", "shared")])  # fmt: skip
def test_the_fused_update_is_ppo_loss_of_the_scores(architecture: str, critic: str, options: dict[str, float]) -> None:
    """Three matrix products or four, the gradient and all statistics are the same; phi's head has a bias."""
    config = ppo_config(40, **options)
    trained, batch, _ = experience(architecture, critic, config)
    recorder = Recorder(trained)
    updated = ppo.update(trained, recorder, batch, None, config, random.Random(0))
    plain, sums = Recorder(trained), Sums()
    for minibatch in random.Random(0).sample(batch, len(batch)):
        num_tokens = sum(e.packed.num_targets for e in minibatch)
        for e in minibatch:
            new = trained(e.packed, temperature=config.temperature)
            loss, stats = ppo_loss(
                new.logprobs, e.logprobs, e.advantages, new.values, e.values, e.returns, entropy=new.entropy,
                clip_low=config.clip_low, clip_high=config.clip_high, value_clip=config.value_clip,
                value_coef=config.value_coef, entropy_coef=config.entropy_coef, normalizer=num_tokens,
            )  # fmt: skip
            loss.backward()
            sums.add(stats)
        plain.step()
    assert {name: updated[name] for name in sums.take(1, "policy/")} == pytest.approx(
        sums.take(len(batch), "policy/"), rel=1e-5, abs=1e-7
    )
    assert updated["policy/vf_clipfrac"] > 0.1 and updated["policy/clipfrac"] > 0.1
    for ours, theirs in zip(recorder.taken, plain.taken, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: {error}"


VOCABULARY, PROMPT, RESPONSE, ROWS = 1000, 2, 52, 30


def long_examples() -> tuple[list[Example], int]:
    """Together more than 1500 target tokens, and the number of their logits."""
    batch = [Example(p, r) for p, r in zip(ids([PROMPT] * ROWS), ids([RESPONSE] * ROWS, seed=1), strict=True)]
    num_targets = pack(batch).num_targets
    assert num_targets >= 1500
    return batch, num_targets * VOCABULARY


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_fine_tuning_never_builds_the_logits(architecture: str) -> None:
    batch, num_logits = long_examples()
    trained = policy(architecture, "none", vocab_size=VOCABULARY)
    config = sft.Config(model="m", data="d")
    optimizer = Optimizer(trained, config, 1)
    with Watch() as watch:
        sft.update(trained, optimizer, batch, config)
        perplexity(trained, batch)
    assert {torch.ops.aten.embedding_dense_backward, torch.ops.aten._fused_adamw_} <= watch.seen
    assert VOCABULARY * 32 < watch.largest < num_logits


KL = {f"{kind} in the {place}": {"kl_kind": kind, "kl_in": place} for kind, place in (
    ("k1", "reward"), ("full", "reward"), ("k2", "loss"), ("k3", "loss"), ("full", "loss"),
)}  # fmt: skip


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("critic", ["shared", "detached", "branch"])
def test_ppo_never_builds_the_logits(critic: str, kl: str) -> None:
    """Nor those of the reference, however much of the divergence from it is asked for."""
    _, num_logits = long_examples()
    trained = policy(critic=critic, vocab_size=VOCABULARY, branch_layers=1)
    reference = Policy(model(vocab_size=VOCABULARY, seed=1), "none").requires_grad_(False)
    rollouts = generate(trained, ids([PROMPT] * ROWS), Sampling(max_new_tokens=RESPONSE, stop=()))
    config = ppo.Config(model="m", prompts="p", steps=1, minibatches=1, epochs=2, rollouts_per_step=ROWS, **KL[kl])
    optimizer = Optimizer(trained, config, 2)
    with Watch() as watch:
        batch, _ = ppo.examine(trained, reference, rollouts, torch.linspace(-1, 1, ROWS), 0.1, config, 0)
        charged = Penalty.in_loss(config, reference, 0.1)
        updated = ppo.update(trained, optimizer, batch, None, config, random.Random(0), charged)
    assert len(batch[0]) == 1, "one pass for all"
    assert (updated.get("policy/ref_kl", 0.0) > 0.01) == (config.kl_in == "loss")
    assert {torch.ops.aten.embedding_dense_backward, torch.ops.aten._fused_adamw_} <= watch.seen
    assert VOCABULARY * 32 < watch.largest < num_logits


def test_logits_that_are_built_are_seen() -> None:
    batch, num_logits = long_examples()
    trained, packed = policy(vocab_size=VOCABULARY), pack(batch)
    with Watch() as watch:
        trained.logits(trained.hidden(packed)[packed.rows])
    assert watch.largest >= num_logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_checkpointing_keeps_less_and_changes_no_gradient(architecture: str) -> None:
    batch, _ = long_examples()
    taken, kept = [], []
    for prepare in (lambda model: None, checkpoint_gradients):
        trained = policy(architecture, "none")
        prepare(trained.model)
        recorder, sizes = Recorder(trained), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            sft.update(trained, recorder, batch, sft.Config(model="m", data="d"))
        taken.append(recorder.taken[0])
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
    assert taken[1].keys() == taken[0].keys()
    for name, gradient in taken[0].items():
        torch.testing.assert_close(taken[1][name], gradient, rtol=1e-5, atol=1e-7)
