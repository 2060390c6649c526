"""GRPO, its family and best-of-n: against the papers in float64, against TRL, and as a stage that learns."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from benchmarks.peers import TRL
from tests import toys
from tests.models import VOCABULARY, model
from tests.test_vectors import Vectors
from tests.watch import Watch
from twinhead.engine import best_of, grpo, losses, scorers
from twinhead.engine.batch import Rollout, cumulative, pack
from twinhead.engine.best_of import best_of_kl
from twinhead.engine.data import Prompt
from twinhead.engine.experience import Comparison
from twinhead.engine.generate import generate
from twinhead.engine.grpo import FAMILY, Compared, Config
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import Scorer
from twinhead.engine.text import Text

Box = dict[str, str]
LIMIT = 9  # max_new_tokens
LENGTHS = (4, 1, 7, 3, 9, 2, 5, 8)
WIDE = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return Vectors(request.param)


def config(**options: Any) -> Config:
    return Config(**{"model": "m", "prompts": "p", "steps": 1, "max_new_tokens": LIMIT, "group_size": 4} | options)


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in toys.metrics(folder) if name in line]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- the losses, against the papers ------------------------------------------------------------------------------------


def rollout(length: int, finished: bool = True) -> Rollout:
    return Rollout([4, 5], [6] * length, torch.zeros(length), None, finished)


def tokens(spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New, old and reference log-probs (R,) of responses of LENGTHS, and an advantage (S,) for each."""
    noise = torch.Generator().manual_seed(7)
    old = -3 * torch.rand(sum(LENGTHS), generator=noise, dtype=torch.float64)
    new, ref = (old + spread * torch.randn(old.shape, generator=noise, dtype=torch.float64) for _ in range(2))
    return new.requires_grad_(), old, ref, torch.randn(len(LENGTHS), generator=noise, dtype=torch.float64)


def comparisons(
    old: Tensor, ref: Tensor | None, advantages: Tensor, lengths: Sequence[int] = LENGTHS, sizes: Sequence[int] = (8,)
) -> list[Comparison]:
    """Those responses as micro-batches of so many responses each."""
    found, first = [], 0
    for size in sizes:
        some = list(lengths[first : first + size])
        span = slice(sum(lengths[:first]), sum(lengths[: first + size]))
        packed = pack([rollout(n) for n in some])
        spread = advantages[first : first + size].repeat_interleave(torch.tensor(some))
        found.append(Comparison(packed, old[span], old[span], spread, None if ref is None else ref[span]))
        first += size
    return found


def written_out(name: str, new: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, given: Config) -> Tensor:
    """The loss of one minibatch, response by response."""
    low, high = given.clips
    total = torch.zeros((), dtype=torch.float64)
    parts = zip(*(x.split(LENGTHS) for x in (new, old, ref)), advantages, strict=True)
    for p, q, r, advantage in parts:
        ratio = torch.exp((p - q).mean()).expand(len(p)) if name == "gspo" else torch.exp(p - q)
        clipped = torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        per_token = -clipped + given.beta * (torch.exp(r - p) - 1 - (r - p))
        total = total + (per_token.sum() if name in ("dapo", "dr_grpo", "rloo") else per_token.mean())
    return total / {"dapo": sum(LENGTHS), "dr_grpo": len(LENGTHS) * LIMIT}.get(name, len(LENGTHS))


def assert_alike(ours: Tensor, theirs: Tensor, to: Tensor) -> None:
    """The same number, and the same gradient."""
    assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    gradients = (torch.autograd.grad(loss, to, retain_graph=True)[0] for loss in (ours, theirs))
    assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sizes", [(8,), (3, 1, 4)])
