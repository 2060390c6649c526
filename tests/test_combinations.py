"""Options together: own critics beside adapters, values from the reward model, warm-ups, one update per batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import toys
from twinhead.engine import grpo, lora, ppo
from twinhead.engine.batch import Example, pack
from twinhead.engine.experience import Batch
from twinhead.engine.policy import Policy, RewardModel

Box = dict[str, str]
RANK = 4
CRITICS = ("shared", "detached", "branch", "separate")
OWN = ("branch", "separate")
FILES = {"branch": "value_branch.safetensors", "separate": "critic/model.safetensors"}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """Every policy that training moves, as the stage holds it."""
    made: list[Policy] = []
    original = ppo.load_actor

    def load_actor(*arguments: Any) -> Policy:
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(ppo, "load_actor", load_actor)
    return made


def adapters(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / lora.FOLDER / lora.WEIGHTS)


def unlike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits."""
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]


def head_of(policy: Policy) -> nn.Linear:
    head = policy.value_head if policy.network is None else policy.network.value_head
    assert head is not None
    return head


# -- a critic of its own beside adapters -------------------------------------------------------------------------------


def position(prompts: list[str], **_: Any) -> list[float]:
    """What only the prompt decides, so that a critic can foresee all of it."""
    return [toys.COUNT.index(p.split()[-1]) / 4 for p in prompts]


@pytest.mark.parametrize("critic", OWN)
def test_such_a_critic_learns_beside_adapters(critic: str, box: Box, tmp_path: Path, trained: list[Policy]) -> None:
    run = toys.train(
        "ppo", box, tmp_path / "run", critic=critic, branch_layers=1, lora_rank=RANK, steps=25, rollouts_per_step=32,
        learning_rate=1e-3, critic_learning_rate=5e-3, value_lr_scale=1.0, value_clip=10.0, missing_eos_penalty=0.0,
        weight_decay=0.1, reward_functions=(), reward_funcs=[position],
    )  # fmt: skip
    foreseen = [line["value/explained_variance"] for line in toys.metrics(run.dir)]
    assert foreseen[0] == pytest.approx(0.0, abs=0.05)
    assert sum(foreseen[-3:]) / 3 > 0.2
    (policy,) = trained
    base = load_file(Path(box["model"]) / "model.safetensors")
    held = lora.base(policy.model)
    assert unlike({name: held[name] for name in base}, base) == []
    assert all(bool(p.any()) for name, p in lora.tensors(policy.model).items() if "lora_B" in name)
    assert policy.network is not None
    assert not lora.layers(policy.network), "the critic learns whole"
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.startswith("network.") or "lora_" in name for name in learning} == {True}
    assert "network.value_head.weight" in learning
    found = load_file(run.dir / FILES[critic])
    start = Policy.from_pretrained(box["model"], critic, branch_layers=1).network
    assert start is not None
    start.save(tmp_path)
    still = unlike(found, before := load_file(tmp_path / FILES[critic]))
    assert len(still) == len(before), "all of it has moved"


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("critic", OWN)
def test_it_resumes_bit_by_bit(critic: str, stop: int, box: Box, tmp_path: Path) -> None:
    """Also out of a warm-up, in which no adapter has a state yet."""
    given = {"critic": critic, "branch_layers": 1, "lora_rank": RANK, "critic_warmup": 2, "steps": 4}
    given |= {"save_every": 1, "keep_checkpoints": 99, "weight_decay": 0.1, "schedule": "cosine"}
    run = tmp_path / "run"
    toys.train("ppo", box, run, **given)
    metrics, files = toys.metrics(run), toys.files(run)
    kept = {f"checkpoint-{step}" for step in range(1, stop + 1)} | {"metrics.jsonl", "timings.jsonl"}
    for path in run.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    toys.train("ppo", box, run, **given)
    assert toys.metrics(run) == metrics
    again = toys.files(run)
    assert again.keys() == files.keys()
    assert [name for name in files if again[name] != files[name] and name != "timings.jsonl"] == []


