"""The policy and its critic: what reaches the trunk, what a checkpoint keeps, and which folders are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.models import ids, model, tiny
from twinhead.engine.batch import Example, Packed, pack
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.weights import VALUE_HEAD

Checkpoint = Callable[..., Path]
EXAMPLES = [Example(p, r) for p, r in zip(ids((3, 1, 7)), ids((4, 9, 2), seed=1), strict=True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A new folder with a tiny model of this architecture."""
    return lambda architecture, **changes: tiny(architecture, tmp_path_factory.mktemp(architecture), **changes)


@pytest.fixture(scope="module")
def llama(checkpoint: Checkpoint) -> Path:
    """A folder to read from."""
    return checkpoint("llama")


@pytest.fixture(scope="module")
def packed() -> Packed:
    return pack(EXAMPLES)


def opinionated(policy: Policy) -> Policy:
    """The same policy with a value head that is not 0."""
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(policy.value_head.bias, 0.3)
    return policy


def stock(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def logits_of(language_model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return language_model(input_ids=torch.tensor(ids((9, 9)))).logits


# -- loading and saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_transformers_reads_what_the_policy_writes(architecture: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(architecture)
    before = logits_of(stock(folder))
    Policy.from_pretrained(folder).save_pretrained(tmp_path)
    assert torch.equal(logits_of(stock(tmp_path)), before)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert ours == theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_tied_and_untied_embeddings_stay_so(
    architecture: str, tied: bool, checkpoint: Checkpoint, tmp_path: Path, packed: Packed
) -> None:
    policy = Policy.from_pretrained(checkpoint(architecture, tie_word_embeddings=tied))
    for saved in (policy, policy.frozen_copy()):
        embeddings, head = saved.model.get_input_embeddings().weight, saved.model.get_output_embeddings().weight
        assert (embeddings is head) is tied
    policy.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again = Policy.from_pretrained(tmp_path)
    assert torch.equal(again(packed).logprobs, policy(packed).logprobs)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("granite", {}),
        ("phi", {}),
    ],
)
def test_gradients_are_those_of_transformers(architecture: str, changes: dict[str, Any], packed: Packed) -> None:
    language_model, policy = model(architecture, **changes), Policy(model(architecture, **changes), "none")
    for example in EXAMPLES:
        tokens = torch.tensor([example.prompt + example.response])
        labels = tokens.clone()
        labels[:, : len(example.prompt)] = -100
        loss = language_model(input_ids=tokens, labels=labels).loss
        (loss * len(example.response)).backward()
    (-policy(packed).logprobs.sum()).backward()
    ours = {name: p.grad for name, p in policy.model.named_parameters()}
    for name, p in language_model.named_parameters():
        torch.testing.assert_close(
            ours[name], p.grad, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("critic", ["shared", "detached"])
def test_the_value_head_lies_beside_the_weights(critic: str, llama: Path, tmp_path: Path, packed: Packed) -> None:
    policy = opinionated(Policy.from_pretrained(llama, critic))
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path, "shared")
    assert torch.equal(again.value_head.weight, policy.value_head.weight)
    assert torch.equal(again.value_head.bias, policy.value_head.bias)
    assert torch.equal(again(packed).values, policy(packed).values)
    assert again(packed).values.abs().max() > 0.1
    assert Policy.from_pretrained(tmp_path, "none").value_head is None


def test_a_policy_without_a_critic_writes_no_value_head(llama: Path, tmp_path: Path) -> None:
    Policy.from_pretrained(llama, "none").save_pretrained(tmp_path)
    assert not (tmp_path / VALUE_HEAD).exists()


