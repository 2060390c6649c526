"""Adapters that reach the vocabulary's two matrices: kernels, sampler, merged model and peft must all agree."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import toys
from tests.models import ARCHITECTURES, ids, model, tiny
from tests.test_lora import few, move, packed, same, without
from tests.test_meter import Whole
from twinhead.engine import backbone, lora, penalty, ppo, weights
from twinhead.engine.arrangements import arrangements
from twinhead.engine.generate import generate
from twinhead.engine.lora import Lora
from twinhead.engine.optim import Optimizer
from twinhead.engine.planning import plan
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.reference import policy_fingerprint
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text
from twinhead.engine.trunk import set_precision
from twinhead.kernels import linear_ppo_loss

peft = pytest.importorskip("peft")

Box = dict[str, str]
RANK = 4
TARGETS = ("all-linear", "lm_head")
SMALL = Lora(RANK, 3 * RANK, TARGETS)
HEADS = ["llama", "gemma2", "cohere2", "granite", "phi", "gpt2"]  # plain, softcap, two scales, a bias, and tied


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """The toys, a model whose head is its embedding, and a reward model with an adapter on each."""
    folder = tmp_path_factory.mktemp("box")
    paths = toys.box(folder)
    paths["tied"] = toys.language_model(folder / "tied", tie_word_embeddings=True)
    for name in ("model", "tied"):
        chosen = {"model": paths[name], "lora_rank": RANK, "lora_targets": ("all-linear", "embed_tokens")}
        toys.train("reward", paths, folder / f"judge_of_{name}", **chosen, learning_rate=1e-2)
        paths[f"judge_of_{name}"] = str(folder / f"judge_of_{name}")
    return paths


def moved(architecture: str = "llama", dtype: torch.dtype | None = None, **changes: Any) -> Policy:
    """A policy whose adapters are as if they had learned."""
    policy = Policy.from_pretrained(model(architecture, **changes), dtype=dtype, lora=SMALL)
    move(policy.model)
    return policy


def factors(policy: Policy) -> list[torch.nn.Parameter]:
    """A (rank, H) and B (V, rank) of the head."""
    return [p for name, p in lora.tensors(policy.model).items() if "lm_head" in name]


def plain_logits(policy: Policy, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(R, V): the head as Hu et al. 2021 define it, in float64."""
    head, transform = policy.head, policy.logit_transform
    logits = rows @ (head.weight.double() + SMALL.alpha / SMALL.rank * b @ a).T
    logits = logits if head.bias is None else logits + head.bias.double()
    logits = logits * transform.scale
    return logits if transform.softcap is None else torch.tanh(logits / transform.softcap) * transform.softcap


# -- which layers ------------------------------------------------------------------------------------------------------


def test_all_linear_is_the_default_and_the_head_has_to_be_named() -> None:
    made = [model() for _ in range(3)]
    for one, targets in zip(made, ((), ("all-linear",), TARGETS), strict=True):
        lora.attach(one, Lora(RANK, 8, targets))
    default, named, headed = (lora.tensors(one) for one in made)
    assert same(dict(default), dict(named))
    assert same(dict(default), {name: p for name, p in headed.items() if "lm_head" not in name})
    assert {name.rpartition("lm_head.")[2] for name in headed.keys() - default.keys()} == {
        "lora_A.weight",
        "lora_B.weight",
    }
    assert {name.rpartition(".")[2] for name in Lora(RANK, 8, ("lm_head", "q_proj")).layers(model())} == {
        "lm_head",
        "q_proj",
    }
    assert lora.num_weights(model(), SMALL) == sum(p.numel() for p in headed.values())


def test_the_embedding_may_be_named_too() -> None:
    chosen = Lora(RANK, 8, ("embed_tokens", "lm_head"))
    policy = Policy.from_pretrained(model(), dtype=torch.bfloat16, lora=chosen)
    found = lora.tensors(policy.model)
    assert {name.removeprefix(lora.PREFIX): tuple(p.shape) for name, p in found.items()} == {
        "model.embed_tokens.lora_embedding_A": (RANK, 61), "model.embed_tokens.lora_embedding_B": (32, RANK),
        "lm_head.lora_A.weight": (RANK, 32), "lm_head.lora_B.weight": (61, RANK),
    }  # fmt: skip
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert lora.num_weights(model(), chosen) == sum(p.numel() for p in found.values())
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == {
        name for name, p in policy.model.named_parameters() if "lora" in name
    }
    policy(packed()).logprobs.sum().backward()
    assert policy.model.get_input_embeddings().lora_embedding_A["default"].grad.abs().max() > 0  # B is drawn here


