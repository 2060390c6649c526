"""The average of the weights: what it is, that it is a checkpoint of its own, and what is measured of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import toys
from tests.models import ids, model
from twinhead.engine import lora
from twinhead.engine.batch import Example, pack
from twinhead.engine.ema import EMA
from twinhead.engine.lora import Lora
from twinhead.engine.policy import Policy
from twinhead.engine.text import Text

Box = dict[str, str]
RANK = 4
ADAPTERS = Lora(RANK, 2 * RANK)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_adapters_all_is_followed_that_learns(dtype: str, box: Box, tmp_path: Path) -> None:
    one = {"epochs": 1, "minibatches": 1, "steps": 3, "save_every": 1, "keep_checkpoints": 9, "learning_rate": 1e-2}
    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.75, lora_rank=RANK, dtype=dtype, **one).dir
    start = Policy.from_pretrained(box["model"], "none", getattr(torch, dtype), lora=ADAPTERS)
    expected = {name: p.detach().double() for name, p in lora.tensors(start.model).items()}
    for step in (1, 2, 3):
        now = load_file(run / f"checkpoint-{step}" / lora.FOLDER / lora.WEIGHTS)
        expected = {name: 0.75 * w + 0.25 * now[name].double() for name, w in expected.items()}
    found = load_file(run / "ema" / lora.FOLDER / lora.WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensor, now[name])
    average = Policy.from_pretrained(box["model"], "none", getattr(torch, dtype), None, ADAPTERS, run / "ema")
    packed = pack([Example([4, 5], [6, 7, 12, 13])])
    merged = Policy.from_pretrained(run / "ema", "none")(packed).logprobs
    torch.testing.assert_close(
        merged, average(packed).logprobs.float(), rtol=0, atol=1e-5 if dtype == "float32" else 0.1
    )
    assert (start(packed).logprobs - average(packed).logprobs).abs().max() > 1e-2


def test_the_base_of_adapters_is_one_for_both(box: Box) -> None:
    policy = Policy(model(), "shared")
    lora.attach(policy.model, ADAPTERS)
    ema = EMA(policy, 0.5, Text.from_pretrained(box["model"]))
    average = ema.policy
    learning = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    theirs = dict(policy.model.named_parameters())
    apart = {name for name, p in average.model.named_parameters() if p.data_ptr() != theirs[name].data_ptr()}
    assert apart == learning == {name for name in theirs if "lora_" in name}
    packed = pack([Example(s[:2], s[2:]) for s in ids([7, 4])])
    before, version = average(packed).logprobs, policy.version
    with lora.using(policy.model, None), torch.no_grad():
        assert torch.equal(average(packed).logprobs, before)
    with torch.no_grad():
        for p in lora.tensors(policy.model).values():
            p.add_(0.1)
    assert torch.equal(average(packed).logprobs, before)
    moved = policy(packed).logprobs
    assert (moved - before).abs().max() > 1e-2
    ema.update(policy)
    assert (average(packed).logprobs - moved).abs().max() > 1e-3
    assert not torch.equal(average(packed).logprobs, before)
    assert policy.version == version + len(learning), "nothing else was written to"
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("rank", [0, RANK])
def test_it_follows_every_minibatch_and_does_not_touch_the_policy(rank: int, box: Box, tmp_path: Path) -> None:
    with_it, without = (toys.train("ppo", box, tmp_path / str(d), ema_decay=d, lora_rank=rank).dir for d in (0.9, None))
    assert toys.metrics(with_it) == toys.metrics(without)
    assert all(torch.equal(weights(without)[name], w) for name, w in weights(with_it).items())
    assert not (without / "ema").exists()
    kept = toys.train("ppo", box, tmp_path / "zero", ema_decay=0.0, lora_rank=rank).dir
    assert all(torch.equal(weights(kept / "ema")[name], w) for name, w in weights(kept).items())


def test_it_is_a_checkpoint_of_its_own(box: Box, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.9).dir
    stock = AutoModelForCausalLM.from_pretrained(run / "ema").state_dict()
    assert all(torch.equal(stock[name], w) for name, w in weights(run / "ema").items())
    assert AutoTokenizer.from_pretrained(run / "ema").get_vocab() == AutoTokenizer.from_pretrained(run).get_vocab()
    AutoModelForCausalLM.from_pretrained(run)


def test_an_average_of_adapters_is_measured(box: Box, tmp_path: Path) -> None:
    """By what its merged checkpoint says, and beside guests on the same base."""
    judge = toys.train("reward", box, tmp_path / "judge", lora_rank=RANK, learning_rate=1e-2).dir
    packed = pack([Example([4, 5], [6, 7, 12, 13])])

    def surprise(policy: Policy) -> dict[str, float]:
        return {"nats": -policy(packed).logprobs.sum().item()}

    given = {"reward_model": str(judge), "reward_functions": (), "share": "all", "lora_rank": RANK}
    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.9, eval_every=3, evaluate=surprise, **given).dir
    line = toys.metrics(run)[-1]
    for name, folder in (("eval/nats", run), ("eval_ema/nats", run / "ema")):
        assert line[name] == pytest.approx(surprise(Policy.from_pretrained(folder, "none"))["nats"], rel=1e-5)
    assert line["eval/nats"] != pytest.approx(line["eval_ema/nats"], rel=1e-5)


def test_both_are_measured(box: Box, tmp_path: Path) -> None:
    def size(policy: Policy) -> dict[str, float]:
        return {"size": sum(p.double().abs().sum().item() for p in policy.model.parameters())}

    run = toys.train("ppo", box, tmp_path / "run", ema_decay=0.9, eval_every=3, evaluate=size)
    line = toys.metrics(run.dir)[-1]
    for name, folder in (("eval/size", run.dir), ("eval_ema/size", run.dir / "ema")):
        assert line[name] == pytest.approx(sum(w.double().abs().sum().item() for w in weights(folder).values()))
    assert line["eval/size"] != line["eval_ema/size"]
