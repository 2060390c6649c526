"""DPO, its family and KTO: against the papers in float64, against TRL, and as a stage that learns."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections import Counter, defaultdict
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
from tests.models import VOCABULARY, ids, model
from tests.test_vectors import Vectors
from tests.watch import Watch
from twinhead.engine import dpo, losses, reference
from twinhead.engine.batch import Example, cumulative, pack, segment_sum
from twinhead.engine.data import Unpaired
from twinhead.engine.dpo import Config, Judged
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.reference import FILE, Reference, example_fingerprint, policy_fingerprint
from twinhead.engine.text import Text
from twinhead.engine.trunk import set_precision

Box = dict[str, str]

# Every loss, with and without smoothing where there is one.
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid", "beta": 0.3},
    "conservative": {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.15},
    "robust": {"loss": "robust", "beta": 0.3, "label_smoothing": 0.15},
    "hinge": {"loss": "hinge", "beta": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.4},
    "ipo_mean": {"loss": "ipo_mean", "beta": 0.4},
    "kto": {"loss": "kto", "beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.6},
}
PAIRED = {name: settings for name, settings in SETTINGS.items() if name != "kto"}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    folder = tmp_path_factory.mktemp("box")
    return toys.box(folder) | {"other": toys.language_model(folder / "other", seed=1)}


def config(**changes: Any) -> Config:
    return Config(**{"model": "m", "data": "d"} | changes)


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in toys.metrics(folder) if name in line]


# -- the mathematics ---------------------------------------------------------------------------------------------------

PROMPTS = ids((3, 1, 5, 2, 4, 3))
RESPONSES = ids((6, 2, 9, 1, 4, 7, 3, 5, 8, 2, 6, 3), seed=1)
HOLES = [True, False, True, True, False, False, True]


def ranked() -> list[Judged]:
    """Pairs in both orders, a tie among three, an answer with holes in what is learned."""
    groups = [([0, 1], [0, 1]), ([2, 3], [1, 0]), ([4, 5, 6], [1, 0, 1]), ([7, 8], [2, 5]), ([9, 10, 11], [0, 1, 2])]
    return [
        Judged([Example(prompt, RESPONSES[i], HOLES if i == 5 else None) for i in answers], ranks)
        for prompt, (answers, ranks) in zip(PROMPTS, groups, strict=False)
    ]


def labelled() -> list[Judged]:
    """Four good and two bad answers, each beside its stranger."""
    return [
        Judged([Example(prompt, RESPONSES[i])], [int(i in (1, 4))], Example(prompt, RESPONSES[i + 6]))
        for i, prompt in enumerate(PROMPTS)
    ]


def frozen_weights() -> torch.nn.Module:
    """A reference some way off."""
    made, noise = model().double(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=noise)
    return made


def whole(plain: Any, example: Example) -> Tensor:
    """log pi(response | prompt) by transformers alone, one sequence at a time."""
    tokens = [*example.prompt, *example.response]
    logprobs = plain(torch.tensor([tokens])).logits[0].log_softmax(-1)
    learned = example.learn or [True] * len(example.response)
    first = len(example.prompt)
    return torch.stack([logprobs[first + i - 1, tokens[first + i]] for i, yes in enumerate(learned) if yes]).sum()


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def pair_oracle(ours: Any, theirs: Any, batch: list[Judged], given: Config) -> Tensor:
    """The mean over all decided pairs, from the papers' equations."""
    terms = []
    for judged in batch:
        ratio, share = [], []
        for answer in judged.answers:
            with torch.no_grad():
                fixed = whole(theirs, answer)
            ratio.append(whole(ours, answer) - fixed)
            share.append(ratio[-1] / (sum(answer.learn) if answer.learn else len(answer.response)))
        for a, rank in enumerate(judged.ranks):
            for b, other in enumerate(judged.ranks):
                if rank < other:
                    x = share[a] - share[b] if given.loss == "ipo_mean" else ratio[a] - ratio[b]
                    terms.append(pair_term(x, given.beta, given.label_smoothing, given.loss))
    return torch.stack(terms).mean()


def pair_term(h: Tensor, beta: float, e: float, loss: str) -> Tensor:
    right, wrong = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
    if loss == "sigmoid":
        return (1 - e) * right + e * wrong
    if loss == "robust":
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    return torch.relu(1 - beta * h) if loss == "hinge" else (h - 1 / (2 * beta)) ** 2


