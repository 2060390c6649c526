"""Linear layers that multiply by oneDNN: the same model, with the same name, weights and training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import models, toys
from twinhead.engine import linear, trunk
from twinhead.engine.batch import Example, pack
from twinhead.engine.policy import Policy
from twinhead.kernels import product

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_every_plain_layer_changes_its_class() -> None:
    special = type("Special", (nn.Linear,), {})
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False)), special(5, 6), nn.LayerNorm(6))
    weights, x = model.state_dict(), torch.randn(2, 3)
    expected = model(x)
    linear.adopt(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [linear.Linear, linear.Linear, special]
    assert model.state_dict().keys() == weights.keys()
    for same in (model, copy.deepcopy(model)):
        torch.testing.assert_close(same(x), expected, rtol=0, atol=0)


@ONEDNN
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_passes_and_gradients_are_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.model(architecture)
    policy = Policy(model, "shared")
    packed = pack([Example([5, 6, 7, 8, 9], [1, 2, 3]), Example([4], [3, 2, 1, 5, 6, 7, 8, 9])])
    found = []
    for available in (False, True):
        monkeypatch.setattr(product, "AVAILABLE", available)
        monkeypatch.setattr(product, "FEWEST", 0)
        policy.zero_grad()
        scored = policy(packed)
        (scored.logprobs.sum() + scored.values.square().sum()).backward()
        found.append([scored.logprobs.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@ONEDNN
def test_a_run_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = toys.box(tmp_path / "box")
    for name, available in (("torch", False), ("onednn", True)):
        monkeypatch.setattr(product, "AVAILABLE", available)
        monkeypatch.setattr(product, "FEWEST", 0)
        toys.train("ppo", box, tmp_path / name)
    ours, theirs = (toys.metrics(tmp_path / name)[0] for name in ("onednn", "torch"))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@ONEDNN
def test_sampler_and_trainer_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiplies few rows at a time and the other many."""
    monkeypatch.setattr(product, "AVAILABLE", True)
    monkeypatch.setattr(product, "FEWEST", 0)
    trunk.self_check(Policy(models.model("llama"), "none").model)
