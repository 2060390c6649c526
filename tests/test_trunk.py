"""One trunk pass serves every architecture that is accepted, and those it would serve wrongly are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout
from transformers import PreTrainedModel

from tests.models import ARCHITECTURES, MAX_LENGTH, REFUSED, VOCABULARY, WINDOW, ids, model
from twinhead.engine import attention, trunk
from twinhead.engine.attention import Ragged, Slots
from twinhead.engine.batch import Example, pack
from twinhead.engine.policy import Policy
from twinhead.engine.trunk import LogitTransform

LENGTHS = (3, 2 * WINDOW + 3, 1, WINDOW)
SEQUENCES = ids(LENGTHS)


def stock_logits(language_model: PreTrainedModel, sequence: list[int]) -> Tensor:
    """(n, V): transformers' own eager attention, one sequence, no padding."""
    with torch.no_grad():
        return language_model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_sequences_equal_separate_ones(architecture: str) -> None:
    truth = torch.cat([stock_logits(model(architecture), sequence) for sequence in SEQUENCES])
    policy = Policy(model(architecture))
    packed = pack([Example([], sequence) for sequence in SEQUENCES])
    with torch.no_grad():
        logits = policy.logits(policy.hidden(packed))
        scored = policy(packed)
    torch.testing.assert_close(logits, truth, atol=1e-5, rtol=1e-5)
    expected = truth.log_softmax(-1)[packed.rows]
    logprobs = expected.gather(1, packed.targets[:, None]).squeeze(1)
    torch.testing.assert_close(scored.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.entropy, -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_changes_nothing_before_it(architecture: str) -> None:
    policy = Policy(model(architecture))
    changed = list(SEQUENCES[3])
    place = len(changed) // 2
    changed[place] = 4 if changed[place] != 4 else 5
    with torch.no_grad():
        before, after = (policy.logits(policy.hidden(pack([Example([], s)]))) for s in (SEQUENCES[3], changed))
    torch.testing.assert_close(after[:place], before[:place], atol=1e-5, rtol=1e-5)
    assert (after[place] - before[place]).abs().max() > 1e-3


def test_shapes() -> None:
    """Four sequences of 30 tokens: (T,) ids, (T, H) hidden states, (R,) numbers; (R, V) logits when they are asked."""
    policy = Policy(model("gpt2"))
    width, words = policy.model.config.hidden_size, policy.model.config.vocab_size
    packed = pack([Example(sequence[:10], sequence[10:]) for sequence in ids((30,) * 4)])
    hidden, scored = policy.hidden(packed), policy(packed)
    assert packed.tokens.shape == packed.positions.shape == (4 * 30,)
    assert hidden.shape == (4 * 30, width)
    assert packed.rows.shape == packed.targets.shape == (4 * 20,)
    assert scored.logprobs.shape == scored.entropy.shape == scored.values.shape == (4 * 20,)
    assert policy.logits(hidden[packed.rows]).shape == (4 * 20, words)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_the_neighbours_of_a_sequence_do_not_reach_it(architecture: str) -> None:
    policy = Policy(model(architecture))
    with torch.no_grad():
        middle = policy.hidden(pack([Example([], s) for s in SEQUENCES])).split(LENGTHS)[1]
        others = [SEQUENCES[3], SEQUENCES[1], *ids((7, 30), seed=1)]
        elsewhere = policy.hidden(pack([Example([], s) for s in others])).split([len(s) for s in others])[1]
    torch.testing.assert_close(middle, elsewhere, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slots_of_different_length_decode_what_the_full_pass_says(architecture: str) -> None:
    language_model = model(architecture)
    policy = Policy(language_model)
    with torch.no_grad():
        whole = policy.hidden(pack([Example([], s) for s in SEQUENCES])).split(LENGTHS)
        cache = policy.new_cache(4, 20)
        first = policy.prefill(pack([Example(SEQUENCES[3][:3], []), Example(SEQUENCES[1][:2], [])]), cache, [0, 1])
        torch.testing.assert_close(first, torch.stack([whole[3][2], whole[1][1]]), atol=1e-5, rtol=1e-5)
        cache.copy(1, 2, 2)  # the slot it leaves is refilled by another prompt
        policy.prefill(pack([Example(SEQUENCES[0][:1], [])]), cache, [1])
        for step in (0, 1):
            at = torch.tensor([3, 1, 2]) + step
            fed = [SEQUENCES[s][t] for s, t in zip((3, 0, 1), at.tolist(), strict=True)]
            out = policy.decode(torch.tensor(fed), at, int(at.max()) + 1, cache)
            expected = torch.stack([whole[s][t] for s, t in zip((3, 0, 1), at.tolist(), strict=True)])
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "transform"),
    [
        ("llama", LogitTransform()),
        ("gemma2", LogitTransform(1.0, 2.0)),
        ("granite", LogitTransform(1 / 3)),
        ("cohere2", LogitTransform(0.25)),
    ],
)
def test_the_head_is_scaled_and_capped_as_the_configuration_says(architecture: str, transform: LogitTransform) -> None:
    assert Policy(model(architecture)).logit_transform == transform


