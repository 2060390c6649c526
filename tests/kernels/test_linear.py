"""The fused head against logits built as a whole, on every backend: values, gradients, memory, and work."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import _C, linear_cross_entropy, linear_logprob, linear_ppo_loss
from twinhead.kernels._head import Head
from twinhead.kernels.linear import _BACKENDS, chunked, reference
from twinhead.kernels.linear.chunked import Measures
from twinhead.kernels.linear.objective import Objective

pytestmark = pytest.mark.usefixtures("backend")

SIZES = [(0, 31), (1, 2), (7, 1000), (1100, 31), (2, 50257)]  # rows, words
FEW = 20  # rows for the Triton interpreter, which takes a millisecond for each
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
def test_blocks_equal_the_whole(rows: int, words: int, settings: dict[str, float], backend: str) -> None:
    rows = min(rows, FEW) if backend == "triton" else rows
    hidden, weight, bias, targets = head(rows, words)
    targets[::3] = -100
    for given, *slopes in product((bias, None), (None, torch.randn(rows)), (None, torch.randn(rows))):
        if slopes != [None, None]:
            inputs = (hidden, weight, given, targets)
            ours = logprob_and_gradients(linear_logprob, inputs, tuple(slopes), **settings)
            assert_close(ours, logprob_and_gradients(reference.linear_logprob, inputs, tuple(slopes), **settings))


@pytest.mark.usefixtures("nan_empty")
def test_a_large_vocabulary() -> None:
    inputs, slopes = head(2, 151936), (torch.randn(2), torch.randn(2))
    ours = logprob_and_gradients(linear_logprob, inputs, slopes, **SETTINGS["everything"])
    assert_close(ours, logprob_and_gradients(reference.linear_logprob, inputs, slopes, **SETTINGS["everything"]))


def test_the_reference_is_what_it_says() -> None:
    hidden, weight, bias, targets = head(7, 31)
    z = 3 * ((0.5 * (hidden @ weight.t() + bias)) / 3).tanh() / 0.7
    p = z.exp() / z.exp().sum(1, keepdim=True)
    logprobs, entropy = reference.linear_logprob(
        hidden, weight, targets, bias, temperature=0.7, softcap=3.0, logit_scale=0.5, return_entropy=True
    )
    assert_close(logprobs, p[torch.arange(7), targets].log())
    assert_close(entropy, (p * -p.log()).sum(1))


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_gradcheck(backend: str) -> None:
    hidden, weight, bias, targets = head(6, 9)
    targets[2] = -100
    assert torch.autograd.gradcheck(
        lambda *x: linear_logprob(x[0], x[1], targets, x[2], return_entropy=True, **SETTINGS["everything"]),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("learning", list(product((True, False), repeat=3))[:-1])
def test_what_is_frozen_gets_no_gradient(learning: tuple[bool, ...], watch: Any, backend: str) -> None:
    rows, words, width = FEW if backend == "triton" else 600, 31, 5
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
def test_the_logits_never_exist_and_the_work_is_counted(rows: int, watch: Any, backend: str) -> None:
    rows, words, width = min(rows, FEW) if backend == "triton" else rows, 4096, 1
    hidden, weight, _, targets = head(rows, words, width, torch.float32)
    constants = (torch.zeros(rows), torch.randn(rows))
    one_product, whole_logits = rows * words * width, rows * words

    def products(run: Callable[[], Any]) -> int:
        watch.largest = watch.multiplications = 0
        with watch:
            run()
        if backend != "triton":  # its interpreter looks at memory as bytes
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
def test_the_error_is_at_most_twice_torchs(dtype: torch.dtype, backend: str) -> None:
    rows = FEW if backend == "triton" else 300
    hidden, weight, bias, targets = head(rows, 1000, 64, dtype)
    slopes = (torch.randn(rows), torch.randn(rows))

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
    hidden, weight, bias, targets = head(FEW, 100, 64, torch.float32)
    expected = linear_logprob(hidden, weight, targets, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, weight, targets, bias), expected)
        assert linear_logprob(hidden.bfloat16(), weight, targets, bias).dtype == torch.float32


def test_autocast_does_not_round_the_gradients() -> None:
    hidden, weight, _, targets = head(FEW, 100, 64, torch.float32)
    inputs = (hidden.detach().bfloat16().requires_grad_(), weight)

    def gradients(autocast: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, _ = linear_ppo_loss(*inputs, targets, torch.zeros(FEW) - 4, torch.ones(FEW))
        return torch.autograd.grad(loss, inputs)

    assert all(torch.equal(*pair) for pair in zip(gradients(True), gradients(False), strict=True))


def test_rows_are_independent(backend: str) -> None:
    rows = FEW if backend == "triton" else 1000
    hidden, weight, bias, targets = head(rows, 31, dtype=torch.float32)
    whole = linear_logprob(hidden, weight, targets, bias, return_entropy=True)
    part = slice(rows // 3, rows // 3 + 5)
    alone = linear_logprob(hidden[part], weight, targets[part], bias, return_entropy=True)
    assert_close(alone, tuple(x[part] for x in whole), rtol=1e-6, atol=1e-6)


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
    "softcap": {"softcap": 2.0, "logit_scale": 1.5, "temperature": 0.8},
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
def test_one_pass_equals_autograd(rows: int, words: int, settings: dict[str, Any], backend: str) -> None:
    rows = min(rows, FEW) if backend == "triton" else rows
    inputs = hidden, weight, bias, targets = head(rows, words)
    old_logprobs, advantages, ref_logprobs = tokens(rows, inputs)
    loss, stats, logprobs = linear_ppo_loss(
        hidden, weight, targets, old_logprobs, advantages, ref_logprobs=ref_logprobs, bias=bias, return_logprobs=True,
        **settings,
    )  # fmt: skip
    defaults = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "kl_coef": 0.0, "kl_estimator": "k3"}
    defaults |= {"entropy_coef": 0.0, "normalizer": None}
    shape = {name: settings[name] for name in ("softcap", "logit_scale", "temperature") if name in settings}
    chosen = {name: value for name, value in (defaults | settings).items() if name not in shape}
    objective = Objective(old_logprobs, advantages, ref_logprobs, **chosen)
    expected, expected_stats = reference.linear_ppo_loss(hidden, weight, targets, bias, objective, **shape)
    assert_close(loss, expected)
    assert_close(stats, expected_stats)
    assert_close(logprobs, reference.linear_logprob(hidden, weight, targets, bias, **shape)[0].detach())
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


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_gives_the_logprobs_of_linear_logprob(
    settings: dict[str, float], learning: bool, backend: str
) -> None:
    rows = FEW if backend == "triton" else 600
    hidden, weight, bias, targets = head(rows, 31, dtype=torch.float32)
    given, settings = (hidden.view(2, -1, 5), weight, targets.view(2, -1)), settings | {"bias": bias}
    constants = torch.zeros(2, rows // 2), torch.ones(2, rows // 2)
    with torch.set_grad_enabled(learning):
        expected = linear_logprob(*given, **settings)
        loss, _, logprobs = linear_ppo_loss(*given, *constants, return_logprobs=True, **settings)
    assert torch.equal(logprobs, expected)
    assert loss.requires_grad == learning and not logprobs.requires_grad
    logprobs.zero_()  # they belong to the caller
    if learning:
        again, _ = linear_ppo_loss(*given, *constants, **settings)
        assert_close(*(torch.autograd.grad(x, (hidden, weight, bias)) for x in (loss, again)), rtol=0, atol=0)


def test_half_precision_gives_a_float32_loss_and_gradients_of_its_own(backend: str) -> None:
    rows = FEW if backend == "triton" else 300
    inputs = hidden, weight, bias, targets = head(rows, 100, 32, torch.bfloat16)
    old_logprobs, advantages, ref_logprobs = tokens(rows, inputs)
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


def test_the_loss_can_be_backpropagated_twice_and_splits_into_micro_batches(backend: str) -> None:
    whole = FEW if backend == "triton" else 700
    inputs = hidden, weight, _, targets = head(whole, 31)
    old_logprobs, advantages, _ = tokens(whole, inputs)
    loss, _ = linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])
    parts = torch.zeros_like(first)
    for rows in (slice(0, whole // 6), slice(whole // 6, whole)):
        part, _ = linear_ppo_loss(
            hidden[rows], weight, targets[rows], old_logprobs[rows], advantages[rows], normalizer=whole
        )
        parts += torch.autograd.grad(part, weight)[0]
    assert_close(parts, first)


def test_what_cannot_learn_gives_zeros() -> None:
    hidden, weight, _, targets = head(12, 31)
    logprobs = linear_logprob(hidden, weight, targets).detach()
    advantages = torch.ones(12, dtype=torch.float64)
    advantages[::3] = 0
    old_logprobs = logprobs.clone()
    old_logprobs[1::3] -= 1  # the ratio is e, and clipped
    loss, _ = linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages)
    silent = (torch.autograd.grad(loss, hidden)[0] == 0).all(1)
    assert silent.tolist() == [True, True, False] * 4
    loss, _ = linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages, entropy_coef=0.1)
    assert (torch.autograd.grad(loss, hidden)[0] != 0).all()


def test_large_logits_keep_their_digits() -> None:
    torch.manual_seed(0)
    hidden, targets, slopes = torch.eye(8), torch.arange(8), (torch.randn(8), torch.randn(8))
    logits = (torch.randn(1000, 8) * 64).round() / 64 + 1e4  # float32 holds them; the products are these
    learned = logits.clone().requires_grad_()
    _, _, ours = logprob_and_gradients(linear_logprob, (hidden, learned, None, targets), slopes)
    exact = logits.double().requires_grad_()
    *_, truth = logprob_and_gradients(reference.linear_logprob, (hidden.double(), exact, None, targets), slopes)
    assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


def test_operators(backend: str) -> None:
    hidden, weight, bias, targets = head(6, 9)
    epilogue = _BACKENDS.pick("test", hidden.device, backend).__name__
    a, b, c, d, e = torch.rand(5, 6, dtype=torch.float64)
    settings = (0.7, 3.0, 1.0, epilogue)
    for given in (bias, None):
        torch.library.opcheck(chunked._linear_logprob, (hidden, weight, given, targets, *settings))
        needs = [True, False, given is not None]
        plain = (hidden.detach(), weight.detach(), None if given is None else given.detach(), targets)
        torch.library.opcheck(chunked._linear_logprob_backward, (*plain, a, b, c, d, e, *settings, needs))
        objective = (a, b, c, 0.2, 0.2, None, 0.1, "k3", 0.1, torch.tensor(6.0).double(), *settings[:3])
        torch.library.opcheck(
            chunked._linear_ppo_loss, (hidden, weight, given, targets, *objective, epilogue, [True, True, needs[2]])
        )


def test_one_graph_holds_the_head() -> None:
    inputs = hidden, weight, bias, targets = head(12, 31)
    old_logprobs, advantages, _ = tokens(12, inputs)

    def loss_and_gradients(compiler: Callable[[Callable], Callable]) -> list[Tensor]:
        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            logprobs, entropy = linear_logprob(hidden, weight, targets, bias, return_entropy=True, temperature=0.7)
            ppo, stats = linear_ppo_loss(hidden, weight, targets, old_logprobs, advantages, bias=bias)
            return (logprobs + 0.1 * entropy).sum() + ppo + stats["ratio_mean"]

        total = compiler(loss)(hidden, weight, bias)
        return [total, *torch.autograd.grad(total, (hidden, weight, bias))]

    compiled = loss_and_gradients(lambda loss: torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert_close(compiled, loss_and_gradients(lambda loss: loss))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_gpu_moves_whole_groups_and_multiplies_in_half_precision(backend: str) -> None:
    """Products with a gap behind every row, and a matrix in bfloat16, which on the CPU would be widened."""
    eager, gpu = (importlib.import_module(f"twinhead.kernels.linear.{name}") for name in ("eager", "gpu"))
    hidden, weight, _, targets = head(6, 4099, dtype=torch.float32)
    products, targets[1], per_row = (hidden @ weight.t()).detach(), -1, torch.randn(2, 6)
    objective = Objective(-8 + per_row[0], per_row[1], None, 0.2, 0.2, None, 0.0, "k1", 0.1, None)

    def everything(epilogue: Any, products: Tensor, dtype: torch.dtype) -> list[Tensor]:
        known = Head(weight, None, torch.float32, softcap=3.0)
        known.weight = weight.to(dtype)
        logprobs, *measures = torch.empty(4, 6)
        epilogue.measure(products.clone(), known, targets, logprobs, Measures(*measures))
        dz = epilogue.gradient(products.clone(), known, targets, Measures(*measures), *per_row)
        rows = (targets.clamp(min=0), logprobs, Measures(*measures))
        learned = epilogue.learn(products.clone(), known, *rows, objective)
        assert dz.dtype == learned.dtype == dtype
        return [logprobs.clone(), dz.float(), learned.float()]

    apart = torch.full((6, 4112), math.nan)[:, :4099]
    for dtype, digits in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        ours = everything(gpu, apart.copy_(products), dtype)
        assert_close(ours, everything(eager, products, torch.float32), rtol=digits, atol=1e-8)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_threads_change_nothing(backend: str) -> None:
    hidden, weight, bias, targets = head(600, 100, dtype=torch.float32)
    cpu = importlib.import_module("twinhead.kernels.linear.cpu")
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        products, measures = (hidden @ weight.t()).detach(), torch.empty(4, 600)
        known = Head(weight, bias, torch.float32, softcap=3.0)
        cpu.measure(products, known, targets, measures[0], Measures(*measures[1:]))
        dz = cpu.gradient(products, known, targets, Measures(*measures[1:]), measures[0], measures[1])
        found.append((measures, dz))
    torch.set_num_threads(1)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize(
    ("sentence", "change"),
    [
        ("products (n, V), got 1 dimensions", {"products": np.zeros(15)}),
        ("targets of length 3, got 2", {"targets": np.zeros(2, np.int64)}),
        ("targets below 5, got 5", {"targets": np.array([0, 5, 0])}),
        ("bias of length 5, got 3", {"bias": np.zeros(3)}),
        ("logprobs of length 3, got 4", {"logprobs": np.zeros(4)}),
        ("log_sum of length 3, got 2", {"log_sum": np.zeros(2)}),
        ("threads >= 1, got 0", {"threads": 0}),
    ],
)
def test_the_extension_refuses(sentence: str, change: dict[str, Any], backend: str) -> None:
    arrays = {name: np.zeros(3) for name in ("logprobs", "entropy", "peak", "log_sum")}
    settings = {"bias": None, "scale": 1.0, "softcap": math.inf, "temperature": 1.0, "threads": 1}
    block = {"products": np.zeros((3, 5)), "targets": np.zeros(3, np.int64)}
    _C.linear_measure(**block, **settings, **arrays)
    with pytest.raises(ValueError, match=f"linear: expected {re.escape(sentence)}"):
        _C.linear_measure(**(block | settings | arrays | change))


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