def test_a_model_in_memory_is_adopted_as_it_is(packed: Packed, llama: Path) -> None:
    language_model = model()
    policy = Policy.from_pretrained(language_model)
    assert policy.model is language_model
    torch.testing.assert_close(policy(packed).logprobs, Policy.from_pretrained(llama)(packed).logprobs)
    assert Policy.from_pretrained(language_model, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_weights_are_float32_unless_told_otherwise(tmp_path: Path, packed: Packed) -> None:
    model().bfloat16().save_pretrained(tmp_path)
    exact, rounded = Policy.from_pretrained(tmp_path), Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}
    scored = rounded(packed)
    assert {scored.logprobs.dtype, scored.entropy.dtype, scored.values.dtype} == {torch.float32}
    torch.testing.assert_close(scored.logprobs, exact(packed).logprobs, atol=0.1, rtol=0.1)
    assert Policy.from_pretrained(tmp_path, device="meta").device.type == "meta"


# -- the critic --------------------------------------------------------------------------------------------------------


def trunk_gradients(policy: Policy, loss: Tensor) -> set[str]:
    """Names of the parameters outside the value head that the loss reaches."""
    policy.zero_grad()
    loss.backward()
    return {
        name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any() and "value" not in name
    }


@pytest.mark.parametrize(("critic", "reached"), [("shared", True), ("detached", False)])
def test_the_value_loss_reaches_a_shared_trunk_alone(critic: str, reached: bool, packed: Packed) -> None:
    policy = opinionated(Policy(model(), critic))
    names = trunk_gradients(policy, policy(packed).values.square().sum())
    assert bool(names) is reached
    assert "model.lm_head.weight" not in names
    assert all(p.grad.any() for p in policy.value_head.parameters())
    everywhere = {name for name, _ in policy.named_parameters() if "value" not in name}
    assert trunk_gradients(policy, policy(packed).logprobs.sum()) == everywhere


def test_a_new_critic_values_everything_at_zero(packed: Packed) -> None:
    policy = Policy(model())
    values = policy(packed).values
    assert torch.equal(values, torch.zeros(packed.num_targets))
    assert trunk_gradients(policy, (values - 1).square().sum()) == set()
    assert policy.value_head.weight.grad.any()


def test_without_a_critic_there_are_no_values(packed: Packed) -> None:
    policy = Policy(model(), "none")
    assert policy(packed).values is None
    assert policy.value_head is None


def test_a_value_is_that_of_the_state_before_its_token(packed: Packed) -> None:
    policy = opinionated(Policy(model()))
    hidden, head = policy.hidden(packed), policy.value_head
    expected = [(hidden[row] @ head.weight[0] + head.bias[0]).item() for row in packed.rows.tolist()]
    assert policy(packed).values.tolist() == pytest.approx(expected, abs=1e-5)


def test_entropy_and_temperature_are_options_of_scoring(packed: Packed) -> None:
    policy = Policy(model())
    with torch.no_grad():
        logits = policy.logits(policy.hidden(packed)[packed.rows]) / 0.5
        scored, bare = policy(packed, temperature=0.5), policy(packed, temperature=0.5, entropy=False)
    expected = logits.log_softmax(-1).gather(1, packed.targets[:, None]).squeeze(1)
    torch.testing.assert_close(scored.logprobs, expected, atol=1e-5, rtol=1e-5)
    assert bare.entropy is None
    torch.testing.assert_close(bare.logprobs, scored.logprobs)


def test_the_critic_may_start_as_the_normalised_reward_model(llama: Path, checkpoint: Checkpoint) -> None:
    reward = RewardModel.from_language_model(llama)
    reward.mean = 0.7
    policy = Policy.from_pretrained(llama)
    policy.value_from(reward)
    sequences = [Example(s, []) for s in ids((5, 3))]
    packed = pack(sequences)
    torch.testing.assert_close(policy.values(policy.hidden(packed)[packed.last]), reward(packed))
    with pytest.raises(ValueError, match="expected a reward_model to take the value head from, got none"):
        policy.value_from(None)
    with pytest.raises(ValueError, match="expected a reward model of the policy's width 32, got 16"):
        policy.value_from(RewardModel.from_language_model(checkpoint("llama", hidden_size=16)))


