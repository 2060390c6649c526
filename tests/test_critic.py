"""Critics with layers of their own: what they compute, whom they reach, and what a checkpoint keeps of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from tests import toys
from tests.models import ARCHITECTURES, classifier, ids, model, tiny
from twinhead.engine import critic as critics
from twinhead.engine import ppo
from twinhead.engine.batch import Example, Packed, Rollout, pack
from twinhead.engine.critic import Branch, Separate
from twinhead.engine.experience import behaviour
from twinhead.engine.generate import generate
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

Box = dict[str, str]
OWN = ("branch", "separate")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


@pytest.fixture(scope="module")
def packed() -> Packed:
    return pack([Example(s[:3], s[3:]) for s in ids((7, 12, 5))])


def opinionated(head: nn.Linear) -> nn.Linear:
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(head.bias, 0.3)
    return head


def with_network(critic: str, **changes: Any) -> Policy:
    """A policy whose critic has layers and opinions of its own."""
    network = Separate(model("gpt2", seed=5).base_model) if critic == "separate" else None
    policy = Policy(model(**changes), critic, branch_layers=1, network=network)
    assert policy.network is not None
    opinionated(policy.network.value_head)
    return policy


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_branch_says_what_the_trunk_says(architecture: str, packed: Packed) -> None:
    branched, shared = Policy(model(architecture), "branch", branch_layers=1), Policy(model(architecture))
    assert branched.network is not None and shared.value_head is not None
    opinionated(branched.network.value_head), opinionated(shared.value_head)
    with torch.no_grad():
        assert torch.equal(branched.appraise(packed), shared.appraise(packed))


@pytest.mark.parametrize(("architecture", "num_layers"), [("llama", 1), ("llama", 2), ("gpt2", 1), ("gemma3_text", 2)])
def test_a_branch_is_a_trunk_with_other_top_layers(architecture: str, num_layers: int, packed: Packed) -> None:
    """The oracle is a whole second trunk whose top layers and norm are the branch's; its gradients are autograd's."""
    depth = {"n_layer": 3} if architecture == "gpt2" else {"num_hidden_layers": 3}
    if architecture == "gemma3_text":
        depth |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}  # type: ignore[dict-item]
    policy = Policy(model(architecture, **depth), "branch", branch_layers=num_layers)
    branch = policy.network
    assert isinstance(branch, Branch)
    opinionated(branch.value_head)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in branch.own.values():
            p.add_(0.1 * torch.randn(p.shape, generator=noise))
    whole = Policy(copy.deepcopy(policy.model), "none")
    theirs = dict(whole.model.base_model.named_parameters())
    names = {name: above(name, 3 - num_layers) for name in branch.own}
    with torch.no_grad():
        for name, p in branch.own.items():
            theirs[names[name]].copy_(p)
    expected = critics.read(branch.value_head, whole.hidden(packed))
    found = policy.appraise(packed)
    torch.testing.assert_close(found, expected)
    slopes = torch.randn(len(found), generator=noise)
    gradients = torch.autograd.grad(expected, [theirs[names[name]] for name in branch.own], slopes)
    for ours, gradient in zip(torch.autograd.grad(found, [*branch.own.values()], slopes), gradients, strict=True):
        torch.testing.assert_close(ours, gradient)


def above(name: str, num_lower: int) -> str:
    """layers.0.mlp of a branch above two layers -> layers.2.mlp."""
    head, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"{head}.{int(number) + num_lower}.{rest}" if number.isdigit() else name


def test_a_separate_critic_values_as_transformers_does(packed: Packed, tmp_path: Path) -> None:
    policy = with_network("separate")
    assert isinstance(policy.network, Separate)
    policy.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path / "critic", attn_implementation="eager").eval()
    with torch.no_grad():
        for values, tokens in zip(
            policy.appraise(packed).split(list(packed.lengths)), packed.tokens.split(list(packed.lengths)), strict=True
        ):
            states = stock(input_ids=tokens[None]).last_hidden_state[0]
            torch.testing.assert_close(values, critics.read(policy.network.value_head, states))


@pytest.mark.parametrize("critic", [*OWN, "shared", "detached"])
def test_values_are_of_the_weights_of_now(critic: str, packed: Packed) -> None:
    policy = with_network(critic) if critic in OWN else Policy(model(), critic)
    if policy.value_head is not None:
        opinionated(policy.value_head)
    policy.hidden(packed)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.05)
    found = policy.appraise(packed)
    policy.hidden(packed)
    again = policy.appraise(packed)
    assert torch.equal(again, found)
    assert torch.equal(copy.deepcopy(policy).appraise(packed), found)


def test_a_branch_goes_on_from_the_pass_that_was_made(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = with_network("branch")
    expected = policy.appraise(packed)
    policy.hidden(packed)
    monkeypatch.setattr(Policy, "hidden", lambda *_: pytest.fail("a second pass"))
    assert torch.equal(policy.appraise(packed), expected)


@pytest.mark.parametrize("critic", OWN)
def test_nobody_learns_from_the_other_one_s_loss(critic: str, packed: Packed) -> None:
    policy = with_network(critic)
    assert policy.network is not None
    own = {name for name, _ in policy.named_parameters() if name.startswith("network.")}
    policy.appraise(packed).sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()} <= own
    assert {name for name, p in policy.network.named_parameters() if p.grad is None} <= {"model.embed_tokens.weight"}
    policy.zero_grad()
    policy(packed).logprobs.sum().backward()
    assert not own & {name for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("critic", OWN)
def test_decoding_knows_no_values_and_one_pass_gives_them_all(critic: str) -> None:
    policy = with_network(critic)
    rollouts = generate(policy, ids((3, 5, 2)), Sampling(max_new_tokens=4, stop=(7,)))
    assert all(r.values is None and r.bootstrap == 0.0 for r in rollouts)
    assert policy(pack(rollouts)).values is None
    rollouts = [replace(r, finished=i == 1) for i, r in enumerate(rollouts)]
    packed = pack(rollouts)
    for source in ("rollout", "recompute"):
        with torch.no_grad():
            _, _, values, after = behaviour(policy, packed, rollouts, 1.0, source, bootstrap=True)
            _, _, _, nothing = behaviour(policy, packed, rollouts, 1.0, source)
            states = policy.appraise(packed)
        assert torch.equal(values, states[packed.rows])
        assert torch.equal(after, torch.where(torch.tensor([True, False, True]), states[packed.last], 0.0))
        assert not nothing.any()


def test_decoding_bootstraps_what_is_cut_for_the_other_critics() -> None:
    policy = Policy(model())
    assert policy.value_head is not None
    opinionated(policy.value_head)
    rollouts = generate(policy, ids((3, 5)), Sampling(max_new_tokens=4, bootstrap=True, stop=()))
    packed = pack(rollouts)
    _, _, values, after = behaviour(policy, packed, rollouts, 1.0, "rollout", bootstrap=True)
    with torch.no_grad():
        states = policy.appraise(packed)
    torch.testing.assert_close(values, states[packed.rows])
    torch.testing.assert_close(after, states[packed.last])


def test_a_reference_has_no_critic() -> None:
    assert with_network("branch").frozen_copy().network is None


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", OWN)
def test_the_critic_lies_beside_the_policy(critic: str, packed: Packed, tmp_path: Path) -> None:
    policy = with_network(critic)
    with torch.no_grad():
        for p in policy.network.parameters():  # type: ignore[union-attr]
            p.mul_(1.1)
    policy.save_pretrained(tmp_path)
    assert (
        critics.found(tmp_path, critic)
        == tmp_path / {"branch": "value_branch.safetensors", "separate": "critic"}[critic]
    )
    assert critics.found(tmp_path, "shared") is None
    again = Policy.from_pretrained(tmp_path, critic, branch_layers=1)
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, policy.model.state_dict()[name]) for name, p in stock.state_dict().items())
    assert Policy.from_pretrained(tmp_path, "none").network is None


def test_a_separate_critic_may_be_of_another_size(tmp_path: Path, packed: Packed) -> None:
    big, small = tiny("llama", tmp_path / "big"), tiny("llama", tmp_path / "small", hidden_size=16, num_hidden_layers=1)
    policy = Policy.from_pretrained(big, "separate", critic_model=small)
    assert isinstance(policy.network, Separate)
    assert policy.network.value_head.weight.shape == (1, 16)
    assert not policy.appraise(packed).any()
    theirs = AutoModelForCausalLM.from_pretrained(small).base_model.state_dict()
    assert all(torch.equal(p, policy.network.model.state_dict()[name]) for name, p in theirs.items())
    same = Policy.from_pretrained(big, "separate").network
    assert isinstance(same, Separate)
    assert torch.equal(same.model.get_input_embeddings().weight, policy.model.get_input_embeddings().weight)


def test_from_the_reward_model_the_last_value_is_the_score(box: Box, tmp_path: Path) -> None:
    text = Text.from_pretrained(box["model"])
    config = ppo.Config(
        model=box["model"], prompts="p", steps=1, critic="separate", value_init="reward_model",
        reward_model=box["small_reward_model"], device="cpu",
    )  # fmt: skip
    nobody: Any = SimpleNamespace(resume_from=None, seed=lambda purpose: 0)
    policy, _, scorer = ppo.load(config, nobody, text, [])
    packed = pack([Example(s, []) for s in ([4, 5, 6], [7, 8, 9, 10], [12])])
    with torch.no_grad():
        scores = RewardModel.from_pretrained(box["small_reward_model"])(packed)
        torch.testing.assert_close(policy.appraise(packed)[packed.last], scores, atol=1e-6, rtol=0)
    assert scores.abs().min() > 1e-3
    assert scorer.reward_model is not None


@pytest.mark.parametrize("critic", ["shared", *OWN])
def test_a_drawn_head_is_that_of_a_new_reward_model(critic: str, box: Box, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", critic=critic, value_init="sft", branch_layers=1, learning_rate=0.0)
    assert toys.metrics(run.dir)[0]["value/mean"] != 0.0
    policy = Policy.from_pretrained(run.dir, critic, branch_layers=1)
    head = policy.value_head if policy.network is None else policy.network.value_head
    assert head is not None
    assert 0.5 / math.sqrt(33) < head.weight.std().item() < 2 / math.sqrt(33)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [0, 2, 3])
def test_a_branch_needs_a_trunk_below(num_layers: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^branch_layers: expected 1 to 1 of the model's 2 layers, got {num_layers}$"
    ):
        Policy(model(), "branch", branch_layers=num_layers)


def test_a_branch_of_other_layers_is_refused(tmp_path: Path) -> None:
    Policy(model(num_hidden_layers=3), "branch", branch_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"value_branch\.safetensors: expected a branch of 2 layers, got model\.layers\.1"
    ):
        Policy.from_pretrained(tmp_path, "branch", branch_layers=2)


def test_a_network_and_its_name_belong_together() -> None:
    for critic, network in (("separate", None), ("shared", Separate(classifier().base_model))):
        with pytest.raises(ValueError, match=rf"^critic: expected a network beside .* separate alone, got '{critic}'$"):
            Policy(model(), critic, network=network)
    with pytest.raises(ValueError, match=r"^critic_model: expected a checkpoint beside a policy in memory, got none$"):
        Policy.from_pretrained(model(), "separate")


def test_a_critic_with_another_tokenizer_is_refused(box: Box, tmp_path: Path) -> None:
    other = tiny("llama", tmp_path / "other")
    with pytest.raises(ValueError, match=r"^critic_model: expected the policy's tokenizer \(16 tokens\), got another"):
        toys.train("ppo", box, tmp_path / "run", critic="separate", critic_model=str(other))


# -- learning ----------------------------------------------------------------------------------------------------------

ONCE = {"steps": 1, "epochs": 1, "minibatches": 1, "max_grad_norm": 0.0, "adam_eps": 1e-12, "value_lr_scale": 1.0}


def differences(run: Path, start: dict[str, Tensor], file: str) -> Tensor:
    now = load_file(run / file)
    assert now.keys() == start.keys()
    return torch.stack([(now[name] - start[name]).abs().max() for name in now])


@pytest.mark.parametrize("critic", OWN)
def test_a_critic_has_its_own_learning_rate(critic: str, box: Box, tmp_path: Path) -> None:
    """Adam's first step is the learning rate wherever there is a gradient."""
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 0.02, "value_init": "sft", "branch_layers": 1}
    run = toys.train("ppo", box, tmp_path / "run", critic=critic, **ONCE, **rates).dir
    still = toys.train("ppo", box, tmp_path / "still", critic=critic, **ONCE, **rates | {"learning_rate": 1e-30}).dir
    file = "value_branch.safetensors" if critic == "branch" else "critic/model.safetensors"
    policy = differences(run, load_file(Path(box["model"]) / "model.safetensors"), "model.safetensors")
    assert policy.max().item() == pytest.approx(1e-3, rel=1e-3)
    start = toys.train(
        "ppo", box, tmp_path / "start", critic=critic, **ONCE, **rates | {"critic_learning_rate": 0.0}
    ).dir
    moved = differences(run, load_file(start / file), file)
    assert moved.max().item() == pytest.approx(0.02, rel=1e-3)
    assert differences(still, load_file(run / file), file).max().item() < 1e-6


