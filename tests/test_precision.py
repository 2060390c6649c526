"""Mixed precision: products in bfloat16, weights that learn in float32, and one arithmetic for sampler and trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface

from tests import toys
from tests.models import classifier, ids, model
from tests.test_requests import policy
from twinhead.engine.attention import attend
from twinhead.engine.batch import Example, pack
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.sampling import Sampling
from twinhead.engine.trunk import set_precision

PROMPTS = ids((3, 11, 1, 7, 2))
PACKED = pack([Example([], tokens) for tokens in PROMPTS])


def test_products_are_taken_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention sees bfloat16; log-probs and values leave in float32, and lie near those of float32."""
    made, seen = policy(), set()
    exact = made(PACKED)
    set_precision(made.model, "mixed")

    def watched(module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *o: object, **n: object):  # type: ignore[no-untyped-def]
        seen.add(v.dtype)
        return attend(module, q, k, v, *o, **n)  # type: ignore[arg-type]

    AttentionInterface.register("twinhead", watched)
    try:
        mixed = made(PACKED)
    finally:
        AttentionInterface.register("twinhead", attend)
    assert seen == {torch.bfloat16}
    assert mixed.logprobs.dtype == mixed.values.dtype == torch.float32  # type: ignore[union-attr]
    error = (mixed.logprobs - exact.logprobs).abs().max().item()
    assert 1e-4 < error < 0.1


def test_gradients_are_those_of_float32_weights() -> None:
    made = policy()
    made(PACKED).logprobs.sum().backward()
    exact = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
    made.zero_grad()
    set_precision(made.model, "mixed")
    made(PACKED).logprobs.sum().backward()
    found = [p.grad for p in made.model.parameters() if p.grad is not None]
    assert len(found) == len(exact)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
def test_the_sampler_agrees_with_the_trainer(architecture: str) -> None:
    """But for the rounding of its logits to bfloat16: the largest are about 4 here, their last place about .02."""
    made = Policy(model(architecture, tie_word_embeddings=False))
    set_precision(made.model, "mixed")
    rollouts = generate(made, PROMPTS, Sampling(max_new_tokens=12, stop=(5, 6, 7), seed=1, num_slots=3))
    scored = made(pack(rollouts))
    gap = (torch.cat([r.logprobs for r in rollouts]) - scored.logprobs).abs()
    assert gap.mean() < 1e-2
    values = torch.cat([r.values for r in rollouts if r.values is not None])
    torch.testing.assert_close(values, scored.values, atol=2e-2, rtol=0)
    assert not torch.is_autocast_enabled("cpu")


def test_weights_are_cast_once_for_a_whole_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context around all steps keeps the bfloat16 weights, and a new one does not: they may have learned."""
    made = policy()
    set_precision(made.model, "mixed")
    weight = made.model.get_output_embeddings().weight
    first = generate(made, PROMPTS, Sampling(max_new_tokens=12, temperature=0, stop=()))
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    second = generate(made, PROMPTS, Sampling(max_new_tokens=12, temperature=0, stop=()))
    assert [r.response for r in first] != [r.response for r in second]
    assert len(made.model.get_output_embeddings().weight) - 1 - second[0].response[0] == first[0].response[0]


def test_a_reward_model_scores_in_float32() -> None:
    judge = RewardModel(classifier())
    exact = judge(PACKED)
    set_precision(judge.model, "mixed")
    mixed = judge(PACKED)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().max() < 0.1


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo", "grpo"])
def test_small_updates_are_not_lost(stage: str, tmp_path: Path) -> None:
    """At a learning rate of a hundred-thousandth a weight in bfloat16 stands still; in mixed precision it moves."""
    box = toys.box(tmp_path / "box")
    moved = {}
    for dtype in ("mixed", "bfloat16"):
        run = toys.train(stage, box, tmp_path / dtype, dtype=dtype, learning_rate=1e-5)
        start, end = load_file(Path(box["model"]) / "model.safetensors"), load_file(run.dir / "model.safetensors")
        names = [n for n in start.keys() & end.keys() if start[n].ndim == 2]
        moved[dtype] = sum(int((start[n].to(end[n].dtype) != end[n]).sum()) for n in names)
        total = sum(start[n].numel() for n in names)
    assert moved["mixed"] > 0.9 * total
    assert moved["bfloat16"] < 0.2 * total
