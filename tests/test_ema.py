"""The average of the weights: what it is, that it is a checkpoint of its own, and what is measured of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import toys
from twinhead.engine.policy import Policy

Box = dict[str, str]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_optimizer_step_is_followed(dtype: str, box: Box, tmp_path: Path) -> None:
    one = {"epochs": 1, "minibatches": 1, "steps": 3, "save_every": 1, "keep_checkpoints": 9}
    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.75, dtype=dtype, **one).dir
    passed = [weights(run / f"checkpoint-{step}") for step in (1, 2, 3)]
    expected = {name: w.to(getattr(torch, dtype)).double() for name, w in weights(box["model"]).items()}
    for now in passed:
        expected = {name: 0.75 * w + 0.25 * now[name].double() for name, w in expected.items()}
    found = weights(run / "ema")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(found[name], tensor.float()) for name, tensor in weights(run).items())


def test_it_follows_every_minibatch_and_does_not_touch_the_policy(box: Box, tmp_path: Path) -> None:
    with_it, without = (toys.train("ppo", box, tmp_path / str(d), ema_decay=d).dir for d in (0.9, None))
    assert toys.metrics(with_it) == toys.metrics(without)
    assert all(torch.equal(weights(without)[name], w) for name, w in weights(with_it).items())
    assert not (without / "ema").exists()
    kept = toys.train("ppo", box, tmp_path / "zero", ema_decay=0.0).dir
    assert all(torch.equal(weights(kept / "ema")[name], w) for name, w in weights(kept).items())


def test_it_is_a_checkpoint_of_its_own(box: Box, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.9).dir
    stock = AutoModelForCausalLM.from_pretrained(run / "ema").state_dict()
    assert all(torch.equal(stock[name], w) for name, w in weights(run / "ema").items())
    assert AutoTokenizer.from_pretrained(run / "ema").get_vocab() == AutoTokenizer.from_pretrained(run).get_vocab()
    AutoModelForCausalLM.from_pretrained(run)


def test_both_are_measured(box: Box, tmp_path: Path) -> None:
    def size(policy: Policy) -> dict[str, float]:
        return {"size": sum(p.double().abs().sum().item() for p in policy.model.parameters())}

    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.9, eval_every=3, evaluate=size)
    line = toys.metrics(run.dir)[-1]
    for name, folder in (("eval/size", run.dir), ("eval_ema/size", run.dir / "ema")):
        assert line[name] == pytest.approx(sum(w.double().abs().sum().item() for w in weights(folder).values()))
    assert line["eval/size"] != line["eval_ema/size"]
