"""The reward model: a language model's whole trunk, one new number per sequence, and what transformers makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from tests import toys
from tests.models import ARCHITECTURES, EOS, PAD, ids, tiny
from twinhead.engine import data, losses, reward
from twinhead.engine.batch import Example, pack
from twinhead.engine.evaluate import reward_accuracy
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.scorers import model_scores
from twinhead.engine.text import Text
from twinhead.engine.trunk import packed_pass

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
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


# -- objectives --------------------------------------------------------------------------------------------------------

SCORES, RANKS = [0.3, -1.2, 2.0, 0.7, 0.1, -0.4, 1.5, 1.5, 0.0], [1, 3, 2, 0, 1, 0, 5, 5, 5]
GROUPS = (range(4), range(4, 6), range(6, 9))  # a ranking of four, a pair, three ties
CU_GROUPS = torch.tensor([0, 4, 6, 9])


def scored() -> Tensor:
    return torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)


def probability(scores: list[float], order: tuple[int, ...]) -> float:
    """Of an order, the best first, as Plackett and Luce have it."""
    left, product = list(order), 1.0
    for best in order:
        product *= math.exp(scores[best]) / sum(math.exp(scores[i]) for i in left)
        left.remove(best)
    return product


def test_the_listwise_loss_is_the_log_probability_of_the_ranking() -> None:
    total = 0.0
    for order in permutations(range(4)):
        ranks = torch.tensor([order.index(i) for i in range(4)])
        loss = losses.plackett_luce(scored()[:4], ranks, torch.tensor([0, 4]))
        assert loss.item() == pytest.approx(-math.log(probability(SCORES[:4], order)) / 3)
        total += math.exp(-3 * loss.item())
    assert total == pytest.approx(1.0)


def test_ties_are_not_chosen_from_each_other() -> None:
    a, b, c = SCORES[:3]
    loss = losses.plackett_luce(scored()[:3], torch.tensor([0, 0, 1]), torch.tensor([0, 3]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(c - a)) + math.log1p(math.exp(c - b))) / 2)


def test_the_listwise_loss_of_a_pair_is_the_pairwise_one_margin_included() -> None:
    margin, pair = torch.tensor([0.4], dtype=torch.float64), (scored()[4:6], torch.tensor([1, 0]), torch.tensor([0, 2]))
    torch.testing.assert_close(losses.plackett_luce(*pair, margin), losses.kwise(*pair, margin))
    torch.testing.assert_close(losses.plackett_luce(*pair), losses.kwise(*pair))
    assert losses.plackett_luce(*pair, margin) > losses.plackett_luce(*pair)


def test_centring_is_the_mean_square_of_the_sums_of_pairs() -> None:
    found = losses.centring(scored(), torch.tensor(RANKS), CU_GROUPS).tolist()
    for group, value in zip(GROUPS, found, strict=True):
        sums = [SCORES[i] + SCORES[j] for i, j in combinations(group, 2) if RANKS[i] != RANKS[j]]
        assert value == pytest.approx(sum(x * x for x in sums) / max(len(sums), 1))


@pytest.mark.parametrize("loss", [losses.kwise, losses.plackett_luce, losses.centring])
def test_every_objective_of_a_ranking(loss: Loss) -> None:
    ranks, scores = torch.tensor(RANKS), scored()
    together = loss(scores, ranks, CU_GROUPS)
    alone = [loss(scores[group], ranks[group], torch.tensor([0, len(group)])) for group in map(list, GROUPS)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together[2] == 0.0  # all are tied
    assert torch.autograd.gradcheck(lambda x: loss(x, ranks, CU_GROUPS), scores)
    assert loss(scores[:0], ranks[:0], torch.tensor([0])).shape == (0,)
    far = scores.detach().mul(1e4).requires_grad_()
    assert torch.autograd.grad(loss(far, ranks, CU_GROUPS).sum(), far)[0].isfinite().all()


def trained(box: dict[str, str], folder: Path, **changes: object) -> tuple[RewardModel, dict[str, float]]:
    """A reward model and the last line of its metrics."""
    rows = {"data": toys.comparisons(96), "eval_data": toys.comparisons(32, seed=5)}
    options = {"batch_size": 8, "learning_rate": 3e-3} | rows | changes
    run = toys.train("reward", box, folder, **options)
    return RewardModel.from_pretrained(run.dir), toys.metrics(run.dir)[-1]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return toys.box(tmp_path_factory.mktemp("box"))


def test_no_ranking_sees_a_constant(checkpoint: Checkpoint) -> None:
    assert RewardModel.from_language_model(checkpoint("llama")).model.score.bias is None
    ranks = torch.tensor(RANKS)
    for loss in (losses.kwise, losses.plackett_luce):
        torch.testing.assert_close(loss(scored() + 7.5, ranks, CU_GROUPS), loss(scored(), ranks, CU_GROUPS))


def test_a_reward_model_learns_from_whole_rankings(box: dict[str, str], tmp_path: Path) -> None:
    _, found = trained(box, tmp_path / "run", loss="listwise")
    assert found["eval/micro"] > 0.98


def test_more_than_one_epoch_is_warned_of(
    box: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs, warned in ((1, False), (2, True)):
        trained(box, tmp_path / f"{epochs}", epochs=epochs)
        assert (f"epochs: {epochs}, where more than one overfits" in capsys.readouterr().err) == warned
        steps = [line["step"] for line in toys.metrics(tmp_path / f"{epochs}") if "eval/micro" in line]
        assert steps == [12, 24][:epochs]


def test_centring_keeps_raw_scores_near_zero(box: dict[str, str], tmp_path: Path) -> None:
    free, centred = (trained(box, tmp_path / f"{coef}", centring_coef=coef)[1] for coef in (0.0, 0.3))
    assert centred["centring"] < 0.5 * free["centring"]
    assert centred["eval/micro"] > 0.95


def test_the_accuracy_of_every_labeler_is_reported(box: dict[str, str], tmp_path: Path) -> None:
    judged = [*toys.conflict(32, seed=5), *toys.comparisons(4)]  # the last ones by nobody knows whom
    model, found = trained(box, tmp_path / "run", eval_data=judged)
    assert {name for name in found if "labeler" in name} == {"eval/labeler/ann", "eval/labeler/7"}
    assert found["eval/labeler/ann"] > 0.95
    assert found["eval/labeler/7"] < 0.05
    theirs = data.comparisons(judged[1:32:2], Text.from_pretrained(box["model"]), 16)
    assert [c.labeler for c in theirs] == ["7"] * 16
    assert found["eval/labeler/7"] == reward_accuracy(model, theirs).micro


# -- the scale of scores -----------------------------------------------------------------------------------------------


def test_the_spread_is_that_of_answers_to_one_prompt(box: dict[str, str], tmp_path: Path) -> None:
    model, found = trained(box, tmp_path / "run")
    rankings = data.comparisons(toys.comparisons(96), Text.from_pretrained(box["model"]), 16)
    squares: list[float] = []
    with torch.no_grad():
        for ranking in rankings:
            scores = model.raw(pack(ranking.examples)).tolist()
            squares += [(score - sum(scores) / len(scores)) ** 2 for score in scores]
    assert model.spread == found["spread"] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-4)
    assert model.spread != 1.0


def test_demonstrations_may_be_given_a_deviation_of_1(box: dict[str, str], tmp_path: Path) -> None:
    """The lm-human-preferences rule, gain = 1 / std and bias = -gain * mean; the order of answers stays."""
    (plain, before), (scaled, found) = (
        trained(box, tmp_path / name, demonstrations=box["demonstrations"], normalisation=name)
        for name in ("mean", "mean_std")
    )
    shown = data.demonstrations(box["demonstrations"], Text.from_pretrained(box["model"]), 16)
    scores, unscaled = (model_scores(model, shown, 10_000).double() for model in (scaled, plain))
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    deviation = unscaled.std(correction=0).item()
    torch.testing.assert_close(scores, unscaled / deviation, rtol=1e-4, atol=1e-5)
    assert found["spread"] == pytest.approx(before["spread"] / deviation, rel=1e-4)
    assert found["eval/micro"] == before["eval/micro"]
    again = RewardModel.from_pretrained(tmp_path / "mean_std")
    assert torch.equal(model_scores(again, shown, 10_000).double(), scores)


def test_a_deviation_needs_demonstrations_that_differ(box: dict[str, str], tmp_path: Path) -> None:
    row = {"prompt": "one", "completion": "good"}
    with pytest.raises(ValueError, match=r"^normalisation: expected at least 2 demonstrations for mean_std, got 1$"):
        trained(box, tmp_path / "one", demonstrations=[row], normalisation="mean_std")
    with pytest.raises(ValueError, match=r"^normalisation: expected demonstrations whose scores differ, got a dev"):
        trained(box, tmp_path / "two", demonstrations=[row, row], normalisation="mean_std")


# -- the ablation ------------------------------------------------------------------------------------------------------


def test_flattened_pairs_are_comparisons_of_their_own() -> None:
    examples = [Example([4], [i]) for i in range(4)]
    pairs = data.Comparison(examples, [1, 0, 1, 2], 0.5, "ann").pairs()
    assert [[e.response[0] for e in pair.examples] for pair in pairs] == [[0, 3], [1, 0], [1, 2], [1, 3], [2, 3]]
    assert {(tuple(pair.ranks), pair.margin, pair.labeler) for pair in pairs} == {((0, 1), 0.5, "ann")}


def test_flattened_pairs_are_shuffled_apart(
    box: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rankings: K forwards of a prompt in one step. Flattened: two for each pair, in any step of the epoch."""
    rows = [{"prompt": word, "completions": ["good", "bad", "bad good"], "ranks": [0, 2, 1]} for word in toys.COUNT]
    seen: list[list[int]] = []
    update = reward.update

    def spy(model: RewardModel, optimizer: Any, batch: Any, config: Any) -> dict[str, float]:
        seen.append([e.prompt[-1] for c in batch for e in c.examples])
        return update(model, optimizer, batch, config)

    monkeypatch.setattr(reward, "update", spy)
    for flatten, forwards in ((False, 3), (True, 6)):
        seen.clear()
        trained(box, tmp_path / f"{flatten}", data=rows, batch_size=3, flatten_pairs=flatten)
        prompts = sorted({prompt for step in seen for prompt in step})
        assert [sum(step.count(prompt) for step in seen) for prompt in prompts] == [forwards] * len(rows)
        assert flatten == any(sum(prompt in step for step in seen) > 1 for prompt in prompts)


