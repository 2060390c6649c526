"""Every stage learns a toy, holds still at learning rate 0, and leaves checkpoints that Hugging Face reads."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import toys
from twinhead.engine import ppo, sft
from twinhead.engine.batch import Example, Rollout, pack
from twinhead.engine.data import demonstrations, documents
from twinhead.engine.evaluate import perplexity
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.text import Text

Box = dict[str, str]
LAST = slice(-5, None)
LONG = {"steps": 24, "rollouts_per_step": 32, "epochs": 3, "minibatches": 2, "max_new_tokens": 6, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


@pytest.fixture(scope="module")
def pretrained(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to count."""
    table = {"data": toys.documents(64), "eval_data": toys.documents(16, seed=5)}
    shape = {"steps": 40, "batch_size": 16, "max_length": 12}
    return toys.train("pretrain", box, tmp_path_factory.mktemp("pretrained") / "run", **table, **shape).dir


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in toys.metrics(folder) if name in line]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def goodness(completions: list[str], **columns: Any) -> list[float]:
    """The share of tokens that spell "good"."""
    return [c.split().count("good") / len(ids) for c, ids in zip(completions, columns["completion_ids"], strict=True)]


def goodness_and_question(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Goodness, and much more that the prompt alone decides: what a critic can know beforehand."""
    good = goodness(completions, **columns)
    return [g + toys.COUNT.index(p.split()[-1]) / 4 for g, p in zip(good, prompts, strict=True)]


# -- learning ----------------------------------------------------------------------------------------------------------


def test_pretraining_learns_what_follows(pretrained: Path) -> None:
    losses = column(pretrained, "loss")
    assert losses[0] == pytest.approx(math.log(len(toys.WORDS)), abs=0.1)
    assert mean(losses[LAST]) < 0.75  # where a text begins and ends is chance: about 0.5 of it stays
    assert column(pretrained, "eval/loss")[-1] < 0.75
    assert column(pretrained, "eval/ppl")[-1] == pytest.approx(math.exp(column(pretrained, "eval/loss")[-1]))


def test_fine_tuning_falls_to_its_floor(box: Box, tmp_path: Path) -> None:
    table = {"data": toys.demonstrations(64), "eval_data": toys.demonstrations(16, seed=5)}
    run = toys.train("sft", box, tmp_path / "run", steps=50, batch_size=16, **table)
    losses = column(run.dir, "loss")
    assert losses[0] > 2.5
    assert mean(losses[LAST]) < 0.02
    assert column(run.dir, "eval/loss")[-1] < 0.02
    assert len(column(run.dir, "eval/loss")) == 13  # 12 whole epochs of 4 batches, and the last step


def test_held_out_rows_are_measured_where_an_epoch_ends(box: Box, tmp_path: Path) -> None:
    """40 rows in batches of 16: three steps an epoch. The last epoch is cut, and measured all the same."""
    run = toys.train("sft", box, tmp_path / "run", epochs=3, steps=8, batch_size=16)
    lines = toys.metrics(run.dir)
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6, 8]
    for line in lines[2::3]:
        assert line["eval/ppl"] == pytest.approx(math.exp(line["eval/loss"]))
    text = Text.from_pretrained(run.dir)
    held_out = perplexity(Policy.from_pretrained(run.dir, "none"), demonstrations(box["heldout"], text, 16))
    assert held_out.loss == pytest.approx(lines[-1]["eval/loss"], rel=1e-6)


PPO_LOG = """
    objective/kl objective/kl_token objective/kl_coef objective/score objective/score_std objective/rlhf_reward
    objective/non_score_reward policy/approx_kl policy/approx_kl_k3 policy/clipfrac policy/ratio_mean policy/ratio_max
    policy/first_ratio_gap policy/entropy policy/grad_norm policy/pg_loss policy/vf_loss policy/vf_clipfrac
    policy/learning_rate policy/num_updates value/explained_variance value/mean returns/mean returns/std adv/mean
    adv/abs_mean rollout/length_mean rollout/eos_rate rollout/distinct mismatch/mean mismatch/max score/goodness
"""
GRPO_LOG = """
    objective/score objective/score_std objective/kl policy/approx_kl policy/approx_kl_k3 policy/ref_kl policy/clipfrac
    policy/ratio_mean policy/ratio_max policy/first_ratio_gap policy/entropy policy/grad_norm policy/loss adv/abs_mean
    rollout/length_mean rollout/eos_rate rollout/distinct rollout/groups rollout/flat_groups mismatch/mean
"""


@pytest.mark.parametrize(("stage", "names", "given"), [("ppo", PPO_LOG, {}), ("grpo", GRPO_LOG, {"beta": 0.1})])
def test_every_line_of_the_log_has_the_names(
    stage: str, names: str, given: dict[str, Any], box: Box, tmp_path: Path
) -> None:
    """Who reads a log relies on them. `kl` is that from the reference, `approx_kl` that from the sampler."""
    for line in toys.metrics(toys.train(stage, box, tmp_path / "run", **given).dir):
        assert set(names.split()) <= line.keys(), set(names.split()) - line.keys()


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_later_passes_are_taken_to_the_same_behaviour(stage: str, box: Box, tmp_path: Path) -> None:
    """The stored log-probs stay through all epochs: 1 at first, and something else once the policy has moved."""
    found = [
        toys.metrics(toys.train(stage, box, tmp_path / f"{n}", steps=1, epochs=n, minibatches=1).dir)[0] for n in (1, 3)
    ]
    assert all(line["policy/first_ratio_gap"] < 1e-5 for line in found)
    assert found[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert found[1]["policy/ratio_max"] > 1.001


def test_the_reward_model_learns_the_rule(box: Box, tmp_path: Path) -> None:
    table = {"data": toys.comparisons(96), "eval_data": toys.comparisons(32, seed=5)}
    run = toys.train("reward", box, tmp_path / "run", batch_size=8, learning_rate=3e-3, **table)
    assert column(run.dir, "loss")[0] == pytest.approx(math.log(2), abs=0.2)
    assert mean(column(run.dir, "accuracy")[LAST]) > 0.98
    assert column(run.dir, "eval/micro")[-1] > 0.98
    assert column(run.dir, "eval/macro")[-1] > 0.98


def test_demonstrations_average_zero_under_the_reward_model(box: Box, tmp_path: Path) -> None:
    rows = [{"prompt": "one two", "completion": "good good"}, {"prompt": "two one", "completion": "bad"}]
    run = toys.train("reward", box, tmp_path / "run", demonstrations=rows)
    model = RewardModel.from_pretrained(run.dir)
    text = Text.from_pretrained(run.dir)
    examples = [Example(text.prompt(r["prompt"]), text.completion(r["completion"])) for r in rows]
    with torch.no_grad():
        assert model(pack(examples)).mean().item() == pytest.approx(0.0, abs=1e-6)
    assert model.mean == column(run.dir, "demonstration_mean")[-1] != 0.0


def test_ppo_earns_more_and_its_critic_foresees_it(box: Box, tmp_path: Path) -> None:
    run = toys.train(
        "ppo", box, tmp_path / "run", **LONG | {"steps": 36}, missing_eos_penalty=0.0,
        reward_functions=(), reward_funcs=[goodness_and_question, goodness], reward_weights=(1.0, 0.0),
    )  # fmt: skip
    good, foreseen = column(run.dir, "score/goodness"), column(run.dir, "value/explained_variance")
    assert mean(good[:3]) < 0.1
    assert mean(good[LAST]) > 0.25
    assert foreseen[0] == pytest.approx(0.0, abs=0.05)
    assert mean(foreseen[LAST]) > 0.3
    assert column(run.dir, "objective/kl")[0] == pytest.approx(0.0, abs=1e-4)
    assert column(run.dir, "objective/kl")[-1] > 1.0


def test_the_mix_keeps_the_language(box: Box, pretrained: Path, tmp_path: Path) -> None:
    def lm_loss(policy: Policy) -> dict[str, float]:
        held_out = documents(toys.documents(16, seed=5), Text.from_pretrained(pretrained), 12)
        return {"lm_loss": perplexity(policy, held_out).loss}

    lost = {}
    for name, mix in (("without", ""), ("with", box["documents"])):
        run = toys.train(
            "ppo", box, tmp_path / name, **LONG | {"steps": 10}, model=str(pretrained), kl_coef=0.0,
            evaluate=lm_loss, eval_every=5, ptx_data=mix, ptx_batch_size=16, ptx_max_length=12,
        )  # fmt: skip
        assert len(column(run.dir, "eval/lm_loss")) == 2
        lost[name] = column(run.dir, "eval/lm_loss")[-1]
    assert lost["with"] < 0.8
    assert lost["with"] < lost["without"] - 0.3
    assert len(column(run.dir, "policy/ptx_loss")) == 10


# -- learning rate 0, and other things that must change nothing --------------------------------------------------------


@pytest.fixture(scope="module")
def lively(box: Box, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose distributions are far from uniform."""
    return toys.language_model(tmp_path_factory.mktemp("lively") / "model", initializer_range=0.3)


STILL = {"learning_rate": 0.0, "epochs": 3, "minibatches": 3, "rollouts_per_step": 12, "tokens_per_micro": 20}


def test_the_ratio_is_exactly_one_while_nothing_moves(box: Box, lively: str, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", model=lively, old_logprobs="recompute", **STILL)
    for line in toys.metrics(run.dir):
        assert line["policy/num_updates"] == 9
        assert line["policy/ratio_max"] == 1.0
        assert line["policy/first_ratio_gap"] == 0.0
        assert line["policy/clipfrac"] == line["policy/approx_kl"] == line["policy/approx_kl_k3"] == 0.0
        assert line["policy/vf_clipfrac"] == 0.0
        assert line["policy/entropy"] < 2.6  # of log 16 = 2.77: the test would say little about a uniform policy


def test_the_sampler_agrees_with_the_trainer(box: Box, lively: str, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", model=lively, num_slots=5, **STILL)
    for line in toys.metrics(run.dir):
        assert abs(line["policy/ratio_max"] - 1.0) < 1e-5
        assert line["policy/first_ratio_gap"] < 1e-5
        assert 0 < line["mismatch/mean"] <= line["mismatch/p99"] <= line["mismatch/max"] < 1e-5
        assert line["mismatch/kl"] < 1e-9 and line["mismatch/outside"] == 0.0
        assert line["policy/clipfrac"] == 0.0


def test_a_sampler_that_is_off_is_noticed_and_corrected(
    box: Box, lively: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A sampler that takes every token for e^0.3 times likelier than it is."""

    def off(*arguments: Any, **settings: Any) -> list[Rollout]:
        return [replace(r, logprobs=r.logprobs + 0.3) for r in generate(*arguments, **settings)]

    monkeypatch.setattr(ppo, "generate", off)
    found = {}
    for name, options in {
        "rollout": {},
        "recompute": {"old_logprobs": "recompute", "mismatch_alarm": 0.5},
        "capped": {"old_logprobs": "recompute", "importance_cap": 0.5},
    }.items():
        run = toys.train("ppo", box, tmp_path / name, model=lively, value_coef=0.0, **STILL, **options)
        found[name] = toys.metrics(run.dir)[0]
        warned = "sampler and trainer disagree by 3.0e-01 nats" in " ".join(capsys.readouterr().err.split())
        assert warned == (name != "recompute")
        assert found[name]["mismatch/mean"] == pytest.approx(0.3, abs=1e-4)
        assert found[name]["mismatch/outside"] == 1.0
    assert found["rollout"]["policy/ratio_max"] == pytest.approx(math.exp(-0.3), abs=1e-4)
    assert found["recompute"]["policy/ratio_max"] == found["capped"]["policy/ratio_max"] == 1.0
    # every token weighs min(e^-0.3, 0.5)
    halved = found["recompute"]["policy/grad_norm"] / 2
    assert found["capped"]["policy/grad_norm"] == pytest.approx(halved, rel=1e-4)


@pytest.mark.parametrize("stage", toys.TRAIN)
def test_learning_rate_0_changes_no_weight(stage: str, box: Box, tmp_path: Path) -> None:
    run = toys.train(
        stage, box, tmp_path / "run", learning_rate=0.0, weight_decay=0.1, save_every=1, keep_checkpoints=9
    )
    first, *others = [load_file(path) for path in run.dir.rglob("model.safetensors")]
    assert len(others) >= 3
    for weights in others:
        assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("stage", toys.TRAIN)
def test_the_micro_batch_size_changes_nothing(stage: str, box: Box, tmp_path: Path) -> None:
    ptx = {"ptx_data": box["documents"], "ptx_batch_size": 4} if stage == "ppo" else {}
    whole, half, single = (
        toys.metrics(toys.train(stage, box, tmp_path / str(n), tokens_per_micro=n, learning_rate=1e-4, **ptx).dir)
        for n in (10_000, 30, 1)
    )
    for cut in (half, single):
        for expected, line in zip(whole, cut, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_each_rollout_is_used_as_often_as_there_are_epochs(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, learned = Counter(), Counter()
    spy(monkeypatch, ppo, "generate", lambda rollouts: sampled.update(tuple(r.prompt + r.response) for r in rollouts))
    count_sequences_with_gradient(monkeypatch, learned)
    toys.train("ppo", box, tmp_path / "run", epochs=3, minibatches=3, tokens_per_micro=20)
    assert sum(sampled.values()) == 24
    assert learned == Counter({sequence: 3 * times for sequence, times in sampled.items()})


def test_each_demonstration_is_used_once_an_epoch(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = Counter()
    count_sequences_with_gradient(monkeypatch, learned)
    toys.train("sft", box, tmp_path / "run", steps=0, epochs=3, batch_size=7, tokens_per_micro=20)
    text = Text.from_pretrained(box["model"])
    rows = toys.demonstrations(40)
    given = Counter(tuple(text.prompt(row["prompt"]) + text.completion(row["completion"])) for row in rows)
    assert learned == Counter({sequence: 3 * times for sequence, times in given.items()})


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str, see: Callable[[Any], None]) -> None:
    """Let `see` look at every result of owner.name."""
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        see(result)
        return result

    patch.setattr(owner, name, watched)


def count_sequences_with_gradient(patch: pytest.MonkeyPatch, counter: Counter) -> None:
    hidden = Policy.hidden

    def counted(self: Policy, packed: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            counter.update(tuple(part.tolist()) for part in packed.tokens.split(list(packed.lengths)))
        return hidden(self, packed)

    patch.setattr(Policy, "hidden", counted)


def test_the_reference_and_the_reward_model_stay_as_they_were(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    spy(monkeypatch, ppo, "load", loaded.extend)
    inputs = [toys.files(box[name]) for name in ("model", "reward_model")]
    toys.train("ppo", box, tmp_path / "run", reward_model=box["reward_model"], learning_rate=1e-2)
    policy, reference, scorer = loaded
    for frozen, original in (
        (reference, Policy.from_pretrained(box["model"], "none")),
        (scorer.reward_model, RewardModel.from_pretrained(box["reward_model"])),
    ):
        assert not any(p.requires_grad for p in frozen.parameters())
        assert_same_weights(frozen.state_dict(), original.state_dict())
    moved = [name for name, p in reference.state_dict().items() if not torch.equal(p, policy.state_dict()[name])]
    assert len(moved) == len(reference.state_dict())
    assert inputs == [toys.files(box[name]) for name in ("model", "reward_model")]


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# -- what the options of PPO do ----------------------------------------------------------------------------------------


def short(box: Box, folder: Path, **changes: Any) -> list[dict[str, float]]:
    return toys.metrics(toys.train("ppo", box, folder, **changes).dir)


@pytest.mark.parametrize(("bound", "updates"), [(1e-9, 2), (1e9, 8)])
def test_kl_stop_ends_the_epochs(bound: float, updates: int, box: Box, tmp_path: Path) -> None:
    lines = short(box, tmp_path / "run", epochs=4, kl_stop=bound)
    assert [line["policy/num_updates"] for line in lines] == [updates] * 3


def test_kl_stop_lets_an_epoch_pass_that_moved_less(box: Box, tmp_path: Path) -> None:
    free = short(box, tmp_path / "free", epochs=4, learning_rate=5e-3, steps=6)
    bound = 0.5 * max(line["policy/approx_kl_k3"] for line in free)
    stopped = short(box, tmp_path / "stopped", epochs=4, learning_rate=5e-3, steps=6, kl_stop=bound)
    assert len({line["policy/num_updates"] for line in stopped}) > 1


@pytest.mark.parametrize("target", [1e-3, 1e3, 0.3])
def test_the_kl_coefficient_moves_towards_its_target(target: float, box: Box, tmp_path: Path) -> None:
    lines = short(box, tmp_path / "run", kl_target_nats=target, kl_horizon=20, learning_rate=5e-3, steps=5)
    coefs, kls = ([line[name] for line in lines] for name in ("objective/kl_coef", "objective/kl"))
    assert coefs[0] == 0.05
    for before, after, kl in zip(coefs, coefs[1:], kls, strict=False):
        assert after == pytest.approx(before * (1 + min(max(kl / target - 1, -0.2), 0.2) * 8 / 20))


def test_without_a_target_the_kl_coefficient_stays(box: Box, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run", steps=4, kl_coef=0.07)
    assert column(run.dir, "objective/kl_coef") == [0.07] * 4


def test_a_high_kl_coefficient_holds_the_policy_back(box: Box, tmp_path: Path) -> None:
    loose, tight = (short(box, tmp_path / str(c), **LONG | {"steps": 8}, kl_coef=c)[-1] for c in (0.0, 1.0))
    assert tight["objective/kl"] < 0.5 * loose["objective/kl"]
    assert tight["objective/non_score_reward"] == pytest.approx(-tight["objective/kl"])
    assert tight["objective/rlhf_reward"] == pytest.approx(tight["objective/score"] - tight["objective/kl"])


def test_a_response_that_never_stops_pays(box: Box, tmp_path: Path) -> None:
    free, fined = (
        short(box, tmp_path / str(p), missing_eos_penalty=p, rollouts_per_step=32, steps=1)[0] for p in (0.0, 2.5)
    )
    assert 0 < free["rollout/eos_rate"] == fined["rollout/eos_rate"] < 1
    assert free["objective/score"] == pytest.approx(free["score/goodness"])
    assert fined["objective/score"] == pytest.approx(free["objective/score"] - 2.5 * (1 - free["rollout/eos_rate"]))


def test_scores_are_clipped(box: Box, tmp_path: Path) -> None:
    def large(completions: list[str], **_: Any) -> list[float]:
        return [(-1.0) ** i * 100 for i in range(len(completions))]

    clipped = short(box, tmp_path / "run", reward_functions=(), reward_funcs=[large], score_clip=0.5)[0]
    assert clipped["objective/score"] == pytest.approx(0.0)
    assert clipped["objective/score_std"] == pytest.approx(0.5)


def test_the_entropy_bonus_keeps_the_policy_open(box: Box, tmp_path: Path) -> None:
    none, some = (short(box, tmp_path / str(c), **LONG | {"steps": 12}, entropy_coef=c)[-1] for c in (0.0, 0.3))
    assert some["policy/entropy"] > none["policy/entropy"] + 0.2


def test_reward_weights_make_the_sum(box: Box, tmp_path: Path) -> None:
    functions = tuple(box["rewards"] + name for name in (":goodness", ":shortness"))
    weights = (0.5, 2.0, -0.25)
    line = short(
        box, tmp_path / "run", reward_model=box["reward_model"], reward_functions=functions, reward_weights=weights,
        missing_eos_penalty=0.0,
    )[0]  # fmt: skip
    parts = [line[f"score/{name}"] for name in ("reward_model", "goodness", "shortness")]
    assert line["objective/score"] == pytest.approx(sum(w * p for w, p in zip(weights, parts, strict=True)), rel=1e-5)


def test_functions_of_one_name_are_all_counted(box: Box, tmp_path: Path) -> None:
    functions = [lambda completions, **_: [1.0] * len(completions), lambda completions, **_: [10.0] * len(completions)]
    line = short(box, tmp_path / "run", reward_functions=(), reward_funcs=functions, missing_eos_penalty=0.0)[0]
    assert line["objective/score"] == 11.0
    assert {line["score/<lambda>"], line["score/<lambda>_2"]} == {1.0, 10.0}


ONCE = {"steps": 1, "epochs": 2, "minibatches": 1, "max_grad_norm": 0.0}


@pytest.mark.parametrize(("critic", "reached"), [("detached", False), ("shared", True)])
def test_a_detached_critic_does_not_reach_the_trunk(critic: str, reached: bool, box: Box, tmp_path: Path) -> None:
    some, more = (
        toys.train("ppo", box, tmp_path / str(c), critic=critic, value_coef=c, **ONCE, kl_coef=0.0).dir
        for c in (0.5, 5.0)
    )
    trunks, heads = (
        [load_file(run / name) for run in (some, more)] for name in ("model.safetensors", "value_head.safetensors")
    )
    assert any(not torch.equal(trunks[0][name], trunks[1][name]) for name in trunks[0]) is reached
    assert not torch.equal(heads[0]["weight"], torch.zeros_like(heads[0]["weight"]))


def test_the_critic_may_start_as_the_reward_model(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    spy(
        monkeypatch,
        ppo,
        "load",
        lambda found: loaded.append((found[0].value_head.weight.clone(), found[2].reward_model)),
    )
    options = {"reward_model": box["reward_model"], "reward_functions": ()}
    zero = short(box, tmp_path / "zero", **options)[0]
    head = short(box, tmp_path / "head", value_init="reward_model", **options)[0]
    assert zero["value/mean"] == 0.0
    assert head["value/mean"] != 0.0
    (from_zero, _), (from_reward, reward_model) = loaded
    assert not from_zero.any()
    assert torch.equal(from_reward, reward_model.model.score.weight)


def test_a_value_head_beside_the_model_is_kept(box: Box, tmp_path: Path) -> None:
    first = toys.train("ppo", box, tmp_path / "first", learning_rate=1e-2).dir
    options = {"model": str(first), "reward_model": box["reward_model"], "learning_rate": 0.0}
    for name in ("zero", "reward_model"):
        run = toys.train("ppo", box, tmp_path / name, value_init=name, **options)
        assert_same_weights(load_file(run.dir / "value_head.safetensors"), load_file(first / "value_head.safetensors"))


# -- guards ------------------------------------------------------------------------------------------------------------


def test_a_batch_with_a_score_that_is_no_number_is_skipped_and_counted(box: Box, tmp_path: Path) -> None:
    calls = iter(range(100))

    def sometimes(completions: list[str], **_: Any) -> list[float]:
        bad = {1: math.nan, 2: math.inf, 4: -math.inf}.get(next(calls), 1.0)
        return [0.5] * (len(completions) - 1) + [bad]

    options = {"reward_functions": (), "reward_funcs": [sometimes], "steps": 6}
    run = toys.train("ppo", box, tmp_path / "run", **options, save_every=1, keep_checkpoints=6)
    lines = toys.metrics(run.dir)
    assert [line.get("guard/nonfinite_batches") for line in lines] == [None, 1, 2, None, 1, None]
    assert ["policy/num_updates" in line for line in lines] == [True, False, False, True, False, True]
    before, *skipped, after = (load_file(run.dir / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4))
    for weights in skipped:
        assert_same_weights(weights, before)
    assert not all(torch.equal(after[name], before[name]) for name in before)


def test_ten_such_batches_in_a_row_end_the_run(box: Box, tmp_path: Path) -> None:
    calls = iter(range(100))

    def broken(completions: list[str], **_: Any) -> list[float]:
        number = next(calls)
        return [math.nan if number >= 2 and i == 3 else 1.0 for i in range(len(completions))]

    options = {"reward_functions": (), "reward_funcs": [broken], "steps": 20, "save_every": 2}
    with pytest.raises(
        ValueError,
        match=r"^step 12: 10 batches in a row were skipped, the last one for non-finite scores in rows \[3\]$",
    ):
        toys.train("ppo", box, tmp_path / "run", **options)
    assert column(tmp_path / "run", "guard/nonfinite_batches") == list(range(1, 11))
    assert (tmp_path / "run/checkpoint-10/state.json").exists()


def test_a_gradient_that_is_no_number_updates_nothing(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(result: Any) -> None:
        if result.logprobs.requires_grad and next(calls) == 1:
            result.logprobs.register_hook(lambda gradient: gradient * math.nan)

    calls = iter(range(100))
    spy(monkeypatch, Policy, "forward", poison)
    run = toys.train("sft", box, tmp_path / "run", save_every=1, keep_checkpoints=3)
    assert column(run.dir, "skipped_updates") == [0.0, 1.0, 0.0]
    first, second, third = (load_file(run.dir / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3))
    assert_same_weights(second, first)
    assert not all(torch.equal(third[name], second[name]) for name in second)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", toys.TRAIN)
def test_hugging_face_loads_every_checkpoint(stage: str, box: Box, tmp_path: Path) -> None:
    run = toys.train(stage, box, tmp_path / "run", save_every=2, keep_checkpoints=2)
    folders = [run.dir, *run.dir.glob("checkpoint-*")]
    assert len(folders) == 3
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == toys.tokenizer().get_vocab()
        tokens = tokenizer("one two good", return_tensors="pt")["input_ids"]
        packed = pack([Example([], tokens[0].tolist())])
        factory = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
        model, info = factory.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            logits = model(tokens).logits
            if stage == "reward":
                assert model.num_labels == 1
                assert torch.allclose(logits[0], RewardModel.from_pretrained(folder).raw(packed), atol=1e-5)
            else:
                ours = Policy.from_pretrained(folder)
                expected = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
                assert torch.allclose(ours(packed).logprobs, expected, atol=1e-5)
    final, last = (load_file(f / "model.safetensors") for f in (run.dir, max(folders, key=lambda f: len(f.name))))
    assert final.keys() == last.keys()


def test_the_last_checkpoint_is_the_final_one(box: Box, tmp_path: Path) -> None:
    run = toys.train("ppo", box, tmp_path / "run")
    final, last = toys.files(run.dir), toys.files(run.dir / "checkpoint-3")
    shared = {name for name in last if not name.startswith(("optimizer", "state"))}
    assert {"config.json", "model.safetensors", "value_head.safetensors", "tokenizer.json"} <= shared
    assert all(final[name] == last[name] for name in shared)


def test_each_stage_starts_from_the_one_before(box: Box, tmp_path: Path) -> None:
    runs = {}
    for stage, before in (("pretrain", "empty"), ("sft", "pretrain"), ("reward", "sft"), ("ppo", "sft")):
        source = box["empty"] if before == "empty" else str(runs[before].dir)
        sources = {"reward_model": str(runs["reward"].dir), "reward_functions": ()} if stage == "ppo" else {}
        runs[stage] = toys.train(stage, box, tmp_path / stage, model=source, **sources)
    assert toys.metrics(runs["ppo"].dir)[-1]["step"] == 3


def test_a_config_is_not_changed_by_its_run(box: Box, tmp_path: Path) -> None:
    config = sft.Config(**toys.options("sft", box), output_dir=str(tmp_path / "run"))
    before = dataclasses.asdict(config)
    run = sft.train(config)
    assert dataclasses.asdict(config) == before
    assert run.config is config
