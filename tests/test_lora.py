"""Adapters against a frozen base: what learns, what never moves, what other libraries read, and how models share it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import toys
from tests.models import ARCHITECTURES, ids, model, tiny
from twinhead.engine import backbone, checkpoint, lora, ppo, weights
from twinhead.engine.batch import Example, Packed, pack
from twinhead.engine.lora import Lora
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.reference import policy_fingerprint
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text
from twinhead.engine.trunk import checkpoint_gradients

peft = pytest.importorskip("peft")

Box = dict[str, str]
RANK = 4
SMALL = Lora(RANK, 2 * RANK)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """The toys, and a reward model with an adapter on their model."""
    folder = tmp_path_factory.mktemp("box")
    paths = toys.box(folder)
    toys.train("reward", paths, folder / "judge", lora_rank=RANK, learning_rate=1e-2)
    return paths | {"judge": str(folder / "judge"), "other": toys.language_model(folder / "other", seed=1)}


def packed(seed: int = 0) -> Packed:
    return pack([Example(sequence[:2], sequence[2:]) for sequence in ids([7, 3, 12], seed)])


def few(vocabulary: int = len(toys.WORDS)) -> Packed:
    """Tokens of the toys' vocabulary."""
    return pack([Example([n % vocabulary, 5], [(3 * n + k) % vocabulary for k in range(6)]) for n in range(4)])