def test_the_critic_s_gradient_is_clipped_by_itself() -> None:
    def made() -> nn.ModuleDict:
        return nn.ModuleDict({"model": nn.Linear(3, 2, bias=False), "network": nn.Linear(3, 2, bias=False)})

    module, config = made(), ppo.Config(model="m", prompts="p", steps=1, max_grad_norm=1.0)
    optimizer = Optimizer(module, config, 1, apart="network.")
    module["model"].weight.grad, module["network"].weight.grad = torch.full((2, 3), 0.1), torch.full((2, 3), 10.0)
    clipped: dict[str, Tensor] = {}
    optimizer.adam.register_step_pre_hook(
        lambda *_: clipped.update({name: p.grad.clone() for name, p in module.named_parameters()})  # type: ignore[union-attr]
    )
    found = optimizer.step()
    assert found["grad_norm"] == pytest.approx(0.1 * 6**0.5)
    assert found["critic_grad_norm"] == pytest.approx(10 * 6**0.5)
    torch.testing.assert_close(clipped["model.weight"], torch.full((2, 3), 0.1))
    torch.testing.assert_close(clipped["network.weight"], torch.full((2, 3), 6**-0.5))
    module["model"].weight.grad, module["network"].weight.grad = torch.ones(2, 3), torch.full((2, 3), math.nan)
    found = optimizer.step()
    assert (found["grad_norm"], found["critic_grad_norm"], found["skipped_updates"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("critic", ["shared", "detached", *OWN])
def test_while_the_critic_warms_up_the_policy_stays_as_it_was(critic: str, box: Box, tmp_path: Path) -> None:
    options = {"critic": critic, "branch_layers": 1, "weight_decay": 0.1, "ptx_data": box["documents"], "steps": 4}
    run = toys.train("ppo", box, tmp_path / "run", critic_warmup=2, save_every=1, keep_checkpoints=9, **options)
    start = load_file(Path(box["model"]) / "model.safetensors")
    kept = [load_file(run.dir / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3)]
    assert [all(torch.equal(w[name], p) for name, p in start.items()) for w in kept] == [True, True, False]
    heads = {"branch": "value_branch.safetensors", "separate": "critic/value_head.safetensors"}
    first, second = (
        load_file(run.dir / f"checkpoint-{step}" / heads.get(critic, "value_head.safetensors")) for step in (1, 2)
    )
    assert all(p.any() for p in first.values())
    assert all(not torch.equal(first[name], p) for name, p in second.items())
    lines = toys.metrics(run.dir)
    assert ["policy/ptx_loss" in line for line in lines] == [False, False, True, True]
    assert lines[1]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)


def test_the_kl_coefficient_waits_for_the_warm_up(box: Box, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", critic_warmup=2, steps=4, kl_target_nats=0.5, kl_horizon=20)
    coefs = [line["objective/kl_coef"] for line in toys.metrics(run.dir)]
    assert coefs[0] == coefs[1] == coefs[2] == 0.05 != coefs[3]


@pytest.mark.parametrize("critic", OWN)
def test_such_a_critic_foresees_rewards(critic: str, box: Box, tmp_path: Path) -> None:
    def position(prompts: list[str], **_: Any) -> list[float]:
        return [toys.COUNT.index(p.split()[-1]) / 4 for p in prompts]

    run = toys.train(
        "ppo", box, tmp_path / "run", critic=critic, branch_layers=1, steps=25, rollouts_per_step=32,
        learning_rate=1e-3, critic_learning_rate=5e-3, value_lr_scale=1.0, value_clip=10.0, missing_eos_penalty=0.0,
        reward_functions=(),
        reward_funcs=[position],
    )  # fmt: skip
    foreseen = [line["value/explained_variance"] for line in toys.metrics(run.dir)]
    assert foreseen[0] == pytest.approx(0.0, abs=0.05)
    assert sum(foreseen[-3:]) / 3 > 0.2


@pytest.mark.parametrize("critic", OWN)
def test_bootstrapping_reads_the_value_after_a_cut_response(critic: str, box: Box, tmp_path: Path) -> None:
    """With lambda 1 and no other reward, the return of a cut response is the value after it."""
    config = ppo.Config(
        model="m", prompts="p", steps=1, minibatches=1, critic=critic, lam=1.0, kl_coef=0.0, bootstrap_truncated=True,
        missing_eos_penalty=0.0, device="cpu",
    )  # fmt: skip
    policy = with_network(critic)
    tokens = ids((3, 4, 2))
    rollouts = [Rollout([5, 6], t, torch.zeros(len(t)), None, finished=i == 0) for i, t in enumerate(tokens)]
    batch, _ = ppo.examine(policy, policy.frozen_copy(), rollouts, torch.zeros(3), 0.0, config, 0)
    ((e,),) = batch
    with torch.no_grad():
        after = policy.appraise(e.packed)[e.packed.last]
    finished = {tuple(tokens[0])}
    for s, (returns, targets) in enumerate(
        zip(*(x.split(e.packed.cu_rows.diff().tolist()) for x in (e.returns, e.packed.targets)), strict=True)
    ):
        expected = 0.0 if tuple(targets.tolist()) in finished else after[s].item()
        torch.testing.assert_close(returns, torch.full_like(returns, expected), atol=1e-5, rtol=1e-5)