def kto_oracle(ours: Any, theirs: Any, batch: list[Judged], given: Config) -> Tensor:
    """Equations 7 and 8 of arXiv 2402.01306: lambda_y - v(x, y), with v from the distance to z0."""
    with torch.no_grad():
        away = [(whole(ours, judged.stranger) - whole(theirs, judged.stranger)).item() for judged in batch]
    z0 = max(0.0, sum(away) / len(away))
    assert z0 > 0.1, "a baseline that counts"
    terms = []
    for judged in batch:
        with torch.no_grad():
            fixed = whole(theirs, judged.answers[0])
        r = whole(ours, judged.answers[0]) - fixed
        if judged.ranks == [0]:
            value, weight = given.desirable_weight / (1 + torch.exp(-given.beta * (r - z0))), given.desirable_weight
        else:
            value, weight = given.undesirable_weight / (1 + torch.exp(given.beta * (r - z0))), given.undesirable_weight
        terms.append(weight - value)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("tokens_per_micro", [10_000, 30, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_the_papers(name: str, tokens_per_micro: int) -> None:
    given = config(tokens_per_micro=tokens_per_micro, **SETTINGS[name])
    batch, oracle = (labelled(), kto_oracle) if name == "kto" else (ranked(), pair_oracle)
    plain = model().double()
    expected = oracle(plain, frozen_weights(), batch, given)
    expected.backward()
    ours = Policy(model().double(), "none")
    theirs = Reference(Policy(frozen_weights(), "none"))
    total = 0.0
    for loss, stats in dpo.objective(ours, theirs, batch, given):
        loss.backward()
        total += stats["loss"].item()
    assert total == pytest.approx(expected.item(), rel=1e-6)  # log-probs leave the fused head as float32
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 0.01
    for name, parameter in ours.model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5 * largest)


def measured(batch: list[Judged], **changes: Any) -> dict[str, float]:
    """The statistics of a batch, by the parts of three micro-batches or so."""
    ours, theirs = Policy(model().double(), "none"), Reference(Policy(frozen_weights(), "none"))
    return dpo.evaluate(ours, theirs, batch, config(tokens_per_micro=30, **changes))


def test_the_statistics_of_pairs() -> None:
    batch, plain, frozen = ranked(), model().double(), frozen_weights()
    with torch.no_grad():
        logps = [[whole(plain, answer) for answer in judged.answers] for judged in batch]
        ratios = [[whole(plain, a) - whole(frozen, a) for a in judged.answers] for judged in batch]
    pairs = [
        (g, a, b)
        for g, judged in enumerate(batch)
        for a, first in enumerate(judged.ranks)
        for b, second in enumerate(judged.ranks)
        if first < second
    ]
    assert len(pairs) == 8
    found = measured(batch, beta=0.2, loss="ipo_mean")
    mean = lambda values: sum(values) / len(pairs)  # noqa: E731
    assert found["eval/rewards/chosen"] == pytest.approx(mean([0.2 * ratios[g][a].item() for g, a, _ in pairs]))
    assert found["eval/rewards/rejected"] == pytest.approx(mean([0.2 * ratios[g][b].item() for g, _, b in pairs]))
    assert found["eval/logps/chosen"] == pytest.approx(mean([logps[g][a].item() for g, a, _ in pairs]))
    assert found["eval/logps/rejected"] == pytest.approx(mean([logps[g][b].item() for g, _, b in pairs]))
    assert found["eval/accuracy"] == mean([float(ratios[g][a] > ratios[g][b]) for g, a, b in pairs])
    assert 0 < found["eval/accuracy"] < 1
    margin = found["eval/rewards/chosen"] - found["eval/rewards/rejected"]
    assert found["eval/rewards/margins"] == pytest.approx(margin)


def test_the_statistics_of_single_answers() -> None:
    batch, plain, frozen = labelled(), model().double(), frozen_weights()
    with torch.no_grad():
        ratios = [(whole(plain, j.answers[0]) - whole(frozen, j.answers[0])).item() for j in batch]
        z0 = sum((whole(plain, j.stranger) - whole(frozen, j.stranger)).item() for j in batch) / len(batch)
    found = measured(batch, beta=0.2, loss="kto")
    good = [r for r, judged in zip(ratios, batch, strict=True) if judged.ranks == [0]]
    bad = [r for r, judged in zip(ratios, batch, strict=True) if judged.ranks == [1]]
    assert found["eval/kl"] == pytest.approx(z0, rel=1e-4)
    assert found["eval/rewards/chosen"] == pytest.approx(0.2 * sum(good) / 4, rel=1e-4)
    assert found["eval/rewards/rejected"] == pytest.approx(0.2 * sum(bad) / 2, rel=1e-4)
    ahead = [r - z0 for r in good] + [z0 - r for r in bad]
    assert found["eval/accuracy"] == pytest.approx(sum(a > 0 for a in ahead) / 6)
    assert found["eval/rewards/margins"] == pytest.approx(0.2 * sum(ahead) / 6, rel=1e-4)


def test_a_batch_of_one_side_says_nothing_of_the_other() -> None:
    found = measured([judged for judged in labelled() if judged.ranks == [1]], loss="kto")
    assert {"eval/rewards/rejected", "eval/logps/rejected"} <= found.keys()
    assert {"eval/rewards/chosen", "eval/logps/chosen"}.isdisjoint(found)


def test_the_baseline_is_never_below_zero_and_has_no_gradient() -> None:
    ratios = torch.tensor([1.0, -4.0, 0.5], requires_grad=True)
    assert losses.kl_baseline(ratios).item() == 0.0
    above = losses.kl_baseline(-ratios)
    assert above.item() == pytest.approx(2.5 / 3)
    assert not above.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_vectors(dtype: torch.dtype) -> None:
    vectors = Vectors(dtype)
    given, expected = vectors("dpo_loss")
    pairs = [Judged([Example([4], [5])] * 2, [0, 1]) for _ in given.policy_chosen]
    woven = [
        torch.stack([getattr(given, f"{who}_chosen"), getattr(given, f"{who}_rejected")], 1).flatten()
        for who in ("policy", "ref", "n")
    ]
    smoothing = {"label_smoothing": given.label_smoothing}
    for name, settings in {
        "sigmoid": {"beta": given.beta},
        "cdpo": {"beta": given.beta, **smoothing},
        "robust": {"beta": given.beta, "loss": "robust", **smoothing},
        "hinge": {"beta": given.beta, "loss": "hinge"},
        "ipo_sum": {"beta": given.ipo_tau, "loss": "ipo"},
        "ipo_avg": {"beta": given.ipo_tau, "loss": "ipo_mean"},
    }.items():
        found = dpo.contrast_pairs(*woven, pairs, config(**settings))
        vectors.close(found.losses, getattr(expected, name))
        vectors.close(found.lead, expected.delta)
    answers = [Judged([Example([4], [5])], [int(not label)]) for label in given.kto_labels]
    settings = {"desirable_weight": given.kto_desirable_weight, "undesirable_weight": given.kto_undesirable_weight}
    found = dpo.contrast_answers(
        given.kto_logratios, torch.zeros_like(given.kto_logratios), answers,
        losses.kl_baseline(given.kto_mismatched_logratios), config(loss="kto", beta=given.beta, **settings),
    )  # fmt: skip
    vectors.close(found.losses, expected.kto)


# -- TRL ---------------------------------------------------------------------------------------------------------------

needs_trl = pytest.mark.skipif(not TRL.folder.is_dir(), reason=f"needs {TRL.label}: python -m benchmarks peers")


def ragged(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the target tokens, flat with their cu_rows, and where they stand in TRL's padded rows."""
    lengths = torch.randint(1, 9, (num,), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(num, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 2 : 2 + length] = True
    flat = -torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(4)).double() * 3
    return flat.requires_grad_(), cumulative(lengths.tolist()), mask


def trainer(**settings: Any) -> SimpleNamespace:
    """What TRL's loss asks of its trainer."""
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), f_divergence_type="reverse_kl",
        loss_weights=[1.0], use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip


def forward(padded: Tensor) -> Any:
    """A model that says these log-probs, and nothing of interest about anything else."""
    zero = torch.zeros_like(padded).detach()
    says = SimpleNamespace(log_probs=padded, entropy=zero, mean_logits=zero, is_top1=zero.bool())
    return lambda **_: says


def as_batch(mask: Tensor) -> dict[str, Tensor]:
    """Rows whose completion is where the mask is, one place later than the log-probs that predict it."""
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1).long()
    return {"input_ids": torch.ones_like(completion), "completion_mask": completion, "attention_mask": completion}


