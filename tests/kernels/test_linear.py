"""The fused head against logits built as a whole: values, every gradient, memory, work, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import linear_cross_entropy, linear_logprob, linear_ppo_loss
from twinhead.kernels.linear import reference
from twinhead.kernels.linear.objective import Objective

SIZES = [(0, 31), (1, 2), (7, 1000), (1100, 31), (2, 50257)]  # rows, words
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "cap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.3},
    "everything": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 1.7},
}


def head(rows: int, words: int, width: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """hidden, weight, bias, targets."""
    torch.manual_seed(rows + words)
    hidden, weight, bias = torch.randn(rows, width), torch.randn(words, width), torch.randn(words)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), torch.randint(words, (rows,))


def logprob_and_gradients(function: Callable, inputs: tuple[Tensor, ...], slopes: tuple, **settings: Any) -> list:
    """The outputs of linear_logprob, and the gradients of what it is asked to learn from."""
    hidden, weight, bias, targets = inputs
    outputs = function(hidden, weight, targets, bias, return_entropy=True, **settings)
    learned = sum((slope * x).sum() for slope, x in zip(slopes, outputs, strict=True) if slope is not None)
    gradients = torch.autograd.grad(learned, [x for x in (hidden, weight, bias) if x is not None and x.requires_grad])
    return [*outputs, *gradients]


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("rows", "words"), SIZES)
def test_blocks_equal_the_whole(rows: int, words: int, settings: dict[str, float]) -> None:
    hidden, weight, bias, targets = head(rows, words)
    targets[::3] = -100
    for given, *slopes in product((bias, None), (None, torch.randn(rows)), (None, torch.randn(rows))):
        if slopes != [None, None]:
            inputs = (hidden, weight, given, targets)
            ours = logprob_and_gradients(linear_logprob, inputs, tuple(slopes), **settings)
            assert_close(ours, logprob_and_gradients(reference.linear_logprob, inputs, tuple(slopes), **settings))


def test_the_reference_is_what_it_says() -> None:
    hidden, weight, bias, targets = head(7, 31)
    z = 3 * ((0.5 * (hidden @ weight.t() + bias)) / 3).tanh() / 0.7
    p = z.exp() / z.exp().sum(1, keepdim=True)
    logprobs, entropy = reference.linear_logprob(
        hidden, weight, targets, bias, temperature=0.7, softcap=3.0, logit_scale=0.5, return_entropy=True
    )
    assert_close(logprobs, p[torch.arange(7), targets].log())
    assert_close(entropy, (p * -p.log()).sum(1))


def test_gradcheck() -> None:
    hidden, weight, bias, targets = head(6, 9)
    targets[2] = -100
    assert torch.autograd.gradcheck(
        lambda *x: linear_logprob(x[0], x[1], targets, x[2], return_entropy=True, **SETTINGS["everything"]),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("learning", list(product((True, False), repeat=3))[:-1])
def test_what_is_frozen_gets_no_gradient(learning: tuple[bool, ...], watch: Any) -> None:
    rows, words, width = 600, 31, 5
    hidden, weight, bias, targets = head(rows, words)
    for x, learns in zip((hidden, weight, bias), learning, strict=True):
        x.requires_grad_(learns)
    wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
    one_product = rows * words * width

    with watch:
        found = torch.autograd.grad(linear_logprob(hidden, weight, targets, bias).sum(), wanted)
    assert watch.multiplications == one_product * (2 + learning[0] + learning[1])
    assert_close(found, torch.autograd.grad(reference.linear_logprob(hidden, weight, targets, bias)[0].sum(), wanted))

    watch.multiplications = 0
    with watch:
        loss, _ = linear_ppo_loss(hidden, weight, targets, torch.zeros(rows), torch.ones(rows), bias=bias)
        torch.autograd.grad(loss, wanted)
    assert watch.multiplications == one_product * (1 + learning[0] + learning[1])


@pytest.mark.parametrize("rows", [2, 60, 2048])
def test_the_logits_never_exist_and_the_work_is_counted(rows: int, watch: Any) -> None:
    words, width = 4096, 1
    hidden, weight, _, targets = head(rows, words, width, torch.float32)
    constants = (torch.zeros(rows), torch.randn(rows))
    one_product, whole_logits = rows * words * width, rows * words

    def products(run: Callable[[], Any]) -> int:
        watch.largest = watch.multiplications = 0
        with watch:
            run()
        assert watch.largest < whole_logits, "a tensor of rows x words elements was allocated"
        return watch.multiplications // one_product

    def learn(loss: Tensor) -> None:
        torch.autograd.grad(loss, (hidden, weight))

    assert products(lambda: learn(sum(x.sum() for x in linear_cross_entropy(hidden, weight, targets)))) == 4
    assert products(lambda: learn(linear_ppo_loss(hidden, weight, targets, *constants, entropy_coef=0.1)[0])) == 3
    with torch.no_grad():
        assert products(lambda: linear_logprob(hidden, weight, targets, return_entropy=True)) == 1
        assert products(lambda: linear_ppo_loss(hidden, weight, targets, *constants)) == 1
    frozen = hidden.detach(), weight.detach()
    assert products(lambda: linear_ppo_loss(*frozen, targets, *constants)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_twice_torchs(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = head(300, 1000, 64, dtype)
    slopes = (torch.randn(300), torch.randn(300))

    def plainly(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        logp = (hidden @ weight.t() + bias).log_softmax(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth = logprob_and_gradients(reference.linear_logprob, (*exact, targets), slopes)
    ours = logprob_and_gradients(linear_logprob, (hidden, weight, bias, targets), slopes)
    torchs = logprob_and_gradients(plainly, (hidden, weight, bias, targets), slopes)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for true, our, their in zip(truth, ours, torchs, strict=True):
        assert (our.double() - true).abs().max() <= 2 * (their.double() - true).abs().max() + 1e-6


def test_autocast_does_not_round_the_logits() -> None:
    hidden, weight, bias, targets = head(300, 100, 64, torch.float32)
    expected = linear_logprob(hidden, weight, targets, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, weight, targets, bias), expected)
        assert linear_logprob(hidden.bfloat16(), weight, targets, bias).dtype == torch.float32


def test_rows_are_independent() -> None:
    hidden, weight, bias, targets = head(1000, 31, dtype=torch.float32)
    whole = linear_logprob(hidden, weight, targets, bias, return_entropy=True)
    part = linear_logprob(hidden[300:307], weight, targets[300:307], bias, return_entropy=True)
    assert_close(part, tuple(x[300:307] for x in whole), rtol=1e-6, atol=1e-6)


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, bias, targets = head(7, 31)
    hidden = hidden.detach()
    expected = linear_logprob(hidden[1:], weight, targets[1:], bias, return_entropy=True)
    poisoned = hidden.clone()
    poisoned[0] = float("nan")
    poisoned.requires_grad_()
    ignored = torch.cat([torch.tensor([-1]), targets[1:]])
    logprobs, entropy = linear_logprob(poisoned, weight, ignored, bias, return_entropy=True, ignore_index=-1)
    assert logprobs[0] == 0 and entropy[0] == 0
    assert_close((logprobs[1:], entropy[1:]), expected)
    found = torch.autograd.grad((logprobs + entropy).sum(), (poisoned, weight, bias))
    assert_close(found[1:], torch.autograd.grad(sum(expected).sum(), (weight, bias)))
    assert (found[0][0] == 0).all() and found[0].isfinite().all()
    nothing = linear_logprob(poisoned, weight, torch.full((7,), -100), bias)
    assert (nothing == 0).all() and (torch.autograd.grad(nothing.sum(), weight)[0] == 0).all()


def test_extreme_logits_and_excluded_words() -> None:
    hidden, weight, bias, targets = head(7, 31)
    with torch.no_grad():
        bias[5:20] = -float("inf")
        weight[0] *= 1e3
    targets[:] = torch.tensor([0, 1, 2, 3, 4, 25, 30])
    slopes = (torch.randn(7), torch.randn(7))
    ours = logprob_and_gradients(linear_logprob, (hidden, weight, bias, targets), slopes)
    assert all(x.isfinite().all() for x in ours)
    assert_close(ours[:2], logprob_and_gradients(reference.linear_logprob, (hidden, weight, bias, targets), slopes)[:2])
    assert (ours[4][5:20] == 0).all()
    shifted = linear_logprob(hidden, weight, targets, bias + 1e4, return_entropy=True)
    assert_close(shifted, tuple(ours[:2]), rtol=0, atol=1e-9)
    assert linear_logprob(hidden[:1], weight, torch.tensor([6]), bias) == -float("inf")


def test_strided_views_and_more_dimensions() -> None:
    hidden, weight, bias, targets = head(24, 31, 6)
    expected = linear_logprob(hidden, weight, targets, bias)
    strided = torch.randn(24, 12, dtype=torch.float64)
    strided[:, ::2] = hidden.detach()
    columns = weight.detach().t().contiguous().t().requires_grad_()
    found = linear_logprob(strided[:, ::2].view(2, 12, 6), columns, targets.view(2, 12).int(), bias)
    assert_close(found, expected.view(2, 12))
    torch.autograd.grad(found.sum(), columns)


def test_results_belong_to_the_caller() -> None:
    hidden, weight, bias, targets = head(7, 31)
    logprobs, entropy = linear_logprob(hidden, weight, targets, bias, return_entropy=True)
    expected = torch.autograd.grad(2 * logprobs.sum() + 3 * entropy.sum(), weight, retain_graph=True)
    logprobs *= 2
    entropy *= 3
    assert_close(torch.autograd.grad(logprobs.sum() + entropy.sum(), weight), expected)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, bias, targets = head(7, 31)
    ppo, _ = linear_ppo_loss(hidden, weight, targets, torch.zeros(7), torch.ones(7))
    for loss in (linear_logprob(hidden, weight, targets, bias).sum(), ppo):
        with pytest.raises(RuntimeError, match="can be differentiated once: expected create_graph=False"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_verls_order() -> None:
    hidden, weight, _, labels = head(7, 31)
    expected = linear_logprob(hidden, weight, labels, temperature=0.7, return_entropy=True)
    assert_close(linear_cross_entropy(hidden, weight, labels, 0.7), expected)
    total, entropy = linear_cross_entropy(hidden, weight, labels, 0.7, "sum")
    assert_close((total, entropy), (expected[0].sum(), expected[1]))
    assert_close(linear_cross_entropy(hidden, weight, labels, 0.7, "mean")[0], expected[0].mean())


OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clips": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5},
    "k1": {"kl_coef": 0.1, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.1, "temperature": 0.7},
    "entropy": {"entropy_coef": 0.05, "normalizer": 3},
    "everything": {"kl_coef": 0.2, "entropy_coef": 0.1, "dual_clip": 2.0, "normalizer": torch.tensor(11)},
}


def tokens(rows: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """old_logprobs around the present ones, with some ratios far outside all clips; advantages; ref_logprobs."""
    hidden, weight, bias, targets = inputs
    logprobs = linear_logprob(hidden, weight, targets, bias).detach()
    old_logprobs = logprobs + 0.4 * torch.randn(rows, dtype=logprobs.dtype)
    old_logprobs[::7] -= 25
    return old_logprobs, torch.randn(rows), logprobs + 0.3 * torch.randn(rows, dtype=logprobs.dtype)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(("rows", "words"), SIZES)
def test_one_pass_equals_autograd(rows: int, words: int, settings: dict[str, Any]) -> None:
    inputs = hidden, weight, bias, targets = head(rows, words)
    old_logprobs, advantages, ref_logprobs = tokens(rows, inputs)
    loss, stats = linear_ppo_loss(
        hidden, weight, targets, old_logprobs, advantages, ref_logprobs=ref_logprobs, bias=bias, **settings
    )
    defaults = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "kl_coef": 0.0, "kl_estimator": "k3"}
    defaults |= {"entropy_coef": 0.0, "normalizer": None, "temperature": 1.0}
    chosen = defaults | settings
    temperature = chosen.pop("temperature")
    objective = Objective(old_logprobs, advantages, ref_logprobs, **chosen)
    expected, expected_stats = reference.linear_ppo_loss(
        hidden, weight, targets, bias, objective, temperature=temperature
    )
    assert_close(loss, expected)
    assert_close(stats, expected_stats)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    assert_close(gradients, torch.autograd.grad(3 * expected, (hidden, weight, bias)))


def test_the_objective_is_what_it_says() -> None:
    inputs = hidden, weight, bias, targets = head(50, 31)
    old_logprobs, advantages, ref_logprobs = (x.double() for x in tokens(50, inputs))
    logp = (hidden @ weight.t() + bias).log_softmax(-1).detach()
    total = clipped = 0.0
    for r in range(50):
        new = logp[r, targets[r]]
        ratio, advantage = math.exp(min(max(new - old_logprobs[r], -20), 20)), advantages[r]
        sides = -advantage * ratio, -advantage * min(max(ratio, 0.9), 1.3)
        clipped += float(sides[1] > sides[0])
        policy = max(sides) if advantage >= 0 else min(max(sides), -2 * advantage)
        k3 = (ref_logprobs[r] - new).exp() - 1 - (ref_logprobs[r] - new)
        total += policy + 0.3 * k3 + 0.05 * (logp[r].exp() * logp[r]).sum()
    settings = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl_coef": 0.3, "entropy_coef": 0.05}
    loss, stats = linear_ppo_loss(
        hidden,
        weight,
        targets,
        old_logprobs,
        advantages,
        ref_logprobs=ref_logprobs,
        normalizer=40,
        bias=bias,
        **settings,
    )
    assert_close(loss, total / 40)
    assert_close(stats["clipfrac"].item(), clipped / 40)


def test_half_precision_gives_a_float32_loss_and_gradients_of_its_own() -> None:
    inputs = hidden, weight, bias, targets = head(300, 100, 32, torch.bfloat16)
    old_logprobs, advantages, ref_logprobs = tokens(300, inputs)
    more = {"ref_logprobs": ref_logprobs, "kl_coef": 0.1, "entropy_coef": 0.1}
    loss, _ = linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages, bias=bias, **more)
    ours = torch.autograd.grad(loss, (hidden, weight, bias))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth, _ = linear_ppo_loss(exact[0], exact[1], targets, old_logprobs, advantages, bias=exact[2], **more)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for our, true in zip(ours, torch.autograd.grad(truth, exact), strict=True):
        assert our.dtype == torch.bfloat16
        assert_close(our.double(), true, rtol=1e-2, atol=1e-6)


def test_the_loss_can_be_backpropagated_twice_and_splits_into_micro_batches() -> None:
    inputs = hidden, weight, _, targets = head(700, 31)
    old_logprobs, advantages, _ = tokens(700, inputs)
    loss, _ = linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
    parts = torch.zeros_like(first)
    for rows in (slice(0, 123), slice(123, 700)):
        part, _ = linear_ppo_loss(
            hidden[rows], weight, targets[rows], old_logprobs[rows], advantages[rows], normalizer=700
        )
        parts += torch.autograd.grad(part, weight)[0]
    assert_close(parts, first)


HIDDEN, WEIGHT, TARGETS, TOKENS = (
    torch.zeros(3, 4),
    torch.zeros(5, 4),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(3),
)


def ppo(*args: Any, **kwargs: Any) -> Callable[[], object]:
    return lambda: linear_ppo_loss(HIDDEN, WEIGHT, TARGETS, *(args or (TOKENS, TOKENS)), **kwargs)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        (r"hidden \(..., D\) and weight \(V, D\), got", lambda: linear_logprob(HIDDEN, WEIGHT.t(), TARGETS)),
        (r"targets of shape \(3,\), got \(2,\)", lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS[:2])),
        (r"targets in \[0, 5\), got 5", lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS + 5)),
        (r"targets in \[0, 5\), got -1", lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS - 1)),
        ("targets of dtype int64, got torch.float32", lambda: linear_logprob(HIDDEN, WEIGHT, TOKENS)),
        (r"bias of shape \(5,\), got \(3,\)", lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, TOKENS)),
        ("temperature > 0, got 0", lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, temperature=0)),
        ("softcap > 0, got -1", lambda: linear_logprob(HIDDEN, WEIGHT, TARGETS, softcap=-1)),
        ("reduction to be one of", lambda: linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, 1.0, "median")),
        ("dist_process_group None", lambda: linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, 1.0, "none", "world")),
        (r"targets in \[0, 5\), got -100", lambda: linear_ppo_loss(HIDDEN, WEIGHT, TARGETS - 100, TOKENS, TOKENS)),
        ("old_logprobs of the shape of targets", ppo(TOKENS[:2], TOKENS)),
        ("advantages of the shape of targets", ppo(TOKENS, TOKENS[:2])),
        ("ref_logprobs of the shape of targets", ppo(ref_logprobs=TOKENS[:2])),
        (r"clip_low in \[0, 1\], got 1.2", ppo(clip_low=1.2)),
        (r"clip_high in \[0, inf\], got -0.2", ppo(clip_high=-0.2)),
        (r"dual_clip in \[1, inf\], got 0.5", ppo(dual_clip=0.5)),
        ("kl_estimator to be one of k1, k2, k3, got 'k4'", ppo(kl_estimator="k4")),
        ("ref_logprobs for kl_coef=0.1, got None", ppo(kl_coef=0.1)),
        ("temperature > 0, got -1", ppo(temperature=-1)),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
