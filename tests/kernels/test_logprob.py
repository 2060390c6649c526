"""Log-probs and entropy from logits on every backend, against formulas written with other means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.testing import assert_close

from twinhead.kernels import _C, entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

INF = float("inf")
FUSED = ["cpu", "triton"]

pytestmark = pytest.mark.usefixtures("backend")


def plainly(logits: Tensor, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What one would write in torch."""
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-250)).sum(-1)
    return logp.gather(-1, index[:, None]).squeeze(-1), entropy


def logits_and_index(rows: int, words: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows * words)
    return 3 * torch.randn(rows, words, dtype=dtype), torch.randint(words, (rows,))


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("words", [2, 31, 1000, 50257, 151936])
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_against_the_categorical_distribution(rows: int, words: int, backend: str) -> None:
    limit = (2 if words > 10_000 else 20) if backend == "triton" else (10 if words > 10_000 else 1000)
    logits, index = logits_and_index(min(rows, limit), words)
    expected = Categorical(logits=logits / 0.7, validate_args=False)
    logprobs, entropy = selective_log_softmax_and_entropy(logits, index, temperature=0.7)
    assert_close(logprobs, expected.log_prob(index))
    assert_close(entropy, expected.entropy())
    assert_close(selective_log_softmax(logits, index, 0.7), logprobs)
    assert_close(entropy_from_logits(logits / 0.7, chunk_size=3), entropy)


def test_more_words_per_row_and_more_dimensions() -> None:
    logits, _ = logits_and_index(24, 11)
    index = torch.randint(11, (2, 3, 4, 5))
    logprobs, entropy = selective_log_softmax_and_entropy(logits.view(2, 3, 4, 11), index)
    assert_close(logprobs, logits.view(2, 3, 4, 11).log_softmax(-1).gather(-1, index))
    assert_close(entropy, Categorical(logits=logits.view(2, 3, 4, 11)).entropy())
    assert_close(selective_log_softmax(logits.view(2, 3, 4, 11), index[..., 0]), logprobs[..., 0])
    assert_close(entropy_from_logits(logits.view(2, 3, 4, 11), 5), entropy)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool, backend: str) -> None:
    logits, index = logits_and_index(4, 5)
    row_mask = torch.tensor([True, False, True, True]) if masked else None
    logits.requires_grad_()
    gradcheck = partial(torch.autograd.gradcheck, fast_mode=backend == "triton")
    assert gradcheck(lambda x: selective_log_softmax(x, index, 0.7, row_mask), logits)
    assert gradcheck(lambda x: selective_log_softmax_and_entropy(x, index, temperature=0.7, row_mask=row_mask), logits)
    assert gradcheck(lambda x: entropy_from_logits(x, 3), logits)


def test_the_entropy_can_be_a_measurement() -> None:
    logits, index = logits_and_index(4, 5)
    logprobs, entropy = selective_log_softmax_and_entropy(logits.requires_grad_(), index, entropy_requires_grad=False)
    assert logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.usefixtures("nan_empty")
def test_masked_rows_give_nothing_and_take_nothing() -> None:
    logits, index = logits_and_index(7, 31)
    row_mask = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()
    poisoned = logits.masked_fill(~row_mask[:, None], float("nan")).requires_grad_()
    index = index.masked_fill(~row_mask, -100)
    logprobs, entropy = selective_log_softmax_and_entropy(poisoned, index, row_mask=row_mask)
    (logprobs.sum() + entropy.sum()).backward()
    kept = selective_log_softmax_and_entropy(logits[row_mask], index[row_mask])
    assert_close(logprobs[row_mask], kept[0])
    assert_close(entropy[row_mask], kept[1])
    for result in (logprobs, entropy, poisoned.grad):
        assert (result[~row_mask] == 0).all() and result.isfinite().all()
    nothing = selective_log_softmax(logits, index, 1.0, torch.zeros(7, dtype=torch.bool))
    assert (nothing == 0).all()


