"""The engine on a GPU: packed equals separate, decoding equals the full pass, graphs draw the same text.

Skipped without one; `python -m benchmarks gpu` runs it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import ids, model
from twinhead.engine import flash
from twinhead.engine.batch import Example, pack
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = ids((3, 11, 1, 7, 2, 9, 5, 30))
SAMPLED = Sampling(max_new_tokens=24, stop=tuple(range(4, 10)), seed=5)
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 16: FlashAttention takes them


def policy(dtype: torch.dtype, architecture: str = "llama", **changes: Any) -> Policy:
    made = Policy(model(architecture, tie_word_embeddings=False, **WIDE, **changes))
    torch.nn.init.normal_(made.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    made.model.to(dtype)
    return made.to("cuda")


@DTYPES
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_packed_sequences_equal_separate_ones(architecture: str, dtype: torch.dtype, tolerance: float) -> None:
    made = policy(dtype, architecture)
    sequences = [Example([], tokens) for tokens in ids((30, 2, 17, 64))]
    scored = made(pack(sequences, "cuda"))
    alone = [made(pack([sequence], "cuda")) for sequence in sequences]
    torch.testing.assert_close(scored.logprobs, torch.cat([a.logprobs for a in alone]), atol=tolerance, rtol=0)
    scored.logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.model.parameters())


def test_half_precision_takes_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ragged = flash.ragged
    monkeypatch.setattr(flash, "ragged", lambda *given: calls.append(given) or ragged(*given))
    policy(torch.bfloat16)(pack([Example([], tokens) for tokens in ids((30, 2))], "cuda"))
    assert len(calls) == 2, "one call per layer"


@DTYPES
def test_generation_is_scoring(dtype: torch.dtype, tolerance: float) -> None:
    made = policy(dtype)
    rollouts = generate(made, PROMPTS, replace(SAMPLED, num_slots=3))
    scored = made(pack(rollouts, "cuda"))
    torch.testing.assert_close(torch.cat([r.logprobs for r in rollouts]), scored.logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.cat([r.values for r in rollouts]), scored.values, atol=tolerance, rtol=0)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_draw_the_same_text(dtype: torch.dtype) -> None:
    """In float32 exactly: also with early stops, after refills, and after an update in place."""
    made = policy(dtype)
    sampling = replace(SAMPLED, num_slots=4, cuda_graphs=True, keep_cache=True)
    for _ in range(2):
        replayed = generate(made, PROMPTS, sampling)
        plain = generate(made, PROMPTS, replace(SAMPLED, num_slots=4, keep_cache=False))
        same = sum(a.response == b.response for a, b in zip(replayed, plain, strict=True))
        assert same == len(PROMPTS) if dtype == torch.float32 else same >= len(PROMPTS) // 2
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.01 * torch.randn_like(p))


def test_the_trunk_on_a_gpu_is_that_on_the_host() -> None:
    made = policy(torch.float32)
    sequences = [Example([], tokens) for tokens in ids((30, 2, 17))]
    expected = made.to("cpu")(pack(sequences)).logprobs
    torch.testing.assert_close(made.to("cuda")(pack(sequences, "cuda")).logprobs.cpu(), expected, atol=1e-3, rtol=0)
