"""Divergences against torch.distributions, finite differences, and logits built as a whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from twinhead.kernels import full_kl, kl_estimate, linear_kl
from twinhead.kernels._estimators import KINDS, slope
from twinhead.kernels.kl import DIRECTIONS, reference

INF = float("inf")


def two_logits(rows: int, words: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows + words)
    return tuple((2 * torch.randn(rows, words, dtype=torch.float64)).requires_grad_() for _ in range(2))


def exact(logits: Tensor, ref_logits: Tensor, direction: str, temperature: float) -> Tensor:
    policy, ref = (Categorical(logits=x / temperature, validate_args=False) for x in (logits, ref_logits))
    return kl_divergence(policy, ref) if direction == "reverse" else kl_divergence(ref, policy)


def test_estimates_by_hand() -> None:
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    d = torch.tensor([1.0, 0.0, -2.0])
    assert_close(kl_estimate(logprobs, ref_logprobs), d)
    assert_close(kl_estimate(logprobs, ref_logprobs, "k2"), torch.tensor([0.5, 0.0, 2.0]))
    assert_close(kl_estimate(logprobs, ref_logprobs, "k3"), (-d).exp() - 1 + d)
    assert kl_estimate(logprobs.bfloat16(), ref_logprobs.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_derivatives_and_nothing_overflows(kind: str) -> None:
    logprobs = torch.tensor([-3.0, -0.1, -900.0, -1.0, -7.0], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.tensor([-1.0, -40.0, -2.0, -1.0, -8.0], dtype=torch.float64)
    estimate = kl_estimate(logprobs, ref_logprobs, kind)
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    assert estimate.isfinite().all() and gradient.isfinite().all()
    assert_close(slope(logprobs.detach(), ref_logprobs, kind), gradient)
    near = logprobs.detach()[3:].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref_logprobs[3:], kind), near)


@pytest.mark.parametrize("words", [2, 31, 1000, 50257])
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_full_kl_against_the_distributions(rows: int, words: int) -> None:
    logits, ref_logits = two_logits(min(rows, 7) if words > 10_000 else rows, words)
    for direction in DIRECTIONS:
        found = full_kl(logits, ref_logits, direction=direction, temperature=0.7)
        assert_close(found, exact(logits, ref_logits, direction, 0.7))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str) -> None:
    logits, ref_logits = two_logits(4, 5)
    assert torch.autograd.gradcheck(
        lambda x, y: full_kl(x.view(2, 2, 5), y.view(2, 2, 5), direction=direction, temperature=0.7),
        (logits, ref_logits),
    )
    states = heads(4, 5)
    assert torch.autograd.gradcheck(lambda *x: linear_kl(*x, direction=direction, temperature=0.7), states)


def test_words_that_are_excluded() -> None:
    logits, ref_logits = (x.detach() for x in two_logits(3, 6))
    logits[:, 4:] = ref_logits[:, 4:] = -INF
    logits.requires_grad_()
    kl = full_kl(logits, ref_logits)
    assert_close(kl, exact(logits[:, :4], ref_logits[:, :4], "reverse", 1.0))
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient.isfinite().all() and (gradient[:, 4:] == 0).all()
    ref_logits[0, 0] = -INF
    assert full_kl(logits, ref_logits)[0] == INF
    assert full_kl(logits, ref_logits, direction="forward").isfinite().all()


def test_only_differences_matter_and_extremes_stay_finite() -> None:
    logits, ref_logits = two_logits(7, 31)
    assert_close(full_kl(logits + 1e4, ref_logits - 1e4), full_kl(logits, ref_logits), rtol=0, atol=1e-9)
    certain = torch.tensor([[1e4, 0.0, 0.0]])
    assert_close(full_kl(certain, certain), torch.zeros(1))
    assert_close(full_kl(certain, certain.flip(-1)), torch.tensor([1e4]))


def heads(rows: int, words: int) -> tuple[Tensor, ...]:
    """hidden, weight, ref_hidden, ref_weight; the two models have different widths."""
    torch.manual_seed(rows + words)
    shapes = ((rows, 3), (words, 3), (rows, 4), (words, 4))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "words"), [(0, 31), (1, 2), (7, 1000), (1100, 31), (2, 50257)])
def test_linear_kl_equals_the_whole(rows: int, words: int, direction: str) -> None:
    states = heads(rows, words)
    row_slope = torch.randn(rows)
    ours, plain = (f(*states, direction=direction, temperature=0.7) for f in (linear_kl, reference.linear_kl))
    assert_close(ours, plain)
    gradients = torch.autograd.grad((ours * row_slope).sum(), states)
    assert_close(gradients, torch.autograd.grad((plain * row_slope).sum(), states))
    nested = (states[0].view(1, rows, 3), states[1], states[2].view(1, rows, 4), states[3])
    assert torch.equal(linear_kl(*nested, direction=direction, temperature=0.7), ours.view(1, rows))


@pytest.mark.parametrize("learning", list(product((True, False), repeat=4))[:-1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_frozen_gets_no_gradient_and_no_logits_exist(
    learning: tuple[bool, ...], direction: str, watch: Any
) -> None:
    rows, words = 600, 31
    states = tuple(x.requires_grad_(learns) for x, learns in zip(heads(rows, words), learning, strict=True))
    wanted = [x for x in states if x.requires_grad]
    with watch:
        kl = linear_kl(*states, direction=direction)
        found = torch.autograd.grad(kl.sum(), wanted)
    widths = (3, 3, 4, 4)
    work = 2 * (3 + 4) + sum(width for width, learns in zip(widths, learning, strict=True) if learns)
    assert watch.multiplications == rows * words * work
    assert watch.largest < rows * words
    assert_close(found, torch.autograd.grad(reference.linear_kl(*states, direction=direction).sum(), wanted))


def test_half_precision_heads_are_multiplied_in_float32() -> None:
    states = [x.detach().bfloat16().requires_grad_() for x in heads(100, 31)]
    exactly = [x.detach().double().requires_grad_() for x in states]
    ours, truth = linear_kl(*states), reference.linear_kl(*exactly)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(ours.sum(), states)
    for our, true in zip(gradients, torch.autograd.grad(truth.sum(), exactly), strict=True):
        assert our.dtype == torch.bfloat16
        assert_close(our.double(), true, rtol=1e-2, atol=1e-3)


def test_results_belong_to_the_caller() -> None:
    states = heads(4, 5)
    kl = linear_kl(*states)
    expected = torch.autograd.grad(2 * kl.sum(), states, retain_graph=True)
    kl *= 2
    assert_close(torch.autograd.grad(kl.sum(), states), expected)


def test_a_second_derivative_is_refused() -> None:
    states = heads(4, 5)
    with pytest.raises(RuntimeError, match="linear_kl can be differentiated once: expected create_graph=False"):
        torch.autograd.grad(linear_kl(*states).sum(), states[0], create_graph=True)


X, Y = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        ("kind to be one of k1, k2, k3, got 'kl'", lambda: kl_estimate(X, X, "kl")),
        (r"ref_logprobs of the shape of logprobs, \(3, 4\), got \(5, 4\)", lambda: kl_estimate(X, Y)),
        (r"ref_logits of the shape of logits, \(3, 4\), got \(5, 4\)", lambda: full_kl(X, Y)),
        ("direction to be one of reverse, forward, got 'both'", lambda: full_kl(X, X, direction="both")),
        ("temperature > 0, got 0", lambda: full_kl(X, X, temperature=0)),
        (r"hidden \(..., D\) and weight \(V, D\), got", lambda: linear_kl(X, X[:, :2], X, Y)),
        (r"ref_hidden \(..., D\) and ref_weight \(V, D\), got", lambda: linear_kl(X, Y, X[:, :2], Y)),
        ("two heads over the same rows and the same vocabulary", lambda: linear_kl(X, Y, X, X)),
        ("two heads over the same rows and the same vocabulary", lambda: linear_kl(X, Y, X[:2], Y)),
        ("direction to be one of", lambda: linear_kl(X, Y, X, Y, direction="sideways")),
        ("temperature > 0, got -1", lambda: linear_kl(X, Y, X, Y, temperature=-1)),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