def test_logits_are_scaled_before_they_are_capped() -> None:
    logits = torch.tensor([4.0, -1.0], dtype=torch.bfloat16)
    capped = LogitTransform(0.5, 3.0)(logits)
    assert capped.dtype == torch.float32
    torch.testing.assert_close(capped, 3.0 * torch.tanh(torch.tensor([2.0, -0.5]) / 3.0))


REASONS = {
    "bloom": "expected 2 calls of the attention function in one pass",
    "falcon": "expected 2 calls of the attention function in one pass",
    "gptj": "expected 2 calls of the attention function in one pass",
    "mamba": "expected 2 calls of the attention function in one pass",
    "stablelm": "does not hand keyword arguments",
    "gpt_oss": "attention sinks",
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_an_architecture_that_would_be_wrong_is_refused_by_name(architecture: str) -> None:
    language_model = model(architecture)
    with pytest.raises(
        ValueError, match=rf"^{type(language_model).__name__} cannot be used: .*{REASONS[architecture]}"
    ):
        Policy(language_model)


def test_sequences_that_leak_into_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = attention._ragged

    def without_borders(*args: Any) -> Tensor:
        return ragged(*args[:3], Ragged((sum(args[3].lengths),), args[3].cu_seqlens[[0, -1]]), *args[4:])

    monkeypatch.setattr(attention, "_ragged", without_borders)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM cannot be used: packed sequences differ from separate ones by"
    ):
        Policy(model())


def test_a_decode_step_that_reads_the_wrong_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Slots.mask

    def blind(slots: Slots, window: int | None) -> Tensor:
        return mask(replace(slots, positions=slots.positions - 1, masks={}), window)

    monkeypatch.setattr(Slots, "mask", blind)
    with pytest.raises(ValueError, match="decoding from the cache differs from the full pass by"):
        Policy(model())


def test_logits_that_the_head_alone_does_not_explain_are_noticed() -> None:
    language_model = model()
    language_model.config.final_logit_softcapping = 1.0  # which Llama's modelling code does not read
    with pytest.raises(
        ValueError, match=r"the logits are not hidden @ weight.T with a scale and a softcap: they differ by"
    ):
        Policy(language_model)


def test_noise_that_nobody_switched_off_is_noticed() -> None:
    language_model = model()
    noisy = language_model.model.layers[0].mlp
    noisy.register_forward_hook(lambda module, _, out: dropout(out, training=module.training))
    with pytest.raises(ValueError, match="training mode differs from evaluation mode by"):
        Policy(language_model)


def test_what_the_model_cannot_read_is_refused_before_any_work() -> None:
    language_model = model()
    fitting = [Example([4] * 40, [VOCABULARY - 1] * (MAX_LENGTH - 40)), Example([0], [])]
    trunk.check_fit(language_model, fitting)
    trunk.check_fit(language_model, fitting[1:], MAX_LENGTH - 1)
    with pytest.raises(ValueError, match=f"expected at most the model's {MAX_LENGTH} tokens, got 97"):
        trunk.check_fit(language_model, [*fitting, Example([4] * 96, [5])])
    with pytest.raises(ValueError, match=f"the model's {MAX_LENGTH} tokens, got 1 and 96 new ones"):
        trunk.check_fit(language_model, fitting[1:], MAX_LENGTH)
    with pytest.raises(
        ValueError, match=r"expected token ids in \[0, 61\), the rows of the model's embedding, got 4..61: "
    ):
        trunk.check_fit(language_model, [Example([4], [VOCABULARY])])


def test_the_self_check_leaves_the_model_in_the_mode_it_was_in() -> None:
    training, evaluating = model().train(), model().eval()
    for language_model, mode in ((training, True), (evaluating, False)):
        trunk.self_check(language_model)
        assert language_model.training is mode
    with pytest.raises(ValueError, match="cannot be used"):
        trunk.self_check(refused := model("bloom").train())
    assert refused.training


@pytest.mark.parametrize(
    ("architecture", "dropouts"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt_neox", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5}),
    ],
)
def test_dropout_is_off_in_training_too(architecture: str, dropouts: dict[str, float]) -> None:
    policy, packed = Policy(model(architecture, **dropouts)), pack([Example([4, 5], [6, 7, 8])] * 8)
    evaluated = policy.eval()(packed).logprobs
    trained = [policy.train()(packed).logprobs for _ in range(5)]
    assert all(torch.equal(logprobs, evaluated) for logprobs in trained)