def move(module: nn.Module, seed: int = 0) -> None:
    """Draw the adapter that learns at random: as if it had learned."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.tensors(module).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- what learns -------------------------------------------------------------------------------------------------------


def test_new_adapters_change_nothing_and_alone_learn() -> None:
    plain, adapted = Policy.from_pretrained(model()), Policy.from_pretrained(model(), lora=SMALL)
    assert torch.equal(plain(packed()).logprobs, adapted(packed()).logprobs)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0] for name in learning if "lora" not in name} == {"value_head"}
    scored = adapted(packed())
    (scored.logprobs.sum() + scored.values.sum()).backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == learning
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters()}
    version = adapted.version
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0).step()
    moved = {name for name, p in adapted.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_B" in name}  # the gradient of A is 0 while B is
    assert adapted.version > version


def test_adapters_are_drawn_from_their_seed_and_stay_float32() -> None:
    found = [model() for _ in range(3)]
    state = torch.random.get_rng_state()
    for made, seed in zip(found, (0, 0, 1), strict=True):
        lora.attach(made, Lora(RANK, 8, seed=seed))
    first, again, other = ({n: p.detach() for n, p in lora.tensors(made).items()} for made in found)
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    half = Policy.from_pretrained(model(), dtype=torch.bfloat16, lora=SMALL)
    assert {p.dtype for p in lora.tensors(half.model).values()} == {torch.float32}
    assert {t.dtype for t in lora.base(half.model).values()} == {torch.bfloat16}
    assert half(packed()).logprobs.isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "gemma2"])
def test_every_linear_layer_of_the_trunk_is_a_target(architecture: str) -> None:
    made = model(architecture)
    linear = {n for n, m in made.base_model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    lora.attach(made, SMALL)
    assert {name.removeprefix(f"{made.base_model_prefix}.") for name in lora.layers(made)} == linear
    assert not isinstance(made.get_output_embeddings(), peft.tuners.lora.LoraLayer)


def test_targets_are_chosen_by_name() -> None:
    made = model()
    lora.attach(made, Lora(RANK, 8, ("q_proj", "v_proj")))
    assert {name.rpartition(".")[2] for name in lora.layers(made)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"^lora_targets: expected some of all-linear, .*v_proj, got 'score'$"):
        Policy.from_pretrained(model(), lora=Lora(RANK, 8, ("q_proj", "score")))


@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj")])
def test_the_numbers_in_adapters_are_counted(targets: tuple[str, ...]) -> None:
    chosen = Lora(RANK, 8, targets)
    expected = lora.num_weights(model(), chosen)
    made = model()
    lora.attach(made, chosen)
    assert expected == sum(p.numel() for p in lora.tensors(made).values())


# -- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_merged_export_is_what_was_trained(architecture: str, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny(architecture, tmp_path / "base"), lora=Lora(RANK, 2 * RANK))
    move(policy.model)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    policy.save_pretrained(tmp_path / "saved")
    assert same(before, policy.model.state_dict())
    ours = policy(packed())
    theirs = Policy.from_pretrained(tmp_path / "saved")(packed())
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, rtol=0, atol=1e-5)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same(dict(read.state_dict()), Policy.from_pretrained(tmp_path / "saved").model.state_dict())
    assert not lora.attached(read)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_peft_reads_the_adapter_of_a_policy(architecture: str, tmp_path: Path) -> None:
    base = tiny(architecture, tmp_path / "base")
    policy = Policy.from_pretrained(base, lora=SMALL)
    move(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "saved" / lora.FOLDER
    ).eval()
    tokens = torch.tensor(ids([9]))
    rows = pack([Example(tokens[0].tolist(), [])])
    expected = theirs(input_ids=tokens, use_cache=False).logits[0]
    torch.testing.assert_close(policy.logits(policy.hidden(rows)), expected, rtol=0, atol=2e-5)
    assert (expected - policy.logits(without(policy).hidden(rows))).abs().max() > 1e-2


def without(policy: Policy) -> Policy:
    found = backbone.reference(policy)
    assert found is not None
    return found


def test_peft_and_transformers_read_a_reward_model(box: Box) -> None:
    tokens = torch.tensor([[0, 5, 6, 12, 13, 1]])
    rows = pack([Example(tokens[0].tolist(), [])])
    merged = RewardModel.from_pretrained(box["judge"])
    plain = AutoModelForSequenceClassification.from_pretrained(box["judge"], dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(box["model"], num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, f"{box['judge']}/{lora.FOLDER}").eval()
    for found in (plain(input_ids=tokens).logits, theirs(input_ids=tokens).logits):
        torch.testing.assert_close(found[0], merged.raw(rows), rtol=0, atol=1e-5)
    described = json.loads((Path(box["judge"]) / lora.FOLDER / lora.CONFIG).read_text())
    assert (described["task_type"], described["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert described["base_model_name_or_path"] == box["model"]


def test_a_merged_checkpoint_is_a_base_like_any_other(box: Box, tmp_path: Path) -> None:
    toys.train("sft", box, tmp_path / "sft", lora_rank=RANK)
    again = Policy.from_pretrained(tmp_path / "sft", lora=SMALL)
    assert torch.equal(again(few()).logprobs, Policy.from_pretrained(tmp_path / "sft")(few()).logprobs)


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name in ("first", "second"):

        def write(folder: Path, name: str = name) -> None:
            (folder / "adapter").mkdir()
            (folder / "adapter" / name).write_text("new")

        checkpoint.merge_folder(tmp_path / "run", write)
    assert list(toys.files(tmp_path / "run")) == ["adapter/second"]


# -- what never moves --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every policy and reward model that a stage made, as it is after training."""
    made: list[Any] = []
    for cls, name in ((Policy, "from_pretrained"), (RewardModel, "from_language_model")):
        original = getattr(cls, name).__func__

        def remembering(cls: type, *args: Any, original: Callable = original, **options: Any) -> Any:
            made.append(original(cls, *args, **options))
            return made[-1]

        monkeypatch.setattr(cls, name, classmethod(remembering))
    return made


STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"model": "{model}"},
    "sft": {},
    "reward": {},
    "ppo": {"ptx_data": "{documents}"},
    "ppo, all on one base": {"reward_model": "{judge}", "reward_functions": (), "share": "all"},
    "ppo with an average": {"ema_decay": 0.9, "eval_every": 1, "eval_prompts": "{heldout}"},
    "grpo": {"beta": 0.1},
    "dpo": {},
    "dpo with a table": {"precompute_reference": True},
    "dpo of answers": {"data": "{unpaired}", "eval_data": "{labelled}", "loss": "kto"},
}