@pytest.mark.parametrize("critic", CRITICS)
def test_while_the_critic_warms_up_no_adapter_moves(critic: str, box: Box, tmp_path: Path) -> None:
    given = {"lora_rank": RANK, "weight_decay": 0.1, "kl_kind": "full", "kl_in": "loss", "steps": 3}
    run = toys.train(
        "ppo", box, tmp_path / "run", critic=critic, branch_layers=1, critic_warmup=2, save_every=1,
        keep_checkpoints=3, **given,
    ).dir  # fmt: skip
    fresh = Policy.from_pretrained(box["model"], "none", lora=lora.Lora(RANK, 2 * RANK))
    start = {name: p.detach() for name, p in lora.tensors(fresh.model).items()}
    first, second, third = (run / f"checkpoint-{step}" for step in (1, 2, 3))
    assert unlike(adapters(first), start) == unlike(adapters(second), start) == []
    assert len(unlike(adapters(third), start)) == len(start)
    heads = {"branch": "value_branch.safetensors", "separate": "critic/value_head.safetensors"}
    file = heads.get(critic, "value_head.safetensors")
    assert len(unlike(load_file(second / file), before := load_file(first / file))) == len(before)
    lines = toys.metrics(run)
    assert [line["policy/clipfrac"] for line in lines[:2]] == [0.0, 0.0]
    assert lines[1]["policy/ref_kl"] == pytest.approx(0.0, abs=1e-6)


# -- values that start as the reward model's scores --------------------------------------------------------------------


@pytest.fixture
def first_values(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the steps have learned from."""
    seen: list[Batch] = []
    original = ppo.update

    def update(policy: Policy, optimizer: Any, batch: Batch, *rest: Any) -> dict[str, float]:
        seen.append(batch)
        return original(policy, optimizer, batch, *rest)

    monkeypatch.setattr(ppo, "update", update)
    return seen


def prefix_scores(judge: RewardModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(R,) values, and (R,) what the reward model says of the prompt and the response up to each of them."""
    values, prefixes = [], []
    for e in (e for minibatch in batch for e in minibatch):
        values.append(e.values)
        for row, position in zip(e.packed.rows.tolist(), e.packed.positions[e.packed.rows].tolist(), strict=True):
            prefixes.append(Example(e.packed.tokens[row - position : row + 1].tolist(), []))
    with torch.no_grad():
        return torch.cat(values), judge(pack(prefixes))


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("critic", CRITICS)
def test_the_first_values_are_the_reward_model_s_scores(
    critic: str, rank: int, box: Box, tmp_path: Path, first_values: list[Batch], trained: list[Policy]
) -> None:
    """The toys' reward model has the policy's trunk; a separate critic has that of a reward model of any size."""
    judge = box["small_reward_model" if critic == "separate" else "reward_model"]
    once = {"steps": 1, "epochs": 1, "minibatches": 1, "max_grad_norm": 0.0, "adam_eps": 1e-12}
    toys.train(
        "ppo", box, tmp_path / "run", critic=critic, branch_layers=1, lora_rank=rank, value_init="reward_model",
        value_lr_scale=1.0, reward_model=judge, reward_functions=(), **once,
    )  # fmt: skip
    alone = RewardModel.from_pretrained(judge)
    values, scores = prefix_scores(alone, first_values[0])
    torch.testing.assert_close(values, scores, atol=1e-5, rtol=1e-5)
    assert scores.std() > 1e-2
    moved = (head_of(trained[0]).weight - alone.head.weight).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=0)


# -- one update per batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options"), [*((loss, {"tokens_per_micro": 40}) for loss in grpo.FAMILY), ("grpo", {"lora_rank": RANK})]
)
def test_one_update_per_batch_is_on_policy(loss: str, options: dict[str, Any], box: Box, tmp_path: Path) -> None:
    """No batch is older than the weights, so nothing is clipped, though gspo clips at a ratio of 1.0004."""
    given = {"epochs": 1, "minibatches": 1, "learning_rate": 1e-2, "loss": loss, "beta": 0.1} | options
    for source in ("recompute", "rollout"):
        run = toys.train("grpo", box, tmp_path / source, old_logprobs=source, **given)
        lines = toys.metrics(run.dir)
        exactly = 0.0 if source == "recompute" else 1e-5
        assert len(lines) == 3
        for line in lines:
            assert line["policy/num_updates"] == 1
            assert abs(line["policy/ratio_max"] - 1.0) <= exactly
            assert line["policy/first_ratio_gap"] <= exactly
            assert abs(line["policy/approx_kl"]) <= exactly
            assert line["policy/clipfrac"] == 0.0
            assert line["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert unlike(load_file(run.dir / "model.safetensors"), load_file(Path(box["model"]) / "model.safetensors"))


def test_a_second_update_is_not(box: Box, tmp_path: Path) -> None:
    """Without which the test above would say little."""
    run = toys.train("grpo", box, tmp_path / "run", epochs=2, minibatches=1, learning_rate=1e-2, loss="gspo")
    assert all(line["policy/ratio_max"] > 1.001 and line["policy/clipfrac"] > 0.0 for line in toys.metrics(run.dir))