@pytest.mark.parametrize("clips", [{}, WIDE, {"clip_low": 0.0, "clip_high": 0.0}], ids=["own", "wide", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_is_the_paper_s(name: str, beta: float, clips: dict[str, float], sizes: tuple[int, ...]) -> None:
    given = config(loss=name, beta=beta, **clips)
    new, old, ref, advantages = tokens()
    minibatch = comparisons(old, ref if beta else None, advantages, sizes=sizes)
    parts = new.split([c.packed.num_targets for c in minibatch])
    counts = grpo.count(minibatch, given)
    found = [grpo.objective(part, c, counts, given) for part, c in zip(parts, minibatch, strict=True)]
    ours = torch.stack([loss for loss, _ in found]).sum()
    assert_alike(ours, written_out(name, new, old, ref, advantages, given), new)
    ratio = torch.exp(new - old).detach()
    if name == "gspo":
        ratio = torch.cat([torch.exp(x.log().mean()).expand_as(x) for x in ratio.split(LENGTHS)])
    logged = {key: sum(float(stats[key]) for _, stats in found) for key in found[0][1]}
    assert logged["loss"] == pytest.approx(ours.item())
    assert logged["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert logged["approx_kl_k3"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))
    assert max(float(stats["ratio_max"]) for _, stats in found) == pytest.approx(float(ratio.max()))
    assert ("ref_kl" in logged) == (beta > 0)


def test_every_loss_clips_as_its_paper_does() -> None:
    assert {name: config(loss=name).clips for name in FAMILY} == {
        "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "rloo": (0.2, 0.2), "gspo": (3e-4, 4e-4),
    }  # fmt: skip
    assert config(loss="dapo", clip_low=0.1, clip_high=0.5).clips == (0.1, 0.5)


def test_the_first_gradient_of_rloo_is_that_of_reinforce() -> None:
    new, _, _, advantages = tokens()
    (c,) = comparisons(new.detach(), None, advantages)
    sums = torch.stack([x.sum() for x in new.split(LENGTHS)])
    given = config(loss="rloo")
    (ours,) = torch.autograd.grad(grpo.objective(new, c, grpo.count([c], given), given)[0], new)
    (theirs,) = torch.autograd.grad(-(advantages * sums).mean(), new)
    assert_close(ours, theirs)


def test_the_stage_s_losses_equal_the_vectors(vectors: Vectors) -> None:
    given, expected = vectors("grpo_loss")
    mask = given.mask.bool()
    lengths = mask.sum(1).int().tolist()
    flat = [x[mask] for x in (given.new_logprobs, given.old_logprobs, given.ref_logprobs)]
    limit = int(given.max_completion_length)
    for name, kind, beta, high in (
        ("grpo", "advantages", given.beta, given.clip_high), ("dr_grpo", "advantages_dr", 0.0, given.clip_high),
        ("dapo", "advantages", 0.0, given.clip_high_dapo),
    ):  # fmt: skip
        asked = config(loss=name, beta=beta, clip_low=given.clip_low, clip_high=high, max_new_tokens=limit)
        new = flat[0].clone().requires_grad_()
        (c,) = comparisons(*flat[1:], getattr(expected, kind), lengths, sizes=(len(lengths),))
        loss, _ = grpo.objective(new, c, grpo.count([c], asked), asked)
        vectors.close(loss, getattr(expected, f"loss_{name}"))
        vectors.close(torch.autograd.grad(loss, new)[0], getattr(expected, f"grad_{name}")[mask])


@pytest.mark.skipif(not TRL.folder.is_dir(), reason=f"needs {TRL.label}: python -m benchmarks peers")
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_responses_cost_what_they_cost_in_trl(name: str, beta: float) -> None:
    given = config(loss=name, beta=beta, **WIDE)
    new, old, ref, advantages = tokens()
    (c,) = comparisons(old, ref if beta else None, advantages)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded = [torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, x) for x in (new, old, ref)]
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded[0], torch.zeros_like(padded[0]).detach(), None),
        model=SimpleNamespace(training=True), accelerator=same, args=SimpleNamespace(
            use_bias_correction_kl=False, delta=None, steps_per_generation=1
        ),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, _metrics=defaultdict(
            lambda: defaultdict(list)
        ),
        beta=beta, epsilon_low=given.clips[0], epsilon_high=given.clips[1], max_completion_length=LIMIT,
        loss_type="grpo" if name == "gspo" else name,
        importance_sampling_level="sequence" if name == "gspo" else "token",
    )  # fmt: skip
    one = torch.ones(len(LENGTHS), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": one, "prompt_mask": one, "completion_ids": mask.long(), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": padded[1], "ref_per_token_logps": padded[2],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = TRL.function("trl.trainer.grpo_trainer", "GRPOTrainer")._compute_loss(trainer, None, inputs)
    ours, stats = grpo.objective(new, c, grpo.count([c], given), given)
    assert_alike(ours, theirs, new)
    logged = {key: values[0] for key, values in trainer._metrics["train"].items()}
    if name != "gspo":  # whose statistics TRL counts by responses
        assert float(stats["clipfrac"]) == pytest.approx(logged["clip_ratio/region_mean"])
    if beta:
        assert float(stats["ref_kl"]) == pytest.approx(logged["kl"])


# -- advantages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("worth", [0.1, 0.7, -3.3, 1e6])
def test_a_flat_group_has_advantage_0_exactly(worth: float, kind: str) -> None:
    """The mean of equal numbers is rounded: of seven times 0.1 it is not 0.1 in float32."""
    scores = torch.tensor([worth] * 7 + [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5])
    flat, other = losses.group_advantages(scores, 7, kind=kind).split(7)
    assert flat.tolist() == [0.0] * 7
    assert other.all()
    found = losses.process_advantages(scores, cumulative([1] * 14), 7, kind=kind)
    assert found[:7].tolist() == [0.0] * 7
    assert found[7:].all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_one_step_per_response_is_outcome_supervision(kind: str) -> None:
    lengths = [2, 1, 4, 3, 1, 1]
    scores = torch.tensor([1.0, 0.5, -2.0, 3.0, 3.0, 0.25], dtype=torch.float64)
    rewards = torch.full((sum(lengths),), math.nan, dtype=torch.float64)
    rewards[cumulative(lengths)[1:].long() - 1] = scores
    found = losses.process_advantages(rewards, cumulative(lengths), 3, kind=kind)
    expected = losses.group_advantages(scores, 3, kind=kind).repeat_interleave(torch.tensor(lengths))
    assert_close(found, expected)


def test_steps_are_compared_and_summed_to_go() -> None:
    """Two responses of three and four tokens, with steps of 1, 3 | 2, 6: mean 3, deviations -2, 0 | -1, 3."""
    nan, cu_rows = math.nan, cumulative([3, 4])
    rewards = torch.tensor([1, nan, 3, nan, 2, 6, nan], dtype=torch.float64)
    centred = torch.tensor([-2, 0, 0, 2, 2, 3, 0], dtype=torch.float64)
    assert_close(losses.process_advantages(rewards, cu_rows, 2, kind="dr_grpo"), centred)
    std = math.sqrt((4 + 0 + 1 + 9) / 3)
    assert_close(losses.process_advantages(rewards, cu_rows, 2, eps=0.5), centred / (std + 0.5))
    # the others' means: 4 for the first response, 2 for the second
    left_out = torch.tensor([-3 - 1, -1, -1, 4, 4, 4, 0], dtype=torch.float64)
    assert_close(losses.process_advantages(rewards, cu_rows, 2, kind="rloo"), left_out)
    with pytest.raises(ValueError, match=r"^kind: expected 'grpo', 'dr_grpo' or 'rloo', got 'none'$"):
        losses.process_advantages(rewards, cu_rows, 2, kind="none")


def test_responses_without_steps_gain_nothing_from_them() -> None:
    nothing = torch.full((5,), math.nan)
    assert losses.process_advantages(nothing, cumulative([2, 3]), 2).tolist() == [0.0] * 5


def test_the_over_long_punishment_is_soft() -> None:
    found = losses.overlong(torch.tensor([1, 6, 7, 8, 9, 10]), limit=10, buffer=4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0]


def test_the_response_s_ratio_is_that_of_each_of_its_tokens() -> None:
    new, old, _, _ = tokens()
    ratios = torch.exp(new - losses.response_ratio(new, old, cumulative(LENGTHS)))
    for found, p, q in zip(*(x.split(LENGTHS) for x in (ratios, new, old)), strict=True):
        assert_close(found, torch.exp((p - q).mean()).expand_as(found))
    assert not losses.response_ratio(new, old, cumulative(LENGTHS)).requires_grad
    same = new.detach()
    assert torch.equal(losses.response_ratio(same, same, cumulative(LENGTHS)), same)


def test_scores_become_advantages_of_tokens() -> None:
    """Of the lengths 2, 9, 8, 5 the second was cut at the limit, and the third is within the buffer of 2."""
    rollouts = [rollout(2), rollout(9, finished=False), rollout(8), rollout(5)]
    given = config(loss="dr_grpo", missing_eos_penalty=0.5, overlong_buffer=2, overlong_penalty=4.0)
    ((a, b, c, d),) = grpo.compare(rollouts, torch.tensor([1.0, 2.0, 3.0, 4.0]), None, given)
    assert [x.score for x in (a, b, c, d)] == [1.0, 2.0 - 0.5 - 4.0, 3.0 - 2.0, 4.0]
    centre = mean([1.0, -2.5, 1.0, 4.0])
    assert [x.advantages.tolist() for x in (a, b, d)] == [[1 - centre] * 2, [-2.5 - centre] * 9, [4 - centre] * 5]
    steps = torch.full((24,), math.nan)
    steps[[1, 10]] = torch.tensor([1.0, 3.0])  # the last tokens of the first two
    ((e, f, g, _),) = grpo.compare(rollouts, torch.tensor([1.0, 2.0, 3.0, 4.0]), steps, given)
    assert_close(e.advantages, a.advantages - 1)
    assert_close(f.advantages, b.advantages + 1)
    assert_close(g.advantages, c.advantages)


# -- process rewards ---------------------------------------------------------------------------------------------------


def steps_of(function: Any, lengths: Sequence[int] = (2, 1)) -> Tensor:
    asked = [Prompt([4], "one", {"why": i}) for i in range(len(lengths))]
    return scorers.score_steps(function, Text(toys.tokenizer()), [rollout(n) for n in lengths], asked)


def test_a_process_function_is_called_as_a_reward_function_is() -> None:
    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[list[float | None]]:
        assert prompts == ["one", "one"] and completions == ["three three", "three"]
        assert columns == {"why": [0, 1], "finished": [True, True], "completion_ids": [[6, 6], [6]]}
        return [[None, 1], [0.5]]

    found = steps_of(function)
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor([math.nan, 1.0, 0.5]), equal_nan=True)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([[1.0, 2.0]], "expected 2 scores, got 1"),
        (None, "expected 2 scores, got NoneType"),
        ([[1.0, 2.0], [1.0, 2.0]], "expected a list of 1 step rewards for row 1, one per token, got 2"),
        ([[1.0, 2.0], 3.0], "expected a list of 1 step rewards for row 1, one per token, got float"),
        ([[1.0, "good"], [1.0]], "expected a number for token 1 of row 0, got 'good'"),
        ([[1.0, 2.0], [math.inf]], "expected finite step rewards for row 1, got [inf]"),
        ([[1.0, math.nan], [1.0]], "expected finite step rewards for row 0, got [1.0, nan]"),
    ],
)
def test_wrong_step_rewards_are_named(answer: Any, sentence: str) -> None:
    def wrong(**_: Any) -> Any:
        return answer

    with pytest.raises(ValueError) as error:
        steps_of(wrong)
    assert str(error.value) == f"reward function wrong: {sentence}"