@pytest.mark.parametrize("case", STAGES)
def test_one_base_is_loaded_and_never_written_to(case: str, box: Box, tmp_path: Path, trained: list[Any]) -> None:
    given = {name: toys.filled(value, box) for name, value in STAGES[case].items()}
    toys.train(case.replace(",", "").split()[0], box, tmp_path / "run", lora_rank=RANK, learning_rate=1e-2, **given)
    assert len(trained) == 1
    held = trained[0].model
    plain = RewardModel.from_language_model if case == "reward" else Policy.from_pretrained
    expected = dict(plain(box["model"]).model.state_dict())
    found = lora.base(held)
    for head in ("score.weight",):  # which learns
        assert (head in found) == (case == "reward") == (found.pop(head, None) is not None)
        expected.pop(head, None)
    assert same(found, expected)
    assert all(bool(p.any()) for name, p in lora.tensors(held).items() if "lora_B" in name)


def test_the_optimizer_holds_adapters_and_heads_alone(box: Box, tmp_path: Path) -> None:
    given = {"reward_model": box["judge"], "reward_functions": (), "share": "all"}
    toys.train("ppo", box, tmp_path / "run", lora_rank=RANK, **given)
    state = load_file(tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors")
    owners = {name.rsplit(".", 1)[0] for name in state}
    policy = Policy.from_pretrained(box["model"], lora=SMALL)
    assert owners == {name for name, p in policy.named_parameters() if p.requires_grad}
    toys.train("reward", box, tmp_path / "judge", lora_rank=RANK)
    state = load_file(tmp_path / "judge" / "checkpoint-10" / "optimizer.safetensors")
    assert {name.rsplit(".", 1)[0] for name in state if "lora" not in name} == {"model.score.weight"}


def test_the_reference_is_the_base_to_the_last_bit() -> None:
    plain, policy = Policy.from_pretrained(model(), "none"), Policy.from_pretrained(model(), lora=SMALL)
    expected = plain(packed())
    for seed in (None, 0, 1):
        if seed is not None:
            move(policy.model, seed)
        found = without(policy)(packed())
        assert torch.equal(found.logprobs, expected.logprobs)
        assert torch.equal(found.entropy, expected.entropy)
        assert found.values is None
        assert not found.logprobs.requires_grad
    assert (policy(packed()).logprobs - expected.logprobs).abs().max() > 1e-2
    assert policy_fingerprint(without(policy)) == policy_fingerprint(plain) != policy_fingerprint(policy)
    assert backbone.reference(plain) is None


def test_a_view_owns_nothing() -> None:
    policy = Policy.from_pretrained(model(), lora=SMALL)
    view = without(policy).requires_grad_(False).eval()
    assert not list(view.parameters())
    assert any(p.requires_grad for p in lora.tensors(policy.model).values())


@pytest.mark.parametrize("adapter", [None, "second"])
def test_what_was_on_is_on_again_whatever_happens(adapter: str | None, tmp_path: Path) -> None:
    tiny("llama", tmp_path / "base")
    second = Policy.from_pretrained(tmp_path / "base", lora=Lora(2, 4, ("q_proj",)))
    move(second.model, seed=5)
    second.save_pretrained(tmp_path / "second")
    policy = Policy.from_pretrained(tmp_path / "base", lora=SMALL)
    move(policy.model)
    expected, flags = policy(packed()).logprobs, [p.requires_grad for p in policy.parameters()]
    assert not lora.load(policy.model, tmp_path / "second", "second")
    assert torch.equal(policy(packed()).logprobs, expected)
    assert [p.requires_grad for name, p in policy.named_parameters() if "second" not in name] == flags
    assert not any(p.requires_grad for p in lora.tensors(policy.model, "second").values())
    flags, version = [p.requires_grad for p in policy.parameters()], policy.version
    other = without(policy) if adapter is None else second
    with torch.no_grad(), lora.using(policy.model, adapter):
        torch.testing.assert_close(policy(packed()).logprobs, other(packed()).logprobs, rtol=0, atol=1e-6)
        with lora.using(policy.model, None):
            inside = policy(packed()).logprobs
        torch.testing.assert_close(policy(packed()).logprobs, other(packed()).logprobs, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="halfway"), lora.using(policy.model, adapter):
        raise RuntimeError("halfway")
    assert torch.equal(policy(packed()).logprobs, expected)
    assert torch.equal(inside, without(policy)(packed()).logprobs)
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert policy.version == version


def test_a_frozen_policy_with_adapters_stays_frozen() -> None:
    policy = Policy.from_pretrained(model(), lora=SMALL).requires_grad_(False)
    without(policy)(packed())
    assert not any(p.requires_grad for p in policy.parameters())


def test_gradients_are_the_same_with_checkpointing_and_between_views() -> None:
    found = []
    for several in (False, True):
        policy = Policy.from_pretrained(model(), lora=SMALL)
        move(policy.model)
        if several:
            checkpoint_gradients(policy.model)
            without(policy)(packed())
        scored = policy(packed())
        if several:
            without(policy)(packed(seed=1))
        scored.logprobs.sum().backward()
        found.append([p.grad for p in lora.tensors(policy.model).values()])
    torch.testing.assert_close(found[0], found[1])


def test_generation_is_that_of_the_merged_model(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny("llama", tmp_path / "base"), lora=SMALL)
    move(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    prompts = ids([3, 5, 2])
    ours, theirs, base = (
        [r.response for r in ppo.generate(p, prompts, sampling)]
        for p in (policy, Policy.from_pretrained(tmp_path / "saved"), Policy.from_pretrained(tmp_path / "base"))
    )
    assert ours == theirs != base


# -- one base for all --------------------------------------------------------------------------------------------------


def guest(box: Box, policy: Policy, path: str | None = None) -> backbone.GuestRewardModel:
    return backbone.reward_model(policy, path or box["judge"], Text.from_pretrained(box["model"]))


def test_a_guest_scores_as_the_reward_model_alone(box: Box) -> None:
    policy = Policy.from_pretrained(box["model"], lora=SMALL)
    move(policy.model)
    before = policy(few()).logprobs
    alone, shared = RewardModel.from_pretrained(box["judge"]), guest(box, policy)
    assert (shared.mean, shared.spread) == (alone.mean, alone.spread)
    assert shared.mean != 0
    torch.testing.assert_close(shared(few()), alone(few()), rtol=0, atol=1e-5)
    assert shared(few()).std() > 1e-3
    assert torch.equal(policy(few()).logprobs, before)
    assert sum(p.numel() for p in shared.parameters()) == 32


def test_all_four_weigh_little_more_than_one(tmp_path: Path) -> None:
    """Where rank is small beside width: at width 256 two adapters of rank 4 are 7%."""
    base = Path(toys.language_model(tmp_path / "base", hidden_size=256, intermediate_size=688, num_attention_heads=8))
    judge = RewardModel.from_language_model(base, lora=SMALL)
    judge.save_pretrained(tmp_path / "judge")
    toys.tokenizer().save_pretrained(tmp_path / "judge")
    policy = Policy.from_pretrained(base, lora=SMALL)
    views = (backbone.reference(policy), guest({"model": str(base)}, policy, str(tmp_path / "judge")))
    held = {p.data_ptr(): p.nbytes for module in (policy, *views) for p in module.parameters()}
    one = sum(p.nbytes for p in weights.load_causal_lm(base).parameters())
    assert one < sum(held.values()) <= 1.15 * one


def test_sharing_learns_what_separate_models_learn(box: Box, tmp_path: Path) -> None:
    given = {"reward_model": box["judge"], "reward_functions": (), "lora_rank": RANK}
    for name, change in (("separate", {"reference": box["model"]}), ("shared", {"share": "all"})):
        toys.train("ppo", box, tmp_path / name, **given, **change)
    ours, theirs = (toys.metrics(tmp_path / name)[-1] for name in ("shared", "separate"))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_several_guests_are_an_ensemble(box: Box, tmp_path: Path) -> None:
    judges = (box["judge"], str(tmp_path / "second"))
    toys.train("reward", box, judges[1], lora_rank=2, seed=1, learning_rate=1e-2)
    given = {"reward_models": judges, "ensemble": "min", "reward_functions": (), "lora_rank": RANK}
    for name, change in (("separate", {}), ("shared", {"share": "all"})):
        toys.train("ppo", box, tmp_path / name, **given, **change)
    ours, theirs = (toys.metrics(tmp_path / name)[0] for name in ("shared", "separate"))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in STAGES if case != "pretrain"])
