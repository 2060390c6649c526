"""Divergences on every backend against torch.distributions, finite differences, and logits built as a whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from twinhead.kernels import _C, full_kl, kl_estimate, linear_kl
from twinhead.kernels._estimators import KINDS, slope
from twinhead.kernels.kl import DIRECTIONS, reference

INF, NAN = float("inf"), float("nan")
FUSED = ["cpu", "triton"]


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


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("words", [1, 2, 31, 1000, 50257, 151936])
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_full_kl_against_the_distributions(rows: int, words: int, backend: str) -> None:
    limit = (1 if words > 10_000 else 4) if backend == "triton" else (7 if words > 10_000 else 1000)
    given = two_logits(min(rows, limit), words)
    for direction in DIRECTIONS:
        found, truth = full_kl(*given, direction=direction, temperature=0.7), exact(*given, direction, 0.7)
        assert_close(found, truth)
        row_slope = torch.randn_like(found)
        assert_close(torch.autograd.grad(found, given, row_slope), torch.autograd.grad(truth, given, row_slope))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str, backend: str) -> None:
    logits, ref_logits = two_logits(4, 5)
    fast = backend == "triton"
    assert torch.autograd.gradcheck(
        lambda x, y: full_kl(x.view(2, 2, 5), y.view(2, 2, 5), direction=direction, temperature=0.7),
        (logits, ref_logits),
        fast_mode=fast,
    )
    states = heads(4, 5)
    divergence = lambda *x: linear_kl(*x, direction=direction, temperature=0.7)  # noqa: E731
    assert torch.autograd.gradcheck(divergence, states, fast_mode=fast)


EXTREMES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "usual": lambda x, y: None,
    "shifted": lambda x, y: (x.add_(1e4), y.sub_(1e4)),
    "excluded": lambda x, y: (x[:, 1::2].fill_(-INF), y[:, 1::2].fill_(-INF)),
    "almost excluded": lambda x, y: (x[:, 1::2].fill_(-6e4), y[:, 1::2].fill_(-6e4)),
    "certain": lambda x, y: (x.mul_(50), y.mul_(50)),
    "late peaks": lambda x, y: (x[:, -5:].add_(60), y[:, :-5].add_(40)),
    "alike": lambda x, y: y.copy_(x),
}


def expect_errors_within_twice_those_of_torch(given: list[Tensor], backend: str) -> None:
    """Of the divergences and of both gradients, in both directions."""
    row_slope = torch.randn(len(given[0]), dtype=torch.float64)

    def results(run: Callable[..., Tensor], logits: list[Tensor], direction: str) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in logits]
        kl = run(*leaves, direction=direction, temperature=0.9)
        return kl, *torch.autograd.grad((kl * row_slope).sum(), leaves)

    # the interpreter cuts what it rounds to bfloat16
    cut = 2.0**-7 if given[0].dtype == torch.bfloat16 and backend == "triton" else 0.0
    for direction in DIRECTIONS:
        truth = results(reference.full_kl, [x.double() for x in given], direction)
        torchs, ours = results(reference.full_kl, given, direction), results(full_kl, given, direction)
        for true, plain, our in zip(truth, torchs, ours, strict=True):
            assert our.dtype == plain.dtype
            allowed = 2 * (plain.double() - true).abs().max() + 1e-6 * true.abs().clamp(min=1) + cut * true.abs()
            assert ((our.double() - true).abs() <= allowed).all()


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("backend", FUSED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_errors_stay_within_twice_those_of_torch(
    extreme: Callable[[Tensor, Tensor], object], dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    given = [(2 * torch.randn(3, 1300)).to(dtype) for _ in range(2)]
    given[1] += given[0]
    extreme(*given)
    expect_errors_within_twice_those_of_torch(given, backend)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("backend", FUSED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "words"), [(1000, 2), (1000, 31), (7, 1000), (7, 50257), (2, 151936)])
def test_errors_at_every_width(rows: int, words: int, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(words)
    rows, words = (min(rows, 3), min(words, 10_001)) if backend == "triton" else (rows, words)
    expect_errors_within_twice_those_of_torch([(2 * torch.randn(rows, words)).to(dtype) for _ in range(2)], backend)


@pytest.mark.parametrize("learning", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_side_may_be_frozen(direction: str, learning: tuple[bool, bool], backend: str) -> None:
    given = [x.detach().requires_grad_(learns) for x, learns in zip(two_logits(5, 31), learning, strict=True)]
    wanted = [x for x in given if x.requires_grad]
    found = torch.autograd.grad(full_kl(*given, direction=direction).sum(), wanted)
    assert_close(found, torch.autograd.grad(exact(*given, direction, 1.0).sum(), wanted))


def test_words_that_are_excluded(backend: str) -> None:
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


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_rows_without_a_slope_may_hold_anything(backend: str) -> None:
    logits, ref_logits = (x.detach().float() for x in two_logits(3, 6))
    logits[1], ref_logits[1, 2] = NAN, INF
    leaves = logits.requires_grad_(), ref_logits.requires_grad_()
    kl = full_kl(*leaves)
    assert kl.isnan().tolist() == [False, True, False]
    for gradient in torch.autograd.grad(kl[[0, 2]].sum(), leaves):
        assert (gradient[1] == 0).all() and gradient.isfinite().all()
        assert (gradient[[0, 2]] != 0).all()


def test_only_differences_matter_and_extremes_stay_finite(backend: str) -> None:
    logits, ref_logits = two_logits(7, 31)
    assert_close(full_kl(logits + 1e4, ref_logits - 1e4), full_kl(logits, ref_logits), rtol=0, atol=1e-9)
    certain = torch.tensor([[1e4, 0.0, 0.0]])
    assert_close(full_kl(certain, certain), torch.zeros(1))
    assert_close(full_kl(certain, certain.flip(-1)), torch.tensor([1e4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_do_not_matter(dtype: torch.dtype, backend: str) -> None:
    logits, ref_logits = (x.detach().to(dtype).view(2, 4, 50) for x in two_logits(8, 50))
    expected = full_kl(logits, ref_logits)
    assert expected.dtype == torch.float32
    columns = logits.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert torch.equal(full_kl(columns, ref_logits), expected)
    (gradient,) = torch.autograd.grad(full_kl(columns, ref_logits).sum(), columns)
    wide = torch.full((8, 57), NAN, dtype=dtype)
    inner = wide[:, 3:53].copy_(logits.view(8, 50)).requires_grad_()
    assert torch.equal(full_kl(inner, ref_logits.view(8, 50)).view(2, 4), expected)
    (inner_gradient,) = torch.autograd.grad(full_kl(inner, ref_logits.view(8, 50)).sum(), inner)
    assert torch.equal(inner_gradient.view(2, 4, 50), gradient)
    assert_close(full_kl(logits, ref_logits.double()).float(), expected, rtol=1e-4, atol=1e-5)
    assert_close(full_kl(logits[0, 0], ref_logits[0, 0]), expected[0, 0])
    one = ref_logits[:, :1].contiguous().requires_grad_()
    broadcast, repeated = (full_kl(logits, ref) for ref in (one.expand(2, 4, 50), one.repeat(1, 4, 1)))
    assert torch.equal(broadcast, repeated)
    assert_close(torch.autograd.grad(broadcast.sum(), one), torch.autograd.grad(repeated.mean() * 8, one))


def test_every_gradient_has_the_dtype_of_its_logits(backend: str) -> None:
    logits, ref_logits = two_logits(3, 31)
    leaves = logits.detach().bfloat16().requires_grad_(), ref_logits.detach().float().requires_grad_()
    truth = [x.detach().double().requires_grad_() for x in leaves]
    found = torch.autograd.grad(full_kl(*leaves).sum(), leaves)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    for our, true in zip(found, torch.autograd.grad(reference.full_kl(*truth).sum(), truth), strict=True):
        assert_close(our.double(), true, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("backend")
def test_autocast_and_inference_mode_change_nothing() -> None:
    states = [x.detach().float().requires_grad_() for x in heads(5, 31)]
    logits = [states[0] @ states[1].t(), states[2] @ states[3].t()]
    expected = linear_kl(*states), full_kl(*logits)
    gradients = torch.autograd.grad(expected[0].sum(), states)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_kl(*states), full_kl(*logits)
        assert_close(torch.autograd.grad(found[0].sum(), states), gradients)
    assert_close(found, expected)
    with torch.inference_mode():
        assert_close((linear_kl(*states), full_kl(*logits)), tuple(x.detach() for x in expected))


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_the_operators_are_well_formed(backend: str) -> None:
    logits, ref_logits = (x.detach().float().requires_grad_() for x in two_logits(3, 5))
    torch.library.opcheck(getattr(torch.ops.twinhead, f"full_kl_{backend}"), (logits, ref_logits, 0.7))
    states = [x.detach().float().requires_grad_() for x in heads(3, 5)]
    epilogue = f"twinhead.kernels.kl.{'cpu' if backend == 'cpu' else 'gpu'}"
    torch.library.opcheck(torch.ops.twinhead.linear_kl, (*states, 0.7, epilogue))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_compiled_as_one_graph(backend: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        kl = linear_kl(hidden, weight, ref_hidden, ref_weight, temperature=0.7)
        return kl.sum() + full_kl(hidden @ weight.t(), ref_hidden @ ref_weight.t(), direction="forward").sum()

    states = heads(6, 9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*states), loss(*states))
    found, expected = (torch.autograd.grad(run(*states), states) for run in (compiled, loss))
    assert_close(found, expected)


def test_the_number_of_threads_does_not_matter() -> None:
    logits, ref_logits = (x.detach().float() for x in two_logits(50, 1000))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaves = logits.clone().requires_grad_(), ref_logits.clone().requires_grad_()
        kl = full_kl(*leaves, backend="cpu")
        found.append((kl, *torch.autograd.grad(kl.sum(), leaves)))
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def heads(rows: int, words: int) -> tuple[Tensor, ...]:
    """hidden, weight, ref_hidden, ref_weight; the two models have different widths."""
    torch.manual_seed(rows + words)
    shapes = ((rows, 3), (words, 3), (rows, 4), (words, 4))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "words"), [(0, 31), (1, 2), (7, 1000), (1100, 31), (2, 50257)])
def test_linear_kl_equals_the_whole(rows: int, words: int, direction: str, backend: str) -> None:
    rows = min(rows, 10) if backend == "triton" else rows
    states = heads(rows, words)
    row_slope = torch.randn(rows)
    ours, plain = (f(*states, direction=direction, temperature=0.7) for f in (linear_kl, reference.linear_kl))
    assert_close(ours, plain)
    gradients = torch.autograd.grad((ours * row_slope).sum(), states)
    assert_close(gradients, torch.autograd.grad((plain * row_slope).sum(), states))
    nested = (states[0].view(1, rows, 3), states[1], states[2].view(1, rows, 4), states[3])
    assert torch.equal(linear_kl(*nested, direction=direction, temperature=0.7), ours.view(1, rows))


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("learning", list(product((True, False), repeat=4))[:-1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_frozen_gets_no_gradient_and_no_logits_exist(
    learning: tuple[bool, ...], direction: str, watch: Any, backend: str
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


def test_half_precision_heads_are_multiplied_in_float32(backend: str) -> None:
    states = [x.detach().bfloat16().requires_grad_() for x in heads(10 if backend == "triton" else 100, 31)]
    exactly = [x.detach().double().requires_grad_() for x in states]
    ours, truth = linear_kl(*states), reference.linear_kl(*exactly)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(ours.sum(), states)
    for our, true in zip(gradients, torch.autograd.grad(truth.sum(), exactly), strict=True):
        assert our.dtype == torch.bfloat16
        assert_close(our.double(), true, rtol=1e-2, atol=1e-3)


def test_results_belong_to_the_caller(backend: str) -> None:
    states = heads(4, 5)
    for run, given in ((linear_kl, states), (full_kl, (states[0].t(), states[1][:4].t()))):
        kl = run(*given)
        expected = torch.autograd.grad(2 * kl.sum(), given, retain_graph=True)
        if backend == "torch" and run is full_kl:
            continue  # plain autograd saves what it needs
        kl *= 2
        assert_close(torch.autograd.grad(kl.sum(), given), expected)


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_a_second_derivative_is_refused(backend: str) -> None:
    for run, given in ((linear_kl, heads(4, 5)), (full_kl, two_logits(4, 5))):
        with pytest.raises(
            RuntimeError, match=f"{run.__name__} can be differentiated once: expected create_graph=False"
        ):
            torch.autograd.grad(run(*given).sum(), given[0], create_graph=True)


def test_the_extension_checks_what_it_is_given() -> None:
    def call(run: str = "kl", **changes: Any) -> None:
        arrays: dict[str, Any] = {"p": np.zeros((3, 4)), "q": np.zeros((3, 4)), "moments": np.zeros((3, 5))}
        last = {"kl": ("kl",), "kl_gradient": ("slopes", "dp", "dq")}[run]
        arrays |= {name: np.zeros((3, 4) if name in ("dp", "dq") else 3) for name in last}
        getattr(_C, run)(**{**arrays, "temperature": 1.0, "threads": 1, **changes})

    for run in ("kl", "kl_gradient"):
        call(run)
        for name, wrong in (("q", (3, 5)), ("q", (2, 4)), ("p", (3, 0)), ("moments", (3, 4))):
            with pytest.raises(ValueError, match="kl: expected"):
                call(run, **{name: np.zeros(wrong)})
        with pytest.raises(ValueError, match="the words of a row side by side, got gaps"):
            call(run, p=np.zeros((3, 8))[:, ::2])
        with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
            call(run, threads=0)
        with pytest.raises(ValueError, match="expected temperature > 0"):
            call(run, temperature=0.0)
        with pytest.raises(TypeError):
            call(run, q=np.zeros((3, 4), dtype=np.float32))
    for name, wrong in (("slopes", 2), ("dp", (3, 5)), ("dq", (1, 4))):
        with pytest.raises(ValueError, match="kl: expected"):
            call("kl_gradient", **{name: np.zeros(wrong)})
    with pytest.raises(ValueError, match="expected kl of length 3, got 4"):
        call(kl=np.zeros(4))


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