# -- learning ----------------------------------------------------------------------------------------------------------

LONG = {
    "steps": 16, "prompts_per_step": 8, "group_size": 8, "epochs": 1, "minibatches": 2, "max_new_tokens": 6,
    "learning_rate": 3e-3,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_earns_more(name: str, box: Box, tmp_path: Path) -> None:
    clips = WIDE if name == "gspo" else {}  # its own are for steps far smaller than these
    run = toys.train("grpo", box, tmp_path / "run", loss=name, beta=0.01, **LONG, **clips)
    good = column(run.dir, "score/goodness")
    assert mean(good[:3]) < 0.15
    assert mean(good[-3:]) > 0.4
    assert column(run.dir, "objective/kl")[0] == pytest.approx(0.0, abs=1e-4)
    assert column(run.dir, "objective/kl")[-1] > 0.5


def test_process_rewards_alone_can_teach(box: Box, tmp_path: Path) -> None:
    """All responses score the same; the steps alone say that "good" is better than "bad"."""
    for name, process in (("without", ""), ("with", box["rewards"] + ":progress")):
        run = toys.train(
            "grpo", box, tmp_path / name, **LONG, process_function=process, reward_functions=(),
            reward_funcs=[lambda prompts, **_: [0.0] * len(prompts), goodness], reward_weights=(1.0, 0.0),
        )  # fmt: skip
        good = column(run.dir, "score/goodness")
        if process:
            assert mean(good[-3:]) > 3 * mean(good[:3])
            assert column(run.dir, "rollout/flat_groups")[0] < 8  # in the end all is good
        else:
            assert mean(good[-3:]) < 2 * mean(good[:3])
            assert set(column(run.dir, "rollout/flat_groups")) == {8}
            assert set(column(run.dir, "policy/grad_norm")) == {0.0}


def goodness(completions: list[str], **columns: Any) -> list[float]:
    return [c.split().count("good") / len(ids) for c, ids in zip(completions, columns["completion_ids"], strict=True)]


# -- learning rate 0, and other things that must change nothing --------------------------------------------------------


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose distributions are far from uniform."""
    return toys.language_model(tmp_path_factory.mktemp("lively") / "model", initializer_range=0.3)


STILL = {"learning_rate": 0.0, "epochs": 3, "minibatches": 3, "tokens_per_micro": 20}


@pytest.mark.parametrize("name", FAMILY)
def test_the_ratio_is_exactly_one_while_nothing_moves(name: str, box: Box, lively: str, tmp_path: Path) -> None:
    run = toys.train("grpo", box, tmp_path / "run", model=lively, loss=name, old_logprobs="recompute", **STILL)
    for line in toys.metrics(run.dir):
        assert line["policy/num_updates"] == 9
        assert line["policy/ratio_max"] == 1.0
        assert line["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)  # a sum of float32
        assert line["policy/first_ratio_gap"] == 0.0
        assert line["policy/clipfrac"] == line["policy/approx_kl"] == line["policy/approx_kl_k3"] == 0.0
        assert line["policy/entropy"] < 2.6  # of log 16 = 2.77: the test would say little about a uniform policy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_agrees_with_the_trainer(temperature: float, box: Box, lively: str, tmp_path: Path) -> None:
    options = {"temperature": temperature, "num_slots": 5, "beta": 0.1, **STILL}
    run = toys.train("grpo", box, tmp_path / "run", model=lively, **options)
    for line in toys.metrics(run.dir):
        assert line["policy/first_ratio_gap"] < 1e-5
        assert 0 < line["mismatch/mean"] <= line["mismatch/p99"] <= line["mismatch/max"] < 1e-5
        assert abs(line["objective/kl"]) < 1e-5 and line["policy/ref_kl"] < 1e-9
        assert "guard/mismatch" not in line


def test_a_sampler_that_is_off_is_noticed_and_corrected(
    box: Box, lively: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A sampler that takes every token for e^0.3 times likelier than it is."""

    def off(*arguments: Any, **settings: Any) -> list[Rollout]:
        return [replace(r, logprobs=r.logprobs + 0.3) for r in generate(*arguments, **settings)]

    monkeypatch.setattr(grpo, "generate", off)
    found = {}
    for name, options in {
        "rollout": {},
        "recompute": {"old_logprobs": "recompute", "mismatch_alarm": 0.5},
        "capped": {"old_logprobs": "recompute", "importance_cap": 0.5},
    }.items():
        run = toys.train("grpo", box, tmp_path / name, model=lively, **STILL, **options)
        found[name] = toys.metrics(run.dir)[0]
        warned = "sampler and trainer disagree by 3.0e-01 nats" in " ".join(capsys.readouterr().err.split())
        assert warned == (name != "recompute") == ("guard/mismatch" in found[name])
        assert found[name]["mismatch/mean"] == pytest.approx(0.3, abs=1e-4)
    assert found["rollout"]["policy/ratio_max"] == pytest.approx(math.exp(-0.3), abs=1e-4)
    assert found["recompute"]["policy/ratio_max"] == found["capped"]["policy/ratio_max"] == 1.0
    halved = found["recompute"]["policy/grad_norm"] / 2  # every token weighs min(e^-0.3, 0.5)
    assert found["capped"]["policy/grad_norm"] == pytest.approx(halved, rel=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_the_micro_batch_size_changes_nothing(name: str, box: Box, tmp_path: Path) -> None:
    options = {"loss": name, "beta": 0.1, "learning_rate": 1e-4, "process_function": box["rewards"] + ":progress"}
    whole, half, single = (
        toys.metrics(toys.train("grpo", box, tmp_path / str(n), tokens_per_micro=n, **options).dir)
        for n in (10_000, 30, 1)
    )
    for cut in (half, single):
        for expected, line in zip(whole, cut, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_every_answer_is_used_as_often_as_there_are_epochs(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, learned = Counter(), Counter()

    def seen(policy: Policy, prompts: list[list[int]], *rest: Any) -> list[Rollout]:
        groups = [list(group) for _, group in itertools.groupby(prompts)]
        assert sum(map(len, groups)) == 12 and all(len(group) % 4 == 0 for group in groups)
        rollouts = generate(policy, prompts, *rest)
        drawn.update(tuple(r.prompt + r.response) for r in rollouts)
        return rollouts

    def counted(self: Policy, packed: Any) -> Tensor:
        if torch.is_grad_enabled():
            learned.update(tuple(part.tolist()) for part in packed.tokens.split(list(packed.lengths)))
        return hidden(self, packed)

    hidden = Policy.hidden
    monkeypatch.setattr(grpo, "generate", seen)
    monkeypatch.setattr(Policy, "hidden", counted)
    toys.train("grpo", box, tmp_path / "run", epochs=3, minibatches=3, tokens_per_micro=20)
    assert sum(drawn.values()) == 3 * 12
    assert learned == Counter({sequence: 3 * times for sequence, times in drawn.items()})


def test_every_draw_is_another(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt and a policy that never moves: the same answers would come again from the same seed."""
    draws: list[list[list[int]]] = []

    def seen(*arguments: Any) -> list[Rollout]:
        rollouts = generate(*arguments)
        draws.append([r.response for r in rollouts])
        return rollouts

    monkeypatch.setattr(grpo, "generate", seen)
    options = ASKED | {"prompts": [{"prompt": "one"}], "learning_rate": 0.0}
    toys.train("grpo", box, tmp_path / "run", resample=1, **options)
    assert len(draws) == 6
    assert all(a != b for a, b in itertools.combinations(draws, 2))


def test_there_is_no_critic_and_without_beta_no_reference(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = Policy.from_pretrained.__func__

    def counted(cls: Any, path: Any, critic: str, *rest: Any) -> Policy:
        loaded.append(critic)
        return load(cls, path, critic, *rest)

    monkeypatch.setattr(Policy, "from_pretrained", classmethod(counted))
    for beta, models in ((0.0, 1), (0.1, 2)):
        run = toys.train("grpo", box, tmp_path / str(beta), beta=beta)
        assert loaded == ["none"] * models
        loaded.clear()
        assert not [name for name in toys.files(run.dir) if "value_head" in name]
        (first, *_) = toys.metrics(run.dir)
        assert ("objective/kl" in first) == ("policy/ref_kl" in first) == (beta > 0)


def test_mixed_precision_reaches_every_model(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    set_precision = grpo.set_precision
    monkeypatch.setattr(grpo, "set_precision", lambda model, dtype: told.append(dtype) or set_precision(model, dtype))
    given = {"reward_model": box["reward_model"], "beta": 0.1, "old_logprobs": "recompute", "steps": 1}
    mixed, exact = (
        toys.metrics(toys.train("grpo", box, tmp_path / dtype, dtype=dtype, **given).dir)[0]
        for dtype in ("mixed", "float32")
    )
    assert told == ["mixed"] * 3 + ["float32"] * 3
    assert mixed["policy/entropy"] != exact["policy/entropy"]
    assert mixed["policy/entropy"] == pytest.approx(exact["policy/entropy"], abs=0.02)
    weights = load_file(tmp_path / "mixed" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_no_tensor_of_tokens_by_vocabulary_is_made(beta: float) -> None:
    vocabulary, groups, length = 40 * VOCABULARY, 24, 24
    trained = Policy(model(vocab_size=vocabulary), "none")
    logprobs = torch.full((length,), -math.log(vocabulary))
    draws = [Rollout([5, 6], list(range(7, 7 + length)), logprobs, None, True) for _ in range(4 * groups)]
    given = config(beta=beta, max_new_tokens=length, minibatches=1)
    sign = itertools.cycle([1.0, -1.0, 0.5, -0.5])
    compared = [[Compared(r, 0.0, torch.full((length,), next(sign))) for r in draws]]
    with Watch() as watch:
        batch, _ = grpo.examine(trained, trained.frozen_copy() if beta else None, compared, given, 0)
        optimizer = Optimizer(trained, given, 1)
        grpo.update(trained, optimizer, batch, given, random.Random(0))
    assert watch.largest < 4 * groups * length * vocabulary // 4


# -- dynamic sampling --------------------------------------------------------------------------------------------------


def lengths_unless_one(prompts: list[str], **columns: Any) -> list[float]:
    """Of no use after "one": all answers are worth the same."""
    found = zip(prompts, columns["completion_ids"], strict=True)
    return [0.3 if p == "one" else float(sum(ids)) for p, ids in found]


MIXED = [{"prompt": word} for word in ["one"] * 3 + ["two"] * 3]
ASKED = {"prompts": MIXED, "reward_functions": (), "reward_funcs": [lengths_unless_one], "prompts_per_step": 4}


def prompts_learned(patch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts whose answers are learned from, one list per step."""
    found: list[list[str]] = []
    examine = grpo.examine

    def seen(policy: Any, reference: Any, groups: Any, *rest: Any) -> Any:
        found.append([toys.WORDS[group[0].rollout.prompt[-1]] for group in groups])
        return examine(policy, reference, groups, *rest)

    patch.setattr(grpo, "examine", seen)
    return found


def test_flat_groups_stay_unless_one_asks_for_others(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = prompts_learned(monkeypatch)
    run = toys.train("grpo", box, tmp_path / "run", **ASKED)
    assert all(map(len, learned))
    for words, line in zip(learned, toys.metrics(run.dir), strict=True):
        assert len(words) == line["rollout/groups"] == 4
        assert words.count("one") == line["rollout/flat_groups"] > 0


def test_flat_groups_make_room_for_others(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = prompts_learned(monkeypatch)
    drawn: list[int] = []

    def seen(policy: Policy, prompts: list[list[int]], *rest: Any) -> list[Rollout]:
        drawn.append(len(prompts) // 4)
        return generate(policy, prompts, *rest)

    monkeypatch.setattr(grpo, "generate", seen)
    run = toys.train("grpo", box, tmp_path / "run", resample=9, **ASKED)
    assert learned == [["two"] * 4] * 3
    flat = [int(line["rollout/flat_groups"]) for line in toys.metrics(run.dir)]
    assert sum(drawn) == sum(4 + n for n in flat) and len(drawn) > 3  # what was flat was asked for again, no more
    assert all(n > 0 for n in flat)


def test_what_stays_flat_is_dropped(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = prompts_learned(monkeypatch)
    options = ASKED | {"prompts": [{"prompt": "one"}] * 11 + [{"prompt": "two"}], "steps": 6}
    run = toys.train("grpo", box, tmp_path / "run", resample=1, minibatches=16, **options)
    lines = toys.metrics(run.dir)
    some = [line for line in lines if line["rollout/groups"]]
    assert 0 < len(some) < 6
    assert [len(words) for words in learned] == [line["rollout/groups"] for line in some]
    assert {word for words in learned for word in words} == {"two"}
    for line in some:  # fewer answers than minibatches: no step without an answer
        assert line["policy/num_updates"] == 2 * min(16, 4 * line["rollout/groups"])
    for line in lines:
        assert ("policy/loss" in line) == (line in some)


def test_a_solved_task_ends_in_peace(box: Box, tmp_path: Path) -> None:
    """A dozen steps in which nothing can be learned change no weight, and are no error."""
    options = ASKED | {"prompts": [{"prompt": "one"}], "steps": 12}
    run = toys.train("grpo", box, tmp_path / "run", resample=1, weight_decay=0.1, **options)
    assert [line["rollout/groups"] for line in toys.metrics(run.dir)] == [0] * 12
    assert [line["rollout/flat_groups"] for line in toys.metrics(run.dir)] == [8] * 12
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (box["model"], run.dir))
    assert all(torch.equal(before[name], after[name]) for name in after)


# -- best of n ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choosing(box: Box) -> tuple[Policy, list[Prompt], Scorer]:
    text = Text.from_pretrained(box["model"])
    asked = [Prompt(text.prompt(words), words, {}) for words in ("one", "two three", "four")]
    return Policy.from_pretrained(box["model"], "none"), asked, Scorer(text, None, [sum_of_ids])


def sum_of_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids)) for ids in completion_ids]


def test_the_best_is_kept(choosing: tuple[Policy, list[Prompt], Scorer]) -> None:
    policy, asked, scorer = choosing
    sampling = Sampling(max_new_tokens=4, seed=3)
    found = best_of(policy, asked, scorer, 6, sampling)
    drawn = generate(policy, [p.tokens for p in asked for _ in range(6)], sampling)
    assert found.scores.tolist() == [[sum(r.response) for r in drawn[i : i + 6]] for i in (0, 6, 12)]
    for prompt, best, scores in zip(asked, found.rollouts, found.scores, strict=True):
        assert best.prompt == prompt.tokens
        assert sum(best.response) == scores.max()
        assert scores.max() > scores.min()


def test_among_equals_the_first_is_kept(choosing: tuple[Policy, list[Prompt], Scorer]) -> None:
    policy, asked, scorer = choosing
    tied = Scorer(scorer.text, None, [lambda prompts, **_: [float(i % 4 in (1, 3)) for i in range(len(prompts))]])
    sampling = Sampling(max_new_tokens=4, seed=3)
    drawn = generate(policy, [p.tokens for p in asked for _ in range(4)], sampling)
    found = best_of(policy, asked, tied, 4, sampling)
    assert [r.response for r in found.rollouts] == [drawn[i].response for i in (1, 5, 9)]


def test_one_of_one_is_the_policy_itself(choosing: tuple[Policy, list[Prompt], Scorer]) -> None:
    policy, asked, scorer = choosing
    greedy = Sampling(max_new_tokens=4, temperature=0.0)
    found = best_of(policy, asked, scorer, 1, greedy)
    assert [r.response for r in found.rollouts] == [
        r.response for r in generate(policy, [p.tokens for p in asked], greedy)
    ]
    assert found.kl == 0.0


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_divergence_of_the_best_is_analytic(n: int) -> None:
    """The best of n uniform scores has density n x^(n-1): its KL to the uniform one is the integral of that log."""
    x = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)[1:]
    density = n * x ** (n - 1)
    assert best_of_kl(n) == pytest.approx(torch.trapezoid(torch.xlogy(density, density), x).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("n", "temperature", "worth", "sentence"),
    [
        (0, 1.0, 1.0, "best_of: expected n of at least 1, got 0"),
        (2, 0.0, 1.0, "best_of: expected a temperature above 0 for n=2 different responses, got 0"),
        (2, 1.0, math.nan, "best_of: expected finite scores, got nan for prompt 0"),
    ],
)
def test_what_has_no_best_is_named(
    n: int, temperature: float, worth: float, sentence: str, choosing: tuple[Policy, list[Prompt], Scorer]
) -> None:
    policy, asked, scorer = choosing
    constant = Scorer(scorer.text, None, [lambda prompts, **_: [worth] * len(prompts)])
    with pytest.raises(ValueError) as error:
        best_of(policy, asked, constant, n, Sampling(max_new_tokens=2, temperature=temperature))
    assert str(error.value) == sentence
