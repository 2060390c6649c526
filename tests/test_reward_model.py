"""The reward model: a language model's whole trunk, one new number per sequence, and what transformers makes of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from tests.models import ARCHITECTURES, EOS, PAD, ids, tiny
from twinhead.engine.batch import Example, pack
from twinhead.engine.policy import RewardModel
from twinhead.engine.trunk import packed_pass

CLASSIFIERS = [name for name in ARCHITECTURES if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
SEQUENCES = [Example(p, r) for p, r in zip(ids((3, 1, 7, 2)), ids((4, 9, 2, 1), seed=1), strict=True)]


class Checkpoint(Protocol):
    def __call__(self, architecture: str) -> Path: ...


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The folder of a tiny language model, to read from."""
    return cache(lambda architecture: tiny(architecture, tmp_path_factory.mktemp(architecture)))


def scores_by_transformers(folder: Path, sequences: list[Example]) -> Tensor:
    """(S,): right padding, an attention mask, and transformers' own search for the last token."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    assert classifier.config.num_labels == 1
    rows = [torch.tensor(s.prompt + s.response) for s in sequences]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    with torch.no_grad():
        return classifier(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits.squeeze(1)


def test_most_architectures_have_a_classifier() -> None:
    assert set(ARCHITECTURES) - set(CLASSIFIERS) == {"granite", "cohere2"}


def test_an_architecture_without_a_classifier_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded as AutoModelForSequenceClassification: .*GraniteConfig"):
        RewardModel.from_language_model(checkpoint("granite"))


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_saved_reward_model_scores_the_same_in_transformers(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    reward = RewardModel.from_language_model(checkpoint(architecture))
    with torch.no_grad():
        raw = reward.raw(pack(SEQUENCES))
    assert raw.shape == (4,)
    assert raw.std() > 0.1
    reward.save_pretrained(tmp_path)
    torch.testing.assert_close(scores_by_transformers(tmp_path, SEQUENCES), raw, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_the_trunk_of_the_language_model_is_kept_whole(architecture: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(architecture)
    theirs = AutoModelForCausalLM.from_pretrained(folder).base_model.state_dict()
    reward = RewardModel.from_language_model(folder).model
    ours = reward.base_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    rest = {id(p) for p in reward.parameters()} - {id(p) for p in reward.base_model.parameters()}
    assert rest == {id(reward.score.weight)}
    assert reward.score.bias is None


def test_the_new_head_is_drawn_from_its_seed(checkpoint: Checkpoint) -> None:
    heads = [RewardModel.from_language_model(checkpoint("llama"), seed).model.score.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (1, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    drawn = torch.cat([RewardModel.from_language_model(checkpoint("llama"), s).model.score.weight for s in range(20)])
    assert drawn.std().item() == pytest.approx(1 / 33**0.5, rel=0.1)
    assert abs(drawn.mean().item()) < 0.02


def test_scores_are_normalised_and_the_file_remembers_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reward, packed = RewardModel.from_language_model(checkpoint("qwen2")), pack(SEQUENCES)
    assert reward.mean == 0.0
    assert torch.equal(reward(packed), reward.raw(packed))
    reward.mean = 1.2345678901234567
    reward.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert again.mean == reward.mean
    assert torch.equal(again.raw(packed), reward.raw(packed))
    torch.testing.assert_close(again(packed), reward.raw(packed) - 1.2345678901234567)
    again.mean = -2.0
    again.save_pretrained(tmp_path)
    assert RewardModel.from_pretrained(tmp_path).mean == -2.0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_score_does_not_depend_on_what_is_packed_beside_it(architecture: str, checkpoint: Checkpoint) -> None:
    reward = RewardModel.from_language_model(checkpoint(architecture))
    with torch.no_grad():
        together = reward(pack(SEQUENCES))
        alone = torch.cat([reward(pack([sequence])) for sequence in SEQUENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_score_is_read_at_the_last_token_whatever_it_is(checkpoint: Checkpoint) -> None:
    reward = RewardModel.from_language_model(checkpoint("llama"))
    body, ends = [5, 6, 7], ([], [EOS], [PAD], [EOS, EOS])
    with torch.no_grad():
        scores = reward(pack([Example(body, end) for end in ends]))
        hidden = packed_pass(reward.model, pack([Example([*body, EOS, EOS], [])]))
    expected = hidden @ reward.model.score.weight[0]
    torch.testing.assert_close(scores[[0, 1, 3]], expected[[2, 3, 4]])
    assert len(set(scores.tolist())) == 4


def test_bfloat16_scores_are_float32(checkpoint: Checkpoint) -> None:
    exact, rounded = (RewardModel.from_language_model(checkpoint("llama"), dtype=d) for d in (None, torch.bfloat16))
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    scores = rounded(pack(SEQUENCES))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact(pack(SEQUENCES)), atol=0.1, rtol=0.1)
    assert not torch.equal(scores, scores.bfloat16().float())
    assert RewardModel.from_language_model(checkpoint("llama"), device="meta").device.type == "meta"