def test_pairs_are_as_flat_as_can_be(box: dict[str, str], tmp_path: Path) -> None:
    pairs = [{"prompt": word, "chosen": "good", "rejected": "bad"} for word in toys.COUNT]
    (_, whole), (_, flat) = (trained(box, tmp_path / f"{f}", data=pairs, flatten_pairs=f) for f in (False, True))
    assert whole == flat


def test_members_are_trained_by_their_seeds(box: dict[str, str], tmp_path: Path) -> None:
    first, again, other = (trained(box, tmp_path / f"{i}", seed=seed)[0] for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(first.model.score.weight, again.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)


def test_a_checkpoint_without_a_spread_has_one_of_1(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reward = RewardModel.from_language_model(checkpoint("llama"))
    assert reward.spread == 1.0
    reward.spread = 0.12345678901234567
    reward.save_pretrained(tmp_path)
    assert RewardModel.from_pretrained(tmp_path).spread == reward.spread


def test_a_small_reward_model_teaches_a_larger_policy(box: dict[str, str], tmp_path: Path) -> None:
    small, found = trained(box, tmp_path / "reward", model=box["small_model"], learning_rate=1e-2, epochs=2)
    policy = Policy.from_pretrained(box["model"], "none")
    assert 3 * sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in policy.parameters())
    assert found["eval/micro"] > 0.95
    run = toys.train(
        "ppo", box, tmp_path / "ppo", steps=25, rollouts_per_step=32, learning_rate=3e-3, missing_eos_penalty=0.0,
        reward_model=str(tmp_path / "reward"), reward_functions=(box["rewards"] + ":goodness",),
        reward_weights=(1.0, 0.0), prompts=toys.prompts(64),
    )  # fmt: skip
    good = [line["score/goodness"] for line in toys.metrics(run.dir)]
    assert sum(good[-5:]) / 5 > sum(good[:5]) / 5 + 0.3
