"""Scorers: what a reward function is given, what it may return, and how several sources make one score."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from functools import partial
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toys
from tests.models import EOS, classifier, ids, tiny, tokenizer
from twinhead.engine.batch import Example, Rollout, pack
from twinhead.engine.data import Prompt
from twinhead.engine.policy import RewardModel
from twinhead.engine.scorers import (
    Ensemble,
    RunningScale,
    Scorer,
    check_tokenizer,
    load_function,
    model_scores,
    nonfinite_rows,
    score_with,
)
from twinhead.engine.text import Text

ASKED = [
    Prompt([4, 5], "w4 w5", {"answer": "w9", "level": 1}),
    Prompt([6], "w6", {"answer": "w8"}),
    Prompt([7, 7, 7], "w7 w7 w7", {"level": 3}),
]
RESPONSES = ([9, 8, EOS], [7], [EOS])
ROLLOUTS = [
    Rollout(asked.tokens, response, torch.zeros(len(response)), None, response[-1] == EOS)
    for asked, response in zip(ASKED, RESPONSES, strict=True)
]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(tokenizer())


@pytest.fixture(scope="module")
def reward_model() -> RewardModel:
    model = RewardModel(classifier())
    model.mean = 0.25
    return model


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def index(completions: list[str], **_: Any) -> torch.Tensor:
    return torch.arange(len(completions))


def test_a_function_is_given_text_and_every_column(text: Text) -> None:
    given: dict[str, Any] = {}

    def curious(**columns: Any) -> list[float]:
        given.update(columns)
        return [0.0] * 3

    Scorer(text, None, [curious])(ROLLOUTS, ASKED)
    assert given == {
        "prompts": ["w4 w5", "w6", "w7 w7 w7"],
        "completions": ["w9 w8", "w7", ""],
        "answer": ["w9", "w8", None],
        "level": [1, None, 3],
        "finished": [True, False, True],
        "completion_ids": [[9, 8, EOS], [7], [EOS]],
    }


@pytest.mark.parametrize("name", ["prompts", "completions", "finished", "completion_ids"])
def test_columns_with_the_names_of_arguments_are_refused(name: str) -> None:
    asked = [*ASKED[:2], Prompt([4], "w4", {name: "theirs"})]
    with pytest.raises(ValueError, match=f"prompts: the column '{name}' is an argument of reward functions itself"):
        score_with(length, ROLLOUTS, ["", "", ""], asked)


@pytest.mark.parametrize(
    "returned",
    [[1, 2.5, True], (1.0, 2.5, 1.0), torch.tensor([1.0, 2.5, 1.0]), torch.tensor([1, 2.5, 1]).double().numpy()],
)
def test_scores_may_come_as_any_sequence_of_numbers(returned: Any) -> None:
    scores = score_with(lambda **_: returned, ROLLOUTS, ["", "", ""], ASKED)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.5, 1.0]


def endless(**_: Any) -> Iterator[float]:
    yield 1.0


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ([1.0, 2.0], "2"),
        ([1.0] * 4, "4"),
        ([], "0"),
        (None, "NoneType"),
        (1.0, "float"),
        (torch.tensor(1.0), "Tensor"),
        (endless(), "generator"),
    ],
    ids=["few", "many", "none", "nothing", "number", "scalar", "generator"],
)
def test_the_wrong_number_of_scores_is_refused_by_name(returned: Any, got: str) -> None:
    def careless(**_: Any) -> Any:
        return returned

    with pytest.raises(ValueError, match=f"^reward function careless: expected 3 scores, got {got}$"):
        score_with(careless, ROLLOUTS, ["", "", ""], ASKED)


@pytest.mark.parametrize(("bad", "spelled"), [(None, "None"), ("good", "'good'"), ([1.0], r"\[1.0\]")])
def test_what_is_no_number_is_refused_with_its_row(bad: Any, spelled: str) -> None:
    def careless(**_: Any) -> list[Any]:
        return [1.0, bad, 2.0]

    with pytest.raises(ValueError, match=f"^reward function careless: expected a number for row 1, got {spelled}$"):
        score_with(careless, ROLLOUTS, ["", "", ""], ASKED)


def test_nan_and_infinity_pass_and_are_found(text: Text) -> None:
    scores, parts = Scorer(text, None, [lambda **_: [nan, 1.0, -inf], length])(ROLLOUTS, ASKED)
    assert nonfinite_rows(scores) == [0, 2]
    assert isnan(scores[0])
    assert nonfinite_rows(parts["length"]) == nonfinite_rows(torch.zeros(0)) == []
    assert nonfinite_rows(torch.tensor([0.0, inf])) == [1]


def test_an_error_inside_a_function_is_not_hidden(text: Text) -> None:
    def failing(**_: Any) -> list[float]:
        raise LookupError("no such word")

    with pytest.raises(LookupError, match="no such word"):
        Scorer(text, None, [failing])(ROLLOUTS, ASKED)


def test_the_total_is_the_weighted_sum_of_all_sources(text: Text, reward_model: RewardModel) -> None:
    scorer = Scorer(text, reward_model, [length, index], weights=[2.0, -0.5, 10.0])
    total, parts = scorer(ROLLOUTS, ASKED)
    assert list(parts) == ["reward_model", "length", "index"]
    assert parts["length"].tolist() == [5.0, 2.0, 0.0]
    assert parts["index"].tolist() == [0.0, 1.0, 2.0]
    torch.testing.assert_close(parts["reward_model"], reward_model(pack(ROLLOUTS)))
    torch.testing.assert_close(total, 2 * parts["reward_model"] - 0.5 * parts["length"] + 10 * parts["index"])
    assert total.dtype == torch.float32
    unweighted, _ = Scorer(text, None, [length, index])(ROLLOUTS, ASKED)
    assert unweighted.tolist() == [5.0, 3.0, 2.0]


def test_sources_of_one_name_are_all_counted(text: Text, reward_model: RewardModel) -> None:
    def constant(value: float, **_: Any) -> list[float]:
        return [value] * 3

    constants = [partial(constant, 1.0), partial(constant, 2.0)]
    constants[0].__name__ = constants[1].__name__ = "reward_model"
    total, parts = Scorer(text, reward_model, constants)(ROLLOUTS, ASKED)
    assert len(parts) == 3
    torch.testing.assert_close(total, parts["reward_model"] + 3.0)


def test_sources_and_weights_must_fit(text: Text, reward_model: RewardModel) -> None:
    with pytest.raises(ValueError, match="expected a reward_model or at least one reward function, got neither"):
        Scorer(text, None)
    with pytest.raises(
        ValueError, match=r"reward_weights: expected one per source \(reward_model, length\), got \[1.0\]"
    ):
        Scorer(text, reward_model, [length], [1.0])


# -- ensembles ---------------------------------------------------------------------------------------------------------

COMBINED = {
    "mean": lambda scores, coef: sum(scores) / len(scores),
    "min": lambda scores, coef: min(scores),
    "mean_std": lambda scores, coef: sum(scores) / len(scores) - coef * statistics.pstdev(scores),
}


@pytest.fixture(scope="module")
def members(reward_model: RewardModel) -> list[RewardModel]:
    """Three that differ in all that a member may differ in."""
    wide, narrow = RewardModel(classifier(seed=1)), RewardModel(classifier(seed=2, hidden_size=16))
    (wide.mean, wide.spread), (narrow.mean, narrow.spread) = (-1.0, 4.0), (0.5, 0.1)
    return [reward_model, wide, narrow]


@pytest.mark.parametrize("combine", COMBINED)
def test_members_are_normalised_and_combined(combine: str, members: list[RewardModel], text: Text) -> None:
    scorer = Scorer(text, Ensemble(members, combine, coef=0.7), [length], [1.0, 0.5])
    total, parts = scorer(ROLLOUTS, ASKED)
    with torch.no_grad():
        apart = [((m.raw(pack(ROLLOUTS)) - m.mean) / m.spread).tolist() for m in members]
    expected = [COMBINED[combine](scores, 0.7) for scores in zip(*apart, strict=True)]
    assert list(parts) == ["reward_model", "length", "reward_model/std"]
    assert parts["reward_model"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    deviations = [statistics.pstdev(scores) for scores in zip(*apart, strict=True)]
    assert parts["reward_model/std"].tolist() == pytest.approx(deviations, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(total, parts["reward_model"] + 0.5 * parts["length"])
    assert scorer.reward_models == members


def test_an_ensemble_of_one_says_what_its_member_says(reward_model: RewardModel, text: Text) -> None:
    alone, _ = Scorer(text, reward_model)(ROLLOUTS, ASKED)
    for combine in COMBINED:
        scores, parts = Scorer(text, Ensemble([reward_model], combine))(ROLLOUTS, ASKED)
        torch.testing.assert_close(scores, alone)
        assert not parts["reward_model/std"].any()
    assert Scorer(text, reward_model).reward_models == [reward_model]
    assert Scorer(text, None, [length]).reward_models == []


@pytest.mark.parametrize("spread", [0.0, -1.0, nan, inf])
def test_a_member_without_a_spread_is_refused(spread: float, members: list[RewardModel]) -> None:
    odd = RewardModel(classifier())
    odd.spread = spread
    with pytest.raises(ValueError, match=f"reward_models: expected a spread above 0, got {spread} of member 4"):
        Ensemble([*members, odd])
    with pytest.raises(ValueError, match="reward_models: expected at least one reward model, got none"):
        Ensemble([])


# -- running normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, -3.0, 1e6])
def test_the_running_scale_is_that_of_all_scores_so_far(offset: float) -> None:
    scale, seen = RunningScale(), []
    draw = torch.Generator().manual_seed(0)
    for num in (5, 1, 30, 2):
        scores = offset + num * torch.randn(num, generator=draw, dtype=torch.float64)
        seen += scores.tolist()
        found = scale.normalised(scores)
        assert scale.count == len(seen)
        assert scale.mean == pytest.approx(statistics.fmean(seen), rel=1e-12, abs=1e-12)
        assert scale.std == pytest.approx(statistics.pstdev(seen), rel=1e-9)
        expected = [(score - statistics.fmean(seen)) / statistics.pstdev(seen) for score in scores.tolist()]
        assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_scores_that_never_vary_are_all_zero() -> None:
    scale = RunningScale()
    assert scale.std == 0.0
    for _ in range(2):
        found = scale.normalised(torch.full((3,), 7.0))
        assert found.tolist() == [0.0] * 3
        assert found.dtype == torch.float32


def test_the_state_of_a_running_scale_is_json() -> None:
    first, second = RunningScale(), RunningScale()
    first.normalised(torch.tensor([0.1, 0.7, 3.0]))
    vars(second).update(json.loads(json.dumps(vars(first))))
    more = torch.tensor([2.0, 0.3])
    assert torch.equal(first.normalised(more), second.normalised(more))
    assert vars(first) == vars(second)


def test_ppo_learns_from_normalised_scores(tmp_path: Path) -> None:
    def huge(completions: list[str], **_: Any) -> list[float]:
        return [1000.0 + 500.0 * completion.split().count("good") for completion in completions]

    box = toys.box(tmp_path / "box")
    given = {"missing_eos_penalty": 0.0, "normalise_scores": True, "reward_functions": (), "reward_funcs": [huge]}
    run = toys.train("ppo", box, tmp_path / "run", **given)
    for line in toys.metrics(run.dir):
        assert line["score/huge"] >= 1000
        assert abs(line["objective/score"]) < 3
    first = toys.metrics(run.dir)[0]
    assert (first["objective/score"], first["objective/score_std"]) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert first["score/running_mean"] == first["score/huge"]


@pytest.mark.parametrize("tokens_per_micro", [1, 9, 1000])
def test_model_scores_are_normalised_and_do_not_depend_on_micro_batches(
    reward_model: RewardModel, tokens_per_micro: int
) -> None:
    sequences = [Example(p, r) for p, r in zip(ids((3, 1, 7, 2)), ids((4, 9, 2, 1), seed=1), strict=True)]
    scores = model_scores(reward_model, sequences, tokens_per_micro)
    with torch.no_grad():
        alone = torch.cat([reward_model.raw(pack([s])) - 0.25 for s in sequences])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    assert not scores.requires_grad
    assert scores.dtype == torch.float32


def test_no_sequences_have_no_scores(reward_model: RewardModel) -> None:
    assert model_scores(reward_model, [], 10).shape == (0,)


def test_a_function_is_loaded_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("FACTOR = 2\n\ndef score(prompts, completions, **columns):\n    return [FACTOR] * len(prompts)\n")
    function = load_function(f"{file}:score")
    assert function.__name__ == "score"
    assert score_with(function, ROLLOUTS, ["", "", ""], ASKED).tolist() == [2.0, 2.0, 2.0]
    for missing in ("other", "FACTOR"):
        with pytest.raises(
            ValueError, match=f"reward_functions: expected a function '{missing}' in {file}, found none"
        ):
            load_function(f"{file}:{missing}")


@pytest.mark.parametrize("spec", ["rewards.py", "nowhere.py:score", "score", "", ":", "tests:score", "rewards:score"])
def test_what_spells_no_function_is_refused(spec: str) -> None:
    expected = "file.py:function with an existing file or group_diversity or batch_diversity"
    with pytest.raises(ValueError, match=f"^reward_functions: expected {expected}, got "):
        load_function(spec)


def test_an_error_in_the_file_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("raise LookupError('no such word')")
    with pytest.raises(LookupError, match="no such word"):
        load_function(f"{tmp_path / 'rewards.py'}:score")


def test_the_reward_model_must_read_the_same_token_ids(text: Text, tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    check_tokenizer(str(folder), text)
    other = tokenizer()
    other.add_tokens(["w999"])
    other.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"expected the policy's tokenizer \(61 tokens\), got another one \(62 tokens\)"
    ):
        check_tokenizer(str(folder), text)