@needs_trl
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo_mean"])
def test_pairs_cost_what_they_cost_in_trl(name: str) -> None:
    given = config(**SETTINGS[name])
    num = 7
    flat, cu_rows, mask = ragged(2 * num)  # chosen, then rejected
    ref = -10 * torch.rand(2 * num, generator=torch.Generator().manual_seed(5)).double()
    padded = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat)
    stub = trainer(
        beta=given.beta, loss_types=[given.loss.removesuffix("_mean")], label_smoothing=given.label_smoothing
    )
    inputs = as_batch(mask) | {"ref_chosen_logps": ref[:num], "ref_rejected_logps": ref[num:]}
    theirs = TRL.function("trl.trainer.dpo_trainer", "DPOTrainer")._compute_loss(stub, forward(padded), inputs, False)
    (their_gradient,) = torch.autograd.grad(theirs, flat)
    woven = torch.arange(2 * num).view(2, num).T.flatten()
    pairs = [Judged([Example([4], [5])] * 2, [0, 1]) for _ in range(num)]
    logps = segment_sum(flat, cu_rows)
    found = dpo.contrast_pairs(logps[woven], ref[woven], cu_rows.diff()[woven], pairs, given)
    ours = found.losses.mean()
    (our_gradient,) = torch.autograd.grad(ours, flat)
    assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-14)
    logged = {key: values[0] for key, values in stub._metrics["train"].items()}
    assert given.beta * found.lead.mean().item() == pytest.approx(logged["rewards/margins"])
    assert (found.lead > 0).double().mean().item() == pytest.approx(logged["rewards/accuracies"])