def test_a_run_goes_on_bit_by_bit(case: str, box: Box, tmp_path: Path) -> None:
    stage = case.replace(",", "").split()[0]
    given = {name: toys.filled(value, box) for name, value in STAGES[case].items()}
    given |= {"lora_rank": RANK, "save_every": 1, "keep_checkpoints": 99}
    run = tmp_path / "run"
    toys.train(stage, box, run, **given)
    metrics, files = toys.metrics(run), toys.files(run)
    for path in run.iterdir():  # as it was after its first step
        if path.name not in ("checkpoint-1", "metrics.jsonl", "timings.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    toys.train(stage, box, run, **given)
    assert toys.metrics(run) == metrics
    again = toys.files(run)
    assert again.keys() == files.keys()
    assert [name for name in files if again[name] != files[name] and name != "timings.jsonl"] == []


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(box: Box, tmp_path: Path) -> None:
    for options, wanted in (({}, "float32"), ({"dtype": torch.bfloat16}, "bfloat16")):
        policy = Policy.from_pretrained(box["model" if options else "other"], lora=SMALL, **options)
        with pytest.raises(
            ValueError, match=rf"judge': expected an adapter that was trained on this base, '.*' in {wanted}, got one"
        ):
            guest(box, policy)


def test_a_reward_model_without_an_adapter_is_refused(box: Box, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(box["model"], lora=SMALL)
    with pytest.raises(ValueError, match=r"reward_model': expected a checkpoint of training with lora_rank, got"):
        guest(box, policy, box["reward_model"])
    policy.save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^reward_model: expected an adapter with a score head, got a policy's in '"):
        guest(box, policy, str(tmp_path))


def test_nothing_to_adapt_is_refused(box: Box, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^lora_rank: expected 0 for a model without weights, got 4$"):
        toys.train("pretrain", box, tmp_path / "run", lora_rank=RANK)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_rank": -1}, "lora_rank: expected at least 0 (0: all weights learn), got -1"),
        ({"lora_alpha": 8}, "lora_alpha: expected at least 1, with lora_rank, got 8"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha: expected at least 1, with lora_rank, got 0"),
        ({"lora_targets": ("q_proj",)}, "lora_targets: expected none without lora_rank, got ('q_proj',)"),
        ({"share": "some"}, "share: expected none or all, got 'some'"),
        ({"share": "all"}, "lora_rank: expected above 0 with share=all, whose base is frozen, got 0"),
        (
            {"share": "all", "lora_rank": 4},
            "reward_model: expected a reward model trained with lora_rank, with share=all, got ''",
        ),
        (
            {"share": "all", "lora_rank": 4, "reward_model": "r", "reference": "s"},
            "reference: expected none with share=all, where it is the base, got 's'",
        ),
        (
            {"share": "all", "lora_rank": 4, "reward_model": "r", "offload": True, "device": "cuda"},
            "offload: expected False with share=all: there is nothing to send away, got True",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        ppo.Config(model="m", prompts="p", steps=1, **options)
    assert str(caught.value) == sentence
