"""Products by oneDNN against torch's own in float64, whatever the number of rows; and when they are torch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twinhead.kernels import linear_logprob, linear_ppo_loss, product
from twinhead.kernels._head import Head, HeadGradient

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
MULTIPLY = torch.ops.mkldnn._linear_pointwise


@pytest.fixture(autouse=True)
def every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the small ones, on every machine, in many tiles."""
    monkeypatch.setattr(product, "AVAILABLE", True)
    monkeypatch.setattr(product, "FEWEST", 0)
    monkeypatch.setattr(product, "TILE", 64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the left factors that oneDNN was given."""
    given: list[tuple[int, ...]] = []
    multiply = product._multiply

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given.append(tuple(x.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(product, "_multiply", recorded)
    return given


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(4, 33), (8, 5), (2, 3, 64), (1, 19, 16), (130, 24)])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], biased: bool, calls: list) -> None:
    x, weight, bias = numbers(*shape), numbers(7, shape[-1]), numbers(7) if biased else None
    slopes = numbers(*shape[:-1], 7, seed=1)
    found = []
    for dtype, by in ((torch.float32, product.linear), (torch.float64, F.linear)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, *([bias] if biased else []))]
        y = by(leaves[0], leaves[1], leaves[2] if biased else None)
        found.append([y, *torch.autograd.grad(y, leaves, slopes.to(dtype))])
    assert len(calls) == 3
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)
        assert ours.shape == expected.shape


def test_only_what_needs_a_gradient_is_multiplied(calls: list) -> None:
    x, weight = numbers(8, 4), numbers(6, 4).requires_grad_()
    product.linear(x, weight).sum().backward()
    assert len(calls) == 2
    frozen = weight.detach()
    product.linear(x.requires_grad_(), frozen).sum().backward()
    assert len(calls) == 4
    with torch.no_grad():
        assert product.linear(x, weight).grad_fn is None


def test_numbers_of_rows_come_up_again(calls: list) -> None:
    for rows in range(4, 513):
        product.linear(numbers(rows, 4), numbers(6, 4))
    assert len({rows for rows, _ in calls}) == 64 / 16 + 192 / 32 + 256 / 128
    assert [product.wholly(n) for n in (8, 33, 65, 256, 257, 384, 1000)] == [16, 48, 96, 256, 384, 384, 1024]


@pytest.mark.parametrize(
    "x",
    [numbers(3, 4), numbers(8, 4).double(), numbers(8, 4).bfloat16(), numbers(0, 4)],
    ids=["few rows", "float64", "bfloat16", "no rows"],
)
def test_the_rest_is_torch_s(x: Tensor, calls: list) -> None:
    weight = numbers(6, 4).to(x.dtype)
    assert torch.equal(product.linear(x, weight), F.linear(x, weight))
    assert calls == []


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # which flags() sets along
def test_it_can_be_switched_off(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = numbers(8, 4), numbers(6, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        product.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert product.linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(product, "FEWEST", 8 * 4 * 6 + 1)
    product.linear(x, weight)
    monkeypatch.setattr(product, "AVAILABLE", False)
    monkeypatch.setattr(product, "FEWEST", 0)
    product.linear(x, weight)
    assert calls == []


@pytest.mark.parametrize("tile", [16, 64, 1 << 20])
@pytest.mark.parametrize("rows", [5, 16, 37])
def test_the_fused_head_is_the_same(rows: int, tile: int, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks or more, the last of another size, in memory that is used again, tile by tile."""
    monkeypatch.setattr(product, "TILE", tile)
    hidden, weight = numbers(2 * rows - 1, 6), numbers(40, 6)
    targets = torch.arange(len(hidden)) % 40
    old, advantages = numbers(len(hidden), seed=2).mul(0.1) - 3.7, numbers(len(hidden), seed=3)
    found = []
    for dtype in (torch.float32, torch.float64):
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        a, b = old.to(dtype), advantages.to(dtype)
        logprobs, entropy = linear_logprob(h, w, targets, return_entropy=True)
        loss, _ = linear_ppo_loss(h, w, targets, a, b, entropy_coef=0.1)
        total = (logprobs * b).sum() + entropy.sum() + loss
        found.append([logprobs, entropy, loss, *torch.autograd.grad(total, (h, w))])
    assert calls
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)


def test_what_stands_elsewhere_is_copied() -> None:
    """A backend may give the gradient in memory of its own: the rows behind it are then nobody's."""
    hidden, weight, dz = numbers(10, 6), numbers(40, 6), numbers(12, 40)[:10]
    head = Head(weight, None, torch.float32)
    head.products(hidden)
    gradient = HeadGradient(head, hidden, [True, True, False])
    gradient.add(slice(0, 10), hidden, dz)
    torch.testing.assert_close(gradient.hidden, dz @ weight)
    torch.testing.assert_close(gradient.weight, dz.t() @ hidden)
