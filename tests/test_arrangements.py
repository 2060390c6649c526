"""The arrangements of the plan, and its parts under adapters, against models that are there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests import toys
from twinhead.engine import backbone, lora, ppo
from twinhead.engine.arrangements import RANK, Arrangement, arrangements
from twinhead.engine.cli import main
from twinhead.engine.lora import Lora
from twinhead.engine.optim import Optimizer
from twinhead.engine.planning import plan
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.text import Text

pytest.importorskip("peft")

Box = dict[str, str]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    folder = tmp_path_factory.mktemp("box")
    paths = toys.box(folder)
    toys.train("reward", paths, folder / "judge", lora_rank=2, lora_targets=("q_proj", "up_proj"))
    return paths | {"judge": str(folder / "judge")}


def config(box: Box, **changes: Any) -> ppo.Config:
    given = {"reward_model": box["reward_model"], "reward_functions": ()}
    return ppo.Config(**toys.options("ppo", box) | given | changes)


def nbytes(modules: Iterable[nn.Module]) -> int:
    return sum(p.nbytes for p in {p for module in modules for p in module.parameters()})


def remembered(policy: Policy, chosen: ppo.Config) -> int:
    """Gradients and moments, once there are any."""
    optimizer = Optimizer(policy, chosen, 1)
    for p in optimizer.parameters.values():
        p.grad = p.detach().clone()
    gradients = sum(p.nbytes for p in optimizer.parameters.values())
    optimizer.step()
    return gradients + sum(t.nbytes for name, t in optimizer.state()[0].items() if not name.endswith("step"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_arrangement_weighs_what_its_models_do(dtype: str, box: Box) -> None:
    """Heads have no bias in a reward model, but are planned as those of the critic, which do: 4 bytes each."""
    chosen = config(box, lora_rank=3, dtype=dtype)
    kind = chosen.torch_dtype
    plain, reference = (Policy.from_pretrained(box["model"], dtype=kind) for _ in range(2))
    judge, critic = (RewardModel.from_pretrained(box["reward_model"], kind) for _ in range(2))
    adapted = Policy.from_pretrained(box["model"], dtype=kind, lora=Lora.of(chosen))
    guest = 4 * lora.num_weights(plain.model, Lora(3, 6))
    reference.value_head = plain.model.value_head = None
    found = {a.name: a for a in arrangements(chosen)}
    expected = {
        "one trunk": ([plain, reference, judge], remembered(plain, chosen)),
        "adapters of rank 3": ([adapted, judge], remembered(adapted, chosen)),
        "share all, rank 3": ([adapted], remembered(adapted, chosen)),
    }
    room = 200  # a head of a reward model: in the trunk's dtype or float32, with a bias or without
    for name, (models, learning) in expected.items():
        beside = guest if name.startswith("share") else 0
        assert found[name].weights == pytest.approx(nbytes(models) + beside, abs=room)
        assert found[name].learning == learning
    assert found["four models"].weights == pytest.approx(nbytes([plain, reference, judge, critic]), abs=room)
    assert found["four models"].learning > found["one trunk"].learning
    assert {a.one for a in found.values()} == {nbytes([plain.model])}


def test_each_arrangement_is_smaller_than_the_one_before(box: Box) -> None:
    found = arrangements(config(box, lora_rank=1))
    assert len(found) == 4
    sizes = [a.weights for a in found]
    assert sizes == sorted(sizes, reverse=True)
    assert [a.name for a in arrangements(config(box))][2:] == [f"adapters of rank {RANK}", f"share all, rank {RANK}"]
    assert Arrangement("some", 3_000_000, 1_500_000, 2_000_000).row() == ["some", "3.0", "1.5", "4.5", "1.50"]


def test_a_plan_under_adapters_has_the_bytes_of_the_models(box: Box) -> None:
    chosen = config(box, lora_rank=3, reward_model=box["judge"], share="all")
    found = {part.name: part.bytes for part in plan(chosen).parts}
    policy = Policy.from_pretrained(box["model"], lora=Lora.of(chosen))
    assert found["policy"] == nbytes([policy.model])
    assert found["gradients"] + found["Adam, 32 bits"] == remembered(policy, chosen)
    guest = backbone.reward_model(policy, box["judge"], Text.from_pretrained(box["model"]))
    beside = nbytes([guest]) + sum(p.nbytes for p in lora.tensors(policy.model, guest.name).values())
    assert found["adapter and head of the reward model"] == beside
    assert not {"reference", "reward model", "its embedding, once it is read"} & found.keys()
    apart = {part.name for part in plan(config(box, lora_rank=3, reference=box["model"])).parts}
    assert {"reference", "reward model"} <= apart
    whole, frozen = (plan(config(box, **given)).peak("update") for given in ({}, {"lora_rank": 1}))
    assert frozen < whole


def test_a_plan_without_an_adapter_to_share_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match=r"reward_model': expected a checkpoint of training with lora_rank, got"):
        plan(config(box, lora_rank=3, share="all"))


def test_the_command_shows_them(box: Box, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chosen = toys.options("ppo", box) | {"output_dir": str(tmp_path / "run"), "lora_rank": 3, "plan": True}
    assert main(toys.command("ppo", chosen)) == 0
    shown = capsys.readouterr().out
    for name in ("four models", "one trunk", "adapters of rank 3", "share all, rank 3"):
        assert name in shown
    assert not (tmp_path / "run").exists()
