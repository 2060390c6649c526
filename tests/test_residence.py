"""Residence: a model that lives on the host is lent to the device and comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import toys
from tests.models import classifier, ids, model
from twinhead.engine import grpo, ppo
from twinhead.engine.batch import Example, pack
from twinhead.engine.config import RunConfig
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.residence import pinned, resident
from twinhead.engine.text import Text

DEVICE = torch.device("meta")  # there is one on every machine


def frozen() -> Policy:
    """Its head is its embedding: one tensor in two places. Rotary frequencies are buffers."""
    return Policy(model(tie_word_embeddings=True), "none").requires_grad_(False).eval()


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_a_model_is_lent_and_comes_back_as_it_was() -> None:
    guest = frozen()
    before = tensors(guest)
    addresses = [t.data_ptr() for t in before]
    head, embedding = guest.model.get_output_embeddings(), guest.model.get_input_embeddings()
    assert len(list(guest.buffers())) > 0
    with resident(guest, DEVICE):
        assert guest.device == DEVICE
        assert {t.device for t in tensors(guest)} == {DEVICE}
        assert head.weight is embedding.weight and isinstance(head.weight, nn.Parameter)
        assert not any(p.requires_grad for p in guest.parameters())
        tokens = torch.zeros(1, 4, dtype=torch.int64, device=guest.device)
        assert guest.model.get_output_embeddings()(embedding(tokens)).device == DEVICE
    after = tensors(guest)
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert [t.data_ptr() for t in after] == addresses


def test_an_exception_brings_it_home() -> None:
    guest = frozen()
    before = tensors(guest)
    with pytest.raises(RuntimeError, match="lost"), resident(guest, DEVICE):
        raise RuntimeError("lost")
    assert all(a is b for a, b in zip(tensors(guest), before, strict=True))


def test_a_journey_that_fails_brings_home_what_had_left(monkeypatch: pytest.MonkeyPatch) -> None:
    guest, moves = frozen(), []
    before, to = tensors(guest), Tensor.to

    def full(self: Tensor, *args: object, **options: object) -> Tensor:
        moves.append(self)
        if len(moves) == 4:
            raise torch.OutOfMemoryError("the device is full")
        return to(self, *args, **options)

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError), resident(guest, DEVICE):
        raise AssertionError("nobody is asked")
    assert all(a is b for a, b in zip(tensors(guest), before, strict=True))


def test_who_lives_there_does_not_move_and_nobody_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = frozen()
    before = tensors(guest)
    monkeypatch.setattr(Tensor, "to", lambda *_, **__: pytest.fail("a tensor was moved"))
    with resident(guest, torch.device("cpu")), resident(None, DEVICE):
        assert all(a is b for a, b in zip(tensors(guest), before, strict=True))


def test_a_model_that_learns_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="residence: expected a frozen model to lend to meta, got trainable parameters"),
        resident(frozen().requires_grad_(True), DEVICE),
    ):
        raise AssertionError("a trainable model was lent")


@pytest.mark.parametrize(
    ("stage", "options", "updating"),
    [(ppo, {}, []), (ppo, {"kl_kind": "full", "kl_in": "loss"}, ["Policy"]), (grpo, {"beta": 0.1}, [])],
)
def test_every_phase_has_the_models_that_it_asks(
    stage: Any, options: dict[str, Any], updating: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward model is lent to score, the reference to examine (for the exact divergence in the loss to update too),
    and neither stays for longer."""
    there: list[nn.Module | None] = []
    seen: list[tuple[str, list[str]]] = []

    @contextmanager
    def lend(guest: nn.Module | None, device: torch.device) -> Iterator[None]:
        assert device == torch.device("cpu")
        there.append(guest)
        yield
        there.remove(guest)

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any) -> Any:
            seen.append((name, [type(guest).__name__ for guest in there if guest is not None]))
            return function(*args)

        monkeypatch.setattr(owner, name, watched)

    monkeypatch.setattr(stage, "resident", lend)
    for owner, name in ((stage, "generate"), (stage.Scorer, "__call__"), (stage, "examine"), (stage, "update")):
        watch(owner, name)
    box, name = toys.box(tmp_path / "box"), stage.__name__.rpartition(".")[2]
    toys.train(name, box, tmp_path / "run", steps=1, reward_model=box["reward_model"], **options)
    assert seen == [("generate", []), ("__call__", ["RewardModel"]), ("examine", ["Policy"]), ("update", updating)]


@pytest.mark.parametrize(("stage", "options"), [(ppo, {}), (grpo, {"beta": 0.1})])
def test_frozen_models_are_loaded_onto_the_host(
    stage: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, at_home = toys.box(tmp_path / "box"), []
    monkeypatch.setattr(RunConfig, "torch_device", DEVICE)
    monkeypatch.setattr(stage, "pinned", at_home.append)
    chosen = toys.options(stage.__name__.rpartition(".")[2], box) | options
    chosen |= {"reward_model": box["reward_model"], "device": "cuda"}
    for offload in (False, True):
        config, text = stage.Config(**chosen, offload=offload), Text.from_pretrained(box["model"])
        policy, reference, scorer = stage.load(config, SimpleNamespace(resume_from=None), text, [])
        assert policy.device == DEVICE
        assert reference.device == scorer.reward_model.device == (torch.device("cpu") if offload else DEVICE)
    assert at_home == [reference, scorer.reward_model]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory and the way to a device")
def test_offloaded_models_score_the_same_on_a_gpu() -> None:
    device = torch.device("cuda")
    policy, judge = frozen(), RewardModel(classifier()).requires_grad_(False).eval()
    packed = pack([Example(p, r) for p, r in zip(ids((3, 5)), ids((4, 2), seed=1), strict=True)], device)
    with torch.no_grad():
        expected = policy.to(device)(packed).logprobs, judge.to(device)(packed)
        policy.cpu(), judge.cpu()
        for guest in (policy, judge):
            pinned(guest)
            assert all(t.is_pinned() for t in tensors(guest))
        torch.cuda.empty_cache()
        empty = torch.cuda.memory_allocated()
        with resident(policy, device), resident(judge, device):
            found = policy(packed).logprobs, judge(packed)
        del packed
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.cuda.memory_allocated() <= empty