def test_words_that_are_excluded() -> None:
    logits, index = logits_and_index(6, 9)
    logits[:, 4:] = -INF
    logits[0, 1:] = -INF
    index = torch.tensor([0, 3, 2, 1, 0, 8])
    logits.requires_grad_()
    logprobs, entropy = selective_log_softmax_and_entropy(logits, index)
    (logprobs[:-1].sum() + 100 * entropy.sum()).backward()
    assert logprobs[0] == 0 and entropy[0] == 0 and logprobs[-1] == -INF
    assert_close(entropy, Categorical(logits=logits.detach()[:, :4]).entropy())
    assert logits.grad.isfinite().all() and (logits.grad[:, 4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_differences_matter(dtype: torch.dtype) -> None:
    logits, index = logits_and_index(20, 31, dtype)
    logits = (logits * 64).round() / 64  # so that adding 1e4 rounds nothing
    shifted = selective_log_softmax_and_entropy(logits + 1e4, index)
    assert_close(shifted, selective_log_softmax_and_entropy(logits, index))
    extreme = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    logprobs, entropy = selective_log_softmax_and_entropy(extreme, torch.tensor([[0, 1, 2]]))
    assert_close(logprobs, torch.tensor([[0.0, -2e4, -1e4]], dtype=dtype))
    assert entropy == 0


def test_strided_logits_and_small_integers() -> None:
    logits, index = logits_and_index(8, 31)
    wide = torch.randn(8, 62, dtype=torch.float64)
    wide[:, ::2] = logits
    assert_close(selective_log_softmax(wide[:, ::2], index.int()), selective_log_softmax(logits, index))
    transposed = logits.t().contiguous().t()
    assert_close(entropy_from_logits(transposed), entropy_from_logits(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("words", [31, 2100])
@pytest.mark.parametrize("outputs", ["logprobs", "entropy", "both"])
def test_the_error_is_at_most_twice_torchs(outputs: str, words: int, dtype: torch.dtype) -> None:
    logits, index = logits_and_index(7, words, dtype)
    logits[0, 1:] -= 100
    logits[1] += 1e4 if dtype == torch.float32 else 64
    logits[2, : words // 2] = -INF
    logits[3, : words // 2] = torch.finfo(dtype).min / 2
    logits[4] = torch.finfo(dtype).min / 2
    logits[:4, -1] = 1  # never excluded
    index[:4] = words - 1
    slopes = [torch.randn(7) * (outputs != "entropy"), torch.randn(7) * (outputs != "logprobs")]

    def with_gradient(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        given = logits.to(dtype, copy=True).requires_grad_()
        found = function(given, index, temperature=0.7)
        total = sum((slope.to(x.dtype) * x).sum() for slope, x in zip(slopes, found, strict=True))
        return [x.detach().double() for x in (*found, *torch.autograd.grad(total, given))]

    exact, torchs = with_gradient(plainly, torch.float64), with_gradient(plainly, dtype)
    for our, their, true in zip(with_gradient(selective_log_softmax_and_entropy, dtype), torchs, exact, strict=True):
        assert (our - true).abs().max() <= 2 * (their - true).abs().max() + 1e-6


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu_is_torchs_own(dtype: torch.dtype) -> None:
    logits, index = logits_and_index(100, 257, dtype)
    logp = logits.log_softmax(-1)
    logprobs, entropy = selective_log_softmax_and_entropy(logits, index)
    assert torch.equal(logprobs, logp.gather(-1, index[:, None]).squeeze(-1))
    assert torch.equal(selective_log_softmax(logits, index), logprobs)
    assert torch.equal(entropy, -(logp.exp() * logp).sum(-1))
    assert torch.equal(entropy_from_logits(logits), entropy)
    assert torch.equal(
        selective_log_softmax(logits, index, 0.7),
        (logits / 0.7).log_softmax(-1).gather(-1, index[:, None]).squeeze(-1),
    )


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_begin_anywhere(dtype: torch.dtype) -> None:
    """Rows of 37 words begin at every distance from a 16-byte boundary; so do slices of them."""
    torch.manual_seed(0)
    whole, index = torch.randn(2, 5, 37).to(dtype), torch.randint(30, (2, 5, 1))
    for cut in (
        lambda x: x,
        lambda x: x[:, :-1],
        lambda x: x[:, 3:],
        lambda x: x[1:, 1:, 4:],
        lambda x: x[:1].expand(2, -1, -1),
        lambda x: x.transpose(0, 1),
        lambda x: x[..., :36].unflatten(-1, (2, 18)).transpose(1, 2)[:, ::2],
        lambda x: x[..., ::2],
    ):
        view, at = cut(whole).detach().requires_grad_(), cut(whole).argmax(-1, keepdim=True)
        copy = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        results = [selective_log_softmax_and_entropy(x, at) for x in (view, copy)]
        assert_close(*results, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(p.sum() + h.sum(), x) for (p, h), x in zip(results, (view, copy), strict=True)]
        assert_close(*gradients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert_close(selective_log_softmax(whole, index)[1, 2], selective_log_softmax(whole[1, 2], index[1, 2]))


def test_many_words_per_row_some_of_them_twice() -> None:
    logits, _ = logits_and_index(3, 50)
    index = torch.cat([torch.arange(50), torch.arange(0, 50, 3)]).expand(3, -1)
    logits.requires_grad_()
    slopes = torch.randn(index.shape, dtype=torch.float64)
    found, expected = selective_log_softmax(logits, index), logits.log_softmax(-1).gather(-1, index)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad((slopes * x).sum(), logits) for x in (found, expected)))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_rows_beyond_two_to_the_31_words(backend: str) -> None:
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # nobody touches most of it
    far = memory.as_strided((3, 40), (2**30 + 8, 1))
    near = torch.randn(3, 40).bfloat16()
    far.copy_(near)
    index = torch.tensor([3, 39, 0])
    assert torch.equal(selective_log_softmax(far, index), selective_log_softmax(near, index))
    found = [torch.autograd.grad(entropy_from_logits(x.requires_grad_()).sum(), x)[0] for x in (far, near)]
    assert torch.equal(*found)


@pytest.mark.parametrize("words", [1000, 50257, 151936])
def test_logits_that_rise_along_the_row(words: int, backend: str) -> None:
    """However far a later word stands above what was seen before, and however many do so one after the other."""
    logits, index = logits_and_index(1 if backend == "triton" else 3, words, torch.float32)
    logits += torch.linspace(-1000, 1000, words)
    exact = plainly(logits.double(), index)
    found = selective_log_softmax_and_entropy(logits, index)
    for ours, theirs, truth in zip(found, plainly(logits, index), exact, strict=True):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6


def test_a_row_without_a_possible_word_is_nan() -> None:
    logits, index = logits_and_index(4, 600)
    logits[1] = -INF
    logits[2, 599] = float("nan")
    logits[3, :599], logits[3, 599], index[3] = -INF, 7, 599
    for result in selective_log_softmax_and_entropy(logits, index):
        assert result.isnan().tolist() == [False, True, True, False] and result[3] == 0


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_a_second_derivative_is_refused() -> None:
    logits, index = logits_and_index(4, 5)
    logprobs = selective_log_softmax(logits.requires_grad_(), index)
    with pytest.raises(RuntimeError, match="a log-probability or entropy of logits can be differentiated once"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)


@pytest.mark.parametrize("backend", FUSED, indirect=True)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_torch_knows_the_operators(with_entropy: bool, masked: bool, backend: str) -> None:
    logits, index = torch.randn(3, 4, 7), torch.randint(7, (3, 4, 2))
    selective_log_softmax(logits, index)  # loads the backend
    row_mask = torch.rand(3, 4) < 0.5 if masked else None
    forward, backward = (getattr(torch.ops.twinhead, f"logprob_{backend}{end}").default for end in ("", "_backward"))
    given = (index, 0.7, row_mask)
    torch.library.opcheck(forward, (logits.clone().requires_grad_(), *given, with_entropy))
    logprobs, entropy, lse = forward(logits, *given, with_entropy)
    torch.library.opcheck(backward, (logits, *given, lse, entropy, logprobs, entropy if with_entropy else None))


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_they_compile_as_a_whole(backend: str) -> None:
    logits, index = logits_and_index(6, 31)
    # which rows torch would pick depends on the values of the mask, and that cannot be compiled
    row_mask = torch.rand(6) < 0.7 if backend == "cpu" else None

    def call(logits: Tensor) -> tuple[Tensor, ...]:
        found = selective_log_softmax_and_entropy(2 * logits, index, True, 0.7, row_mask)
        return *found, selective_log_softmax(logits, index), entropy_from_logits(logits)

    logits.requires_grad_()
    compiled, eager = torch.compile(call, fullgraph=True)(logits), call(logits)
    assert_close(compiled, eager)
    assert_close(*(torch.autograd.grad(sum(x.sum() for x in found), logits) for found in (compiled, eager)))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_the_number_of_threads_does_not_matter() -> None:
    logits, index = logits_and_index(50, 1001, torch.float32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        logprobs, entropy = selective_log_softmax_and_entropy(logits.requires_grad_(), index)
        found.append((logprobs, entropy, *torch.autograd.grad((logprobs * entropy).sum(), logits)))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_an_index_outside_of_the_words_is_refused() -> None:
    for wrong in (-1, 5):
        index = torch.tensor([0, wrong, 4])
        with pytest.raises(ValueError, match=rf"expected index in \[0, 5\), got {wrong}"):
            selective_log_softmax(torch.zeros(3, 5), index)
        row_mask = torch.tensor([True, False, True])
        assert selective_log_softmax(torch.zeros(3, 5), index, 1.0, row_mask)[1] == 0


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_the_extension_checks_what_it_is_given() -> None:
    settings = {"temperature": 1.0, "threads": 1}
    shared = {"logits": np.zeros((3, 5)), "index": np.zeros((3, 2), np.int64), "row_mask": np.ones(3, bool)}
    found = {"lse": np.zeros((3, 2)), "entropy": np.zeros(3)}
    forward = shared | found | {"logprobs": np.zeros((3, 2))}
    backward = shared | found | {"dlogprobs": np.zeros((3, 2)), "dentropy": np.zeros(3), "dlogits": np.zeros((3, 5))}
    for function, arrays in ((_C.logprob, forward), (_C.logprob_gradient, backward)):

        def call(function: Any = function, arrays: dict[str, Any] = arrays, **changes: Any) -> None:
            function(**{**arrays, **settings, **changes})

        call()
        for name in arrays.keys() - {"logits", "index"}:
            with pytest.raises(ValueError, match=f"expected {name} of length"):
                call(**{name: arrays[name][:2]})
        for changes, sentence in [
            ({"index": np.zeros((2, 2), np.int64)}, "index of length 6, got 4"),
            ({"index": np.array(0)}, r"index \(..., K\)"),
            ({"logits": np.array(0.0)}, r"logits \(..., V\)"),
            ({"logits": np.zeros((3, 10))[:, ::2]}, "the words of a row side by side"),
            ({"logits": np.zeros((3, 0))}, "at least one word"),
            ({"temperature": 0.0}, "temperature > 0"),
            ({"threads": 0}, "threads >= 1, got 0"),
        ]:
            with pytest.raises(ValueError, match=f"expected {sentence}"):
                call(**changes)
        with pytest.raises(TypeError):
            call(lse=np.zeros((3, 2), np.float32))


LOGITS, INDEX = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        (r"index of shape \(4,\) or \(4,\) \+ \(K,\), got \(3,\)", lambda: selective_log_softmax(LOGITS, INDEX[:3])),
        ("index of dtype int64, got torch.float64", lambda: selective_log_softmax(LOGITS, INDEX.double())),
        (r"row_mask of shape \(4,\), got \(4, 5\)", lambda: selective_log_softmax(LOGITS, INDEX, 1.0, LOGITS)),
        ("temperature > 0, got 0.0", lambda: selective_log_softmax_and_entropy(LOGITS, INDEX, True, 0.0)),
        ("chunk_size >= 1, got 0", lambda: entropy_from_logits(LOGITS, 0)),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