def test_an_unknown_critic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"critic: expected one of \('shared', 'detached', .*\), got 'unknown'"):
        Policy(model(), "unknown")


# -- modes and copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_generating_restores_the_mode_also_after_an_exception(training: bool) -> None:
    policy = Policy(model()).train(training)
    with policy.generating():
        assert not policy.training
        assert not policy.model.training
        assert not torch.is_grad_enabled()
        with policy.generating():
            pass
        assert not policy.training
    assert policy.training is policy.model.training is training
    assert torch.is_grad_enabled()
    with pytest.raises(KeyError), policy.generating():
        raise KeyError
    assert policy.training is policy.model.training is training
    assert torch.is_grad_enabled()


def test_a_frozen_copy_stays_what_the_policy_was(packed: Packed) -> None:
    policy = Policy(model("gemma2"))  # tied embeddings, capped logits
    reference = policy.frozen_copy()
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    logprobs = policy(packed).logprobs.detach()
    adam = torch.optim.AdamW(policy.parameters(), lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        (-policy(packed).logprobs.mean()).backward()
        adam.step()
    assert (policy(packed).logprobs - logprobs).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
    scored = reference(packed)
    assert torch.equal(scored.logprobs, logprobs)
    assert not scored.logprobs.requires_grad
    assert scored.values is None


# -- what is refused ---------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, llama: Path) -> None:
    for load in (Policy.from_pretrained, RewardModel.from_pretrained, RewardModel.from_language_model):
        for missing in (tmp_path, tmp_path / "nowhere", "./nowhere"):
            with pytest.raises(ValueError, match=rf"^expected a Hugging Face checkpoint folder .* got '{missing}'$"):
                load(missing)
    with pytest.raises(ValueError, match=r"^'nobody/nothing' cannot be loaded as AutoModelForCausalLM: "):
        Policy.from_pretrained("nobody/nothing")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ValueError, match=r"cannot be loaded as AutoModelForCausalLM: .*no file named"):
        Policy.from_pretrained(tmp_path)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(broken: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    (folder / broken).write_bytes((folder / broken).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded as AutoModelForCausalLM: "):
        Policy.from_pretrained(folder)


def test_missing_and_left_over_tensors_are_refused(checkpoint: Checkpoint) -> None:
    layer = "model.layers.1.mlp.up_proj.weight"
    incomplete = rewritten(checkpoint("llama"), lambda tensors: tensors.pop(layer))
    with pytest.raises(ValueError, match=rf"expected the weights of .*, but it lacks 1 tensors \({layer}\)"):
        Policy.from_pretrained(incomplete)
    crowded = rewritten(checkpoint("llama"), lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"but it has no place for 1 tensors \(extra.weight\)"):
        Policy.from_pretrained(crowded)
    with pytest.raises(ValueError, match=r"but it has no place for 1 tensors \(extra.weight\)"):
        RewardModel.from_language_model(crowded)


def test_weights_of_another_size_are_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    expected = r"expected model.layers.0.mlp.down_proj.weight of shape \(32, 40\), got \(32, 48\)"
    with pytest.raises(ValueError, match=expected):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(architecture)
    with pytest.raises(
        ValueError, match="expected the weights of a reward model with one label, but it lacks 1 tensors"
    ):
        RewardModel.from_pretrained(folder)
    RewardModel.from_language_model(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the weights of a causal language model, but it "):
        Policy.from_pretrained(tmp_path)


def test_a_classifier_with_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**model().config.to_dict() | {"num_labels": 3})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^'{tmp_path}': expected score.weight of shape \(1, 32\), got \(3, 32\)$"):
        RewardModel.from_pretrained(tmp_path)


def test_an_encoder_is_no_policy() -> None:
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be used: "):
        Policy(AutoModelForCausalLM.from_config(config))