def test_a_target_that_is_not_there_is_refused(box: Box, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^lora_targets: expected some of all-linear, .*, lm_head, .*, got 'score'$"):
        Policy.from_pretrained(model(), lora=Lora(RANK, 8, ("score",)))
    sentence = r"^lora_targets: expected some of all-linear, down_proj, embed_tokens, gate_proj, .*, got 'lm_head'$"
    with pytest.raises(ValueError, match=sentence):
        toys.train("reward", box, tmp_path / "run", lora_rank=RANK, lora_targets=TARGETS)


# -- one head, wherever it is multiplied -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("kernel", ["logprob", "ppo"])
def test_gradients_are_those_of_the_definition(kernel: str, architecture: str) -> None:
    policy, batch = moved(architecture), packed()
    rows = policy.hidden(batch)[batch.rows].detach().requires_grad_(True)
    a, b = factors(policy)
    wide = [x.detach().double().requires_grad_(True) for x in (rows, a, b)]
    expected = plain_logits(policy, *wide).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    signs = torch.randn(len(rows), generator=torch.Generator().manual_seed(1))
    if kernel == "logprob":
        found = policy.score(rows, batch).logprobs
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)
        (found * signs).sum().backward()
        (expected * signs).sum().backward()
    else:
        given = {"targets": batch.targets, "old_logprobs": expected.detach().float(), "advantages": signs}
        loss, _ = linear_ppo_loss(**given, **policy.vocabulary(rows))
        loss.backward()
        (-(expected - expected.detach()).exp() * signs).mean().backward()
    for ours, theirs in zip((rows, a, b), wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert theirs.grad.abs().max() > 1e-3
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.logits(rows), plain_logits(policy, *wide).float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", HEADS)
def test_the_sampler_says_what_the_trainer_says(architecture: str) -> None:
    policy = moved(architecture)
    prompts = ids([3, 5, 2])
    rollouts = generate(policy, prompts, Sampling(max_new_tokens=9, seed=3))
    scored = policy(ppo.pack([ppo.Example(r.prompt, r.response) for r in rollouts]))
    sampled = torch.cat([r.logprobs for r in rollouts])
    torch.testing.assert_close(scored.logprobs, sampled, rtol=0, atol=1e-5)
    elsewhere = without(policy)(ppo.pack([ppo.Example(r.prompt, r.response) for r in rollouts]))
    assert (elsewhere.logprobs - sampled).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_half_precision_loses_no_small_step(dtype: str) -> None:
    """B A is below the spacing of every weight: merged, it would be gone."""
    policy = moved(dtype=torch.bfloat16 if dtype == "bfloat16" else None)
    set_precision(policy.model, dtype)
    with torch.no_grad():
        for p in lora.tensors(policy.model).values():
            p.zero_()
        a, b = factors(policy)
        a.fill_(1e-3)
        b[:30].fill_(1e-3)  # 3 * 4 * 1e-6 in every weight of half of the words
        policy.head.weight.clamp_(min=0.05)
    half = policy.head.weight.bfloat16()
    assert torch.equal((half.float() + 3 * b @ a).bfloat16(), half)
    batch = packed()
    rows = policy.hidden(batch)[batch.rows]
    rows = (rows.float().abs() + 10).to(rows.dtype)  # so that all of them sum up: 12e-6 * 32 * 11 = 0.004 nats
    expected = plain_logits(policy, rows.double(), a.double(), b.double()).log_softmax(-1)
    base = plain_logits(policy, rows.double(), 0 * a.double(), b.double()).log_softmax(-1)
    found, unmoved = (p.score(rows, batch).logprobs for p in (policy, without(policy)))
    effect = (expected - base).gather(1, batch.targets[:, None])[:, 0].float()
    assert (effect.abs() > 3e-3).sum() > 10
    torch.testing.assert_close(found - unmoved, effect, rtol=0.05, atol=1e-4)
    found.sum().backward()
    assert a.grad is not None and a.grad.abs().min() > 0
    rollouts = generate(policy, ids([3, 5]), Sampling(max_new_tokens=9))
    scored = policy(ppo.pack([ppo.Example(r.prompt, r.response) for r in rollouts])).logprobs
    assert (scored - torch.cat([r.logprobs for r in rollouts])).abs().mean() < 0.02


@pytest.mark.parametrize("architecture", ["llama", "cohere2", "granite"])
def test_the_exact_divergence_knows_it(architecture: str) -> None:
    policy, batch = moved(architecture), packed()
    reference = without(policy)
    penalty.check_heads(policy, reference)
    rows, ref_rows = (p.hidden(batch)[batch.rows] for p in (policy, reference))
    found = penalty.exact(policy, rows, reference, ref_rows, 0.7)
    ours, theirs = (
        p.logits(states).double().div(0.7).log_softmax(-1) for p, states in ((policy, rows), (reference, ref_rows))
    )
    torch.testing.assert_close(found, (ours.exp() * (ours - theirs)).sum(-1).float(), rtol=1e-4, atol=1e-5)
    assert found.min() > 1e-3


@pytest.mark.parametrize("architecture", HEADS)
def test_the_reference_is_the_base_to_the_last_bit(architecture: str) -> None:
    plain, policy = Policy.from_pretrained(model(architecture)), moved(architecture)
    expected, found = plain(packed()), without(policy)(packed())
    assert torch.equal(found.logprobs, expected.logprobs)
    assert found.entropy is not None and torch.equal(found.entropy, expected.entropy)
    with torch.no_grad(), lora.using(policy.model, None):
        assert torch.equal(policy(packed()).logprobs, expected.logprobs)
    rows = plain.hidden(packed())
    assert torch.equal(without(policy).logits(rows), plain.logits(rows))
    assert policy_fingerprint(without(policy)) == policy_fingerprint(plain) != policy_fingerprint(policy)


def test_new_adapters_change_nothing_and_every_step_counts_as_a_version() -> None:
    plain, policy = (Policy.from_pretrained(model(), lora=chosen) for chosen in (None, SMALL))
    torch.testing.assert_close(policy(packed()).logprobs, plain(packed()).logprobs, rtol=0, atol=1e-6)
    version = policy.version
    with torch.no_grad():
        factors(policy)[1].add_(1.0)
    assert policy.version > version
    addresses = {p.data_ptr() for p in policy.parameters()}  # under which graphs of decoding are kept
    assert {p.data_ptr() for p in factors(policy)} <= addresses


# -- what is saved -----------------------------------------------------------------------------------------------------


def names(architecture: str) -> tuple[str, str]:
    """What an architecture calls its embedding and its head."""
    made = model(architecture)
    words = (made.get_input_embeddings(), made.get_output_embeddings())
    first, second = (next(name for name, m in made.named_modules() if m is one) for one in words)
    return first.rpartition(".")[2], second.rpartition(".")[2]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [*((name, "both") for name in ARCHITECTURES), *((name, one) for name in HEADS for one in ("head", "embedding"))],
)
def test_the_merged_export_is_what_was_trained(architecture: str, tied: bool, targets: str, tmp_path: Path) -> None:
    embedding, head = names(architecture)
    chosen = {"head": (head,), "embedding": (embedding,), "both": (embedding, head)}[targets]
    base = tiny(architecture, tmp_path / "base", tie_word_embeddings=tied)
    policy = Policy.from_pretrained(base, lora=Lora(RANK, 2 * RANK, ("all-linear", *chosen)))
    move(policy.model)
    before, described = {n: t.clone() for n, t in policy.model.state_dict().items()}, policy.model.config.to_dict()
    policy.save_pretrained(tmp_path / "saved")
    assert same(before, policy.model.state_dict())
    assert policy.model.config.to_dict() == described
    read = Policy.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(read(packed()).logprobs, policy(packed()).logprobs, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same(dict(plain.state_dict()), read.model.state_dict())
    assert not plain.config.tie_word_embeddings
    for name, ours, theirs in (
        (embedding, plain.get_input_embeddings(), policy.model.get_input_embeddings()),
        (head, plain.get_output_embeddings(), policy.head),
    ):
        assert (not torch.equal(ours.weight, theirs.weight)) == (name in chosen)


def test_an_export_with_adapters_on_the_trunk_stays_tied(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny("gpt2", tmp_path / "base"), lora=Lora(RANK, 8))
    policy.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert read.config.tie_word_embeddings
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_peft_reads_it(architecture: str, tied: bool, tmp_path: Path) -> None:
    base = tiny(architecture, tmp_path / "base", tie_word_embeddings=tied)
    policy = Policy.from_pretrained(base, lora=Lora(RANK, 8, ("all-linear", *names(architecture))))
    move(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    read = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")  # has softcaps
    theirs = peft.PeftModel.from_pretrained(read, tmp_path / "saved" / lora.FOLDER).eval()
    tokens = torch.tensor(ids([9]))
    states = policy.hidden(ppo.pack([ppo.Example(tokens[0].tolist(), [])]))
    expected = theirs(input_ids=tokens, use_cache=False).logits[0]
    torch.testing.assert_close(policy.logits(states), expected, rtol=0, atol=2e-5)
    assert (expected - without(policy).logits(states)).abs().max() > 1e-2


def test_generation_is_that_of_the_merged_model(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny("llama", tmp_path / "base", tie_word_embeddings=True), lora=SMALL)
    move(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    prompts = ids([3, 5, 2])
    ours, theirs, base = (
        [r.response for r in generate(p, prompts, sampling)]
        for p in (policy, Policy.from_pretrained(tmp_path / "saved"), Policy.from_pretrained(tmp_path / "base"))
    )
    assert ours == theirs != base


# -- stages ------------------------------------------------------------------------------------------------------------

STAGES: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {"lora_targets": ("all-linear", "embed_tokens")},
    "ppo, and the embedding": {"lora_targets": (*TARGETS, "embed_tokens")},
    "ppo": {"ptx_data": "{documents}"},
    "ppo, all on one base": {"reward_model": "{judge_of_model}", "reward_functions": (), "share": "all"},
    "ppo, all on a tied base": {
        "model": "{tied}", "reward_model": "{judge_of_tied}", "reward_functions": (), "share": "all",
    },
    "ppo, exact divergence": {"kl_kind": "full", "kl_in": "loss", "kl_coef": 0.5, "old_logprobs": "recompute"},
    "grpo": {"beta": 0.1},
    "dpo": {"precompute_reference": True},
}  # fmt: skip


@pytest.mark.parametrize("case", STAGES)
def test_a_run_learns_the_head_and_goes_on_bit_by_bit(case: str, box: Box, tmp_path: Path) -> None:
    stage = case.replace(",", "").split()[0]
    given = {name: toys.filled(value, box) for name, value in STAGES[case].items()}
    given = {"lora_rank": RANK, "lora_targets": TARGETS, "save_every": 1, "keep_checkpoints": 99} | given
    run = tmp_path / "run"
    toys.train(stage, box, run, **given | {"learning_rate": 1e-2})
    learned = load_file(run / lora.FOLDER / lora.WEIGHTS)
    if "lm_head" in given["lora_targets"]:
        assert learned["base_model.model.lm_head.lora_B.weight"].abs().max() > 1e-3
    if "embed_tokens" in given["lora_targets"]:
        assert learned["base_model.model.model.embed_tokens.lora_embedding_A"].abs().max() > 1e-3
    metrics, files = toys.metrics(run), toys.files(run)
    if stage == "ppo":
        assert metrics[0]["policy/first_ratio_gap"] < 1e-5
        assert metrics[-1]["mismatch/max"] < 1e-4
    for path in run.iterdir():  # as it was after its first step
        if path.name not in ("checkpoint-1", "metrics.jsonl", "timings.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    toys.train(stage, box, run, **given | {"learning_rate": 1e-2})
    assert toys.metrics(run) == metrics
    again = toys.files(run)
    assert again.keys() == files.keys()
    assert [name for name in files if again[name] != files[name] and name != "timings.jsonl"] == []


def test_a_guest_on_its_base_has_no_part_in_the_head(box: Box, tmp_path: Path) -> None:
    given = {"reward_model": box["judge_of_model"], "reward_functions": (), "lora_rank": RANK, "lora_targets": TARGETS}
    for name, change in (("separate", {"reference": box["model"]}), ("shared", {"share": "all"})):
        toys.train("ppo", box, tmp_path / name, **given, **change)
    ours, theirs = (toys.metrics(tmp_path / name)[-1] for name in ("shared", "separate"))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    policy = Policy.from_pretrained(box["model"], lora=SMALL)
    move(policy.model)
    guest = backbone.reward_model(policy, box["judge_of_model"], Text.from_pretrained(box["model"]))
    expected = policy(few()).logprobs
    torch.testing.assert_close(
        guest(few()), RewardModel.from_pretrained(box["judge_of_model"])(few()), rtol=0, atol=1e-5
    )
    assert torch.equal(policy(few()).logprobs, expected)


def test_a_checkpoint_names_its_targets(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny("llama", tmp_path / "base"), lora=SMALL)
    policy.save_pretrained(tmp_path / "saved")
    assert set(lora.described(tmp_path / "saved").layers(model())) == set(SMALL.layers(model()))
    written = json.loads((tmp_path / "saved" / lora.FOLDER / lora.CONFIG).read_text())
    assert "lm_head" in written["target_modules"]
    assert written["modules_to_save"] is None


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_the_plan_and_the_arrangements_count_it(box: Box) -> None:
    given = toys.options("ppo", box) | {"reward_model": box["judge_of_model"], "reward_functions": (), "share": "all"}
    plain, headed = (ppo.Config(**given, lora_rank=3, lora_targets=t) for t in ((), TARGETS))
    more = 4 * 3 * (32 + len(toys.WORDS))
    for one, other in zip(arrangements(plain), arrangements(headed), strict=True):
        adapted = "rank" in one.name
        assert other.weights - one.weights == (more if adapted else 0)
        assert other.learning - one.learning == (3 * more if adapted else 0)
    before, after = ({part.name: part.bytes for part in plan(chosen).parts} for chosen in (plain, headed))
    described = Lora(RANK, 2 * RANK, ("all-linear", "embed_tokens"))
    size = 4 * (lora.num_weights(weights.load_classifier(box["judge_of_model"]), described) + 32)
    assert before["adapter and head of the reward model"] == after["adapter and head of the reward model"] == size
    grown = {name: after[name] - size for name, size in before.items() if after[name] != size}
    assert {name: grown.pop(name) for name in ("policy", "Adam, 32 bits", "gradients")} == {
        "policy": more, "Adam, 32 bits": 2 * more, "gradients": more,
    }  # fmt: skip
    assert grown.keys() == {"activations of a micro-batch"}


@pytest.mark.parametrize("targets", [(), TARGETS])
def test_an_update_holds_what_was_planned(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Tensors counted as they come and go; the matrix of the fused head and its gradient are among them."""
    drawn = model(vocab_size=1000)
    drawn.save_pretrained(tmp_path)
    chosen = ppo.Config(
        model=str(tmp_path), prompts="p", steps=1, minibatches=1, epochs=1, rollouts_per_step=8, lora_rank=RANK,
        max_prompt_tokens=2, max_new_tokens=12, lora_targets=targets,
    )  # fmt: skip
    trained = Policy.from_pretrained(drawn, lora=Lora.of(chosen))
    rollouts = generate(trained, ids([2] * 8), Sampling(max_new_tokens=12, stop=()))
    batch, _ = ppo.examine(trained, without(trained), rollouts, torch.linspace(-1, 1, 8), 0.1, chosen, 0)
    optimizer = Optimizer(trained, chosen, 2)
    ppo.update(trained, optimizer, batch, None, chosen, random.Random(0))
    with Whole(trained) as meter:
        ppo.update(trained, optimizer, batch, None, chosen, random.Random(0))
    found = {part.name: part.bytes for part in plan(chosen).parts}
    planned = sum(found[part] for part in ("gradients", "activations of a micro-batch", "logits of the fused head"))
    assert math.isclose(meter.peak, planned, rel_tol=0.08)
