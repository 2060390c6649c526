"""The preference losses against their formulas, at margins where a naive formula overflows, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import dpo_loss
from twinhead.kernels.dpo import LOSS_TYPES


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


FORMULAS: dict[tuple[str, float], Callable[[float, float], float]] = {
    ("sigmoid", 0.0): lambda h, beta: -log_sigmoid(beta * h),
    ("sigmoid", 0.1): lambda h, beta: -0.9 * log_sigmoid(beta * h) - 0.1 * log_sigmoid(-beta * h),
    ("robust", 0.1): lambda h, beta: (-0.9 * log_sigmoid(beta * h) + 0.1 * log_sigmoid(-beta * h)) / 0.8,
    ("hinge", 0.0): lambda h, beta: max(0.0, 1 - beta * h),
    ("ipo", 0.0): lambda h, beta: (h - 1 / (2 * beta)) ** 2,
}


def pairs(count: int) -> tuple[Tensor, ...]:
    torch.manual_seed(count)
    given = [20 * torch.randn(count, dtype=torch.float64) - 60 for _ in range(4)]
    if count > 3:
        given[0][0], given[1][0] = -1.0, -5000.0
        given[0][1], given[1][1] = -5000.0, -1.0
    return tuple(given)


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), FORMULAS)
def test_against_the_formulas(loss_type: str, label_smoothing: float, count: int) -> None:
    given = pairs(count)
    losses, chosen, rejected = dpo_loss(*given, beta=0.3, loss_type=loss_type, label_smoothing=label_smoothing)
    h = ((given[0] - given[1]) - (given[2] - given[3])).tolist()
    expected = [FORMULAS[loss_type, label_smoothing](x, 0.3) for x in h]
    assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    assert_close(chosen, 0.3 * (given[0] - given[2]))
    assert_close(rejected, 0.3 * (given[1] - given[3]))


@pytest.mark.parametrize(("loss_type", "label_smoothing"), FORMULAS)
def test_gradients(loss_type: str, label_smoothing: float) -> None:
    given = tuple(x.requires_grad_() for x in pairs(7))
    settings = {"loss_type": loss_type, "label_smoothing": label_smoothing}
    losses, chosen, rejected = dpo_loss(*given, **settings)
    assert not chosen.requires_grad and not rejected.requires_grad
    assert all(x.isfinite().all() for x in torch.autograd.grad(losses.sum(), given))
    near = tuple(x.detach()[2:].requires_grad_() for x in given)
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, **settings)[0], near)


def test_equal_models_give_log_two_and_half_precision_gives_float32() -> None:
    given = pairs(5)
    losses, _, _ = dpo_loss(given[0], given[1], given[0], given[1])
    assert_close(losses, torch.full((5,), math.log(2), dtype=torch.float64))
    halves = [x.bfloat16() for x in given]
    losses, chosen, _ = dpo_loss(*halves)
    assert losses.dtype == chosen.dtype == torch.float32
    assert_close(losses.double(), dpo_loss(*(x.double() for x in halves))[0], rtol=1e-5, atol=1e-5)


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        ("policy_rejected_logps of the shape of policy_chosen_logps", lambda: dpo_loss(X, X[:2], X, X)),
        ("ref_rejected_logps of the shape of policy_chosen_logps", lambda: dpo_loss(X, X, X, X[None])),
        (f"loss_type to be one of {', '.join(LOSS_TYPES)}, got 'kto'", lambda: dpo_loss(X, X, X, X, loss_type="kto")),
        ("beta > 0, got 0", lambda: dpo_loss(X, X, X, X, beta=0)),
        (r"label_smoothing in \[0, 0.5\), got 0.5", lambda: dpo_loss(X, X, X, X, label_smoothing=0.5)),
        (r"label_smoothing in \[0, 0.5\), got -0.1", lambda: dpo_loss(X, X, X, X, label_smoothing=-0.1)),
        ("label_smoothing 0 for loss_type 'ipo'", lambda: dpo_loss(X, X, X, X, loss_type="ipo", label_smoothing=0.1)),
        (
            "label_smoothing 0 for loss_type 'hinge'",
            lambda: dpo_loss(X, X, X, X, loss_type="hinge", label_smoothing=0.1),
        ),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