@needs_trl
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_single_answers_cost_what_they_cost_in_trl(sign: float) -> None:
    given = config(**SETTINGS["kto"])
    num = 9
    flat, cu_rows, mask = ragged(num)
    ref, strange = (-10 * torch.rand(2, num, generator=torch.Generator().manual_seed(5))).double()
    labels = torch.tensor([i % 3 != 1 for i in range(num)])
    padded = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat)
    stub = trainer(beta=given.beta, loss_type="kto", calculate_KL=True, _compute_kl_logps=lambda *_: strange + sign,
                   desirable_weight=given.desirable_weight, undesirable_weight=given.undesirable_weight)  # fmt: skip
    inputs = as_batch(mask) | {"label": labels, "ref_logps": ref, "ref_KL_logps": strange}
    theirs = TRL.function("trl.trainer.kto_trainer", "KTOTrainer")._compute_loss(stub, forward(padded), inputs, False)
    (their_gradient,) = torch.autograd.grad(theirs, flat)
    answers = [Judged([Example([4], [5])], [int(not label)]) for label in labels]
    baseline = losses.kl_baseline(torch.full_like(strange, sign))
    ours = dpo.contrast_answers(segment_sum(flat, cu_rows), ref, answers, baseline, given).losses.mean()
    (our_gradient,) = torch.autograd.grad(ours, flat)
    assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-14)
    assert stub._metrics["train"]["kl"] == [baseline.item()] == [max(sign, 0.0)]


# -- strangers ---------------------------------------------------------------------------------------------------------


def unpaired() -> list[Unpaired]:
    """Pairs' two answers side by side, as a pair of chosen and rejected comes."""
    return [Unpaired(Example(PROMPTS[i // 2], RESPONSES[i], HOLES if i == 5 else None), i % 2 == 0) for i in range(12)]


def test_a_stranger_is_an_answer_to_another_prompt() -> None:
    rows = unpaired()
    own: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for row in rows:
        own[tuple(row.example.prompt)].add(tuple(row.example.response))
    for seed in range(9):
        drawn = dpo.strangers(rows, 64, seed)
        assert [e.prompt for e in drawn] == [row.example.prompt for row in rows]
        assert not any(tuple(e.response) in own[tuple(e.prompt)] for e in drawn)
    assert {tuple(e.response) for e in drawn} <= {tuple(r) for r in RESPONSES}
    assert len({tuple(e.response) for e in drawn}) > 6, "not the same one again and again"
    assert all((e.learn is not None) == (e.response == RESPONSES[5]) for e in drawn)
    assert drawn == dpo.strangers(rows, 64, seed) != dpo.strangers(rows, 64, seed + 1)


def test_a_stranger_is_no_longer_than_a_row_may_be() -> None:
    for long, short in zip(dpo.strangers(unpaired(), 64, 0), dpo.strangers(unpaired(), 7, 0), strict=True):
        room = 7 - len(long.prompt)
        assert short.response == long.response[:room]
        assert short.learn == (long.learn and long.learn[:room])
        assert len(pack([short]).tokens) <= 7


# -- the stage ---------------------------------------------------------------------------------------------------------

LEARNED: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "conservative": {"label_smoothing": 0.1},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "ipo_mean": {"loss": "ipo_mean"},
    "kto": {"loss": "kto"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_preferences_are_learned(name: str, box: Box, tmp_path: Path) -> None:
    make = toys.unpaired if name == "kto" else toys.comparisons
    table = {"data": make(96), "eval_data": make(48, seed=5)}
    run = toys.train("dpo", box, tmp_path / "run", batch_size=8, learning_rate=3e-3, epochs=2, **table, **LEARNED[name])
    assert column(run.dir, "accuracy")[0] == 0.5, "the policy is its reference"
    accuracy, loss = column(run.dir, "eval/accuracy"), column(run.dir, "eval/loss")
    assert len(accuracy) == len(loss) == 2, "at the end of each epoch"
    assert accuracy[-1] > 0.8
    assert loss[-1] < column(run.dir, "loss")[0]
    assert column(run.dir, "eval/rewards/chosen")[-1] > column(run.dir, "eval/rewards/rejected")[-1]
    good, bad = (likelier(run.dir, box["model"], answer) for answer in ("good good good", "bad bad bad"))
    assert good > bad + 1.0
    assert bad < 0


@torch.no_grad()
def likelier(folder: Path, before: str, answer: str) -> float:
    """By how many nats an answer has become likelier."""
    text = Text.from_pretrained(before)
    packed = pack([Example(text.prompt("one two"), text.completion(answer))])
    after, first = (Policy.from_pretrained(path, "none")(packed).logprobs.sum().item() for path in (folder, before))
    return after - first


@pytest.mark.parametrize("name", SETTINGS)
def test_cutting_into_micro_batches_changes_nothing(name: str, box: Box, tmp_path: Path) -> None:
    table = {"data": box["unpaired"], "eval_data": box["labelled"]} if name == "kto" else {}
    runs = [
        toys.train("dpo", box, tmp_path / str(n), tokens_per_micro=n, learning_rate=1e-4, **table, **SETTINGS[name])
        for n in (10_000, 20)
    ]
    for expected, line in zip(*(toys.metrics(run.dir) for run in runs), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_checkpointing_changes_nothing(loss: str, box: Box, tmp_path: Path) -> None:
    table = {"data": box["unpaired"], "eval_data": box["labelled"]} if loss == "kto" else {}
    kept, again = (
        toys.metrics(toys.train("dpo", box, tmp_path / str(on), loss=loss, gradient_checkpointing=on, **table).dir)
        for on in (False, True)
    )
    for expected, line in zip(kept, again, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("kto", 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_a_policy_that_is_its_reference_knows_nothing(
    dtype: str, loss: str, expected: float, box: Box, tmp_path: Path
) -> None:
    table = {"data": box["unpaired"], "eval_data": box["labelled"]} if loss == "kto" else {}
    run = toys.train("dpo", box, tmp_path / "run", loss=loss, learning_rate=0.0, dtype=dtype, **table)
    for line in toys.metrics(run.dir):
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        assert (line["accuracy"], line["rewards/margins"], line.get("kl", 0.0)) == (0.5, 0.0, 0.0)


def test_each_answer_is_passed_once_a_step(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ranking of three, three answers, not six; and the strangers of kto teach nothing."""
    learned = Counter()
    hidden = Policy.hidden

    def counted(self: Policy, packed: Any) -> Tensor:
        if torch.is_grad_enabled():
            learned.update(tuple(part.tolist()) for part in packed.tokens.split(list(packed.lengths)))
        return hidden(self, packed)

    monkeypatch.setattr(Policy, "hidden", counted)
    text = Text.from_pretrained(box["model"])
    for name, rows in (("pairs", toys.comparisons(10)), ("kto", toys.unpaired(10))):
        learned.clear()
        changes = {"loss": "kto", "eval_data": ""} if name == "kto" else {"eval_data": ""}
        toys.train("dpo", box, tmp_path / name, data=rows, **changes)
        given = Counter(
            (*text.prompt(row["prompt"]), *text.completion(answer))
            for row in rows
            for answer in row.get("completions", [row.get("completion")])
        )
        assert learned == given


def test_pairs_teach_kto_too(box: Box, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "chosen": "good good", "rejected": "bad"} for row in toys.prompts(24)]
    run = toys.train("dpo", box, tmp_path / "run", data=rows, eval_data=rows, loss="kto", epochs=4, learning_rate=3e-3)
    assert column(run.dir, "eval/accuracy")[-1] == 1.0
    assert max(column(run.dir, "kl")) > 0


def test_the_reference_may_be_another_model_and_stays_as_it_was(box: Box, tmp_path: Path) -> None:
    before = toys.files(box["other"])
    own = toys.train("dpo", box, tmp_path / "own")
    other = toys.train("dpo", box, tmp_path / "other", reference=box["other"])
    named = toys.train("dpo", box, tmp_path / "named", reference=box["model"])
    assert column(own.dir, "rewards/chosen")[0] == 0.0 != column(other.dir, "rewards/chosen")[0]
    assert toys.metrics(named.dir) == toys.metrics(own.dir)
    assert toys.files(box["other"]) == before


def test_the_logits_are_never_built() -> None:
    rows, length, vocabulary = 4, 40, 4000
    answers = [Example(p, r) for p, r in zip(ids([8] * 2 * rows), ids([length] * 2 * rows, seed=1), strict=True)]
    batch = [Judged([Example(a.prompt, a.response), Example(a.prompt, b.response)], [0, 1])
             for a, b in zip(answers[:rows], answers[rows:], strict=True)]  # fmt: skip
    trained = Policy(model(vocab_size=vocabulary), "none")
    given = config()
    optimizer = Optimizer(trained, given, 1)
    with Watch() as watch:
        dpo.update(trained, Reference(trained.frozen_copy()), optimizer, batch, given)
    assert VOCABULARY < vocabulary * 32 < watch.largest + 1 <= 2 * rows * length * vocabulary


# -- what the reference says, computed once ----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences in every pass that fills a table or asks a reference that is there."""
    counts: list[int] = []
    original = reference.response_logprobs

    def counted(policy: Policy, packed: Any) -> Tensor:
        counts.append(packed.num_sequences)
        return original(policy, packed)

    monkeypatch.setattr(reference, "response_logprobs", counted)
    return counts


def test_a_table_says_what_the_reference_says(box: Box, tmp_path: Path, asked: list[int]) -> None:
    for name, changes in {
        "pairs": {"loss": "ipo_mean"},
        "kto": {"loss": "kto", "data": box["unpaired"], "eval_data": box["labelled"]},
    }.items():
        live = toys.train("dpo", box, tmp_path / f"{name} live", reference=box["other"], epochs=2, **changes)
        asked.clear()
        table = toys.train(
            "dpo", box, tmp_path / f"{name} table", reference=box["other"], epochs=2, precompute_reference=True,
            **changes,
        )  # fmt: skip
        kept = json.loads((table.dir / FILE).read_text())["logprobs"]
        assert len(kept) == sum(asked) > 60, "each answer once, whatever the number of epochs"
        for expected, line in zip(toys.metrics(live.dir), toys.metrics(table.dir), strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_with_a_table_no_second_model_stays(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Policy]] = []
    alive: set[int] = set()
    load, update = Policy.from_pretrained, dpo.update

    def loaded(*args: Any) -> Policy:
        made.append(weakref.ref(policy := load(*args)))
        return policy

    def counted(*args: Any) -> dict[str, float]:
        if not alive:
            gc.collect()
        alive.add(sum(policy() is not None for policy in made))
        return update(*args)

    monkeypatch.setattr(Policy, "from_pretrained", loaded)
    monkeypatch.setattr(dpo, "update", counted)
    for precomputed, num in ((True, 1), (False, 2)):
        made.clear()
        alive.clear()
        toys.train("dpo", box, tmp_path / str(num), precompute_reference=precomputed)
        assert len(made) == 2
        assert alive == {num}


def table(box: Box, folder: Path, **changes: Any) -> dict[str, float]:
    """The table of a run in this folder, which may hold an earlier one."""
    run = toys.train("dpo", box, folder, **{"precompute_reference": True, "eval_data": ""} | changes)
    return json.loads((run.dir / FILE).read_text())["logprobs"]


def earlier(box: Box, tmp_path: Path, asked: list[int], **changes: Any) -> tuple[dict[str, float], Path]:
    """A table, and a folder for a new run that already holds it."""
    first = table(box, tmp_path / "first", **changes)
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / FILE).write_bytes((tmp_path / "first" / FILE).read_bytes())
    asked.clear()
    return first, tmp_path / "next"


def test_a_table_is_used_again(box: Box, tmp_path: Path, asked: list[int]) -> None:
    first, folder = earlier(box, tmp_path, asked)
    assert table(box, folder, beta=0.5, seed=3, batch_size=8) == first
    assert asked == []


def test_only_what_is_new_in_the_data_is_asked(box: Box, tmp_path: Path, asked: list[int]) -> None:
    first, folder = earlier(box, tmp_path, asked)
    rows = [*toys.comparisons(40), {"prompt": "one", "chosen": "fine", "rejected": "poor"}]
    second = table(box, folder, data=rows)
    assert sum(asked) == 2
    assert {name: second[name] for name in first} == first
    assert len(second) == len(first) + 2


def test_answers_that_are_cut_elsewhere_are_asked_again(box: Box, tmp_path: Path, asked: list[int]) -> None:
    first, folder = earlier(box, tmp_path, asked)
    second = table(box, folder, max_length=4)
    assert sum(asked) == len(second) - len(first) > 0


def test_other_weights_throw_the_table_away(box: Box, tmp_path: Path, asked: list[int]) -> None:
    first, folder = earlier(box, tmp_path, asked)
    second = table(box, folder, reference=box["other"])
    assert second.keys() == first.keys()
    assert sum(asked) == len(first)
    assert all(second[name] != first[name] for name in first)


def test_another_dtype_throws_the_table_away(box: Box, tmp_path: Path, asked: list[int]) -> None:
    first, folder = earlier(box, tmp_path, asked)
    second = table(box, folder, dtype="bfloat16")
    assert second.keys() == first.keys()
    assert sum(asked) == len(first)
    assert second == pytest.approx(first, rel=0.05)
    assert second != first


def test_a_fingerprint_is_of_everything_that_counts() -> None:
    plain = Policy(model(), "none")
    same = policy_fingerprint(plain)
    assert policy_fingerprint(Policy(model(), "none")) == same == policy_fingerprint(plain.frozen_copy())
    with torch.no_grad():
        plain.model.lm_head.weight[3, 4] += 1e-6
    changed = [plain, Policy(model(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), "none")]
    changed.append(Policy(model().to(torch.bfloat16), "none"))
    changed.append(Policy(model(), "none"))
    set_precision(changed[-1].model, "mixed")
    assert len({same, *map(policy_fingerprint, changed)}) == 5
    examples = [
        Example([4, 5], [6]), Example([4], [5, 6]), Example([4, 5], [7]), Example([4, 5], [6], [True]),
        Example([4, 5], [6], [False]), Example([], [4, 5, 6]),
    ]  # fmt: skip
    assert len({example_fingerprint(e) for e in examples}) == 6
    assert example_fingerprint(Example([4, 5], [6])) == example_fingerprint(examples[0])


def test_a_resumed_run_asks_for_nothing_again(box: Box, tmp_path: Path, asked: list[int]) -> None:
    run = toys.train("dpo", box, tmp_path / "run", precompute_reference=True)
    weights = load_file(run.dir / "model.safetensors")
    asked.clear()
    (run.dir / "config.json").unlink()
    again = toys.train("dpo", box, tmp_path / "run", precompute_reference=True)
    assert asked == []
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_file(again.dir / "model.safetensors").items()
    )
