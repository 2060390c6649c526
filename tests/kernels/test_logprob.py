"""Log-probs and entropy from logits, against formulas written with other means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.testing import assert_close

from twinhead.kernels import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

INF = float("inf")


def logits_and_index(rows: int, words: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows * words)
    return 3 * torch.randn(rows, words, dtype=dtype), torch.randint(words, (rows,))


@pytest.mark.parametrize("words", [2, 31, 1000, 50257])
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_against_the_categorical_distribution(rows: int, words: int) -> None:
    logits, index = logits_and_index(min(rows, 10) if words > 10_000 else rows, words)
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
def test_gradients(masked: bool) -> None:
    logits, index = logits_and_index(4, 5)
    row_mask = torch.tensor([True, False, True, True]) if masked else None
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, index, 0.7, row_mask), logits)
    assert torch.autograd.gradcheck(
        lambda x: selective_log_softmax_and_entropy(x, index, temperature=0.7, row_mask=row_mask), logits
    )
    assert torch.autograd.gradcheck(lambda x: entropy_from_logits(x, 3), logits)


def test_the_entropy_can_be_a_measurement() -> None:
    logits, index = logits_and_index(4, 5)
    logprobs, entropy = selective_log_softmax_and_entropy(logits.requires_grad_(), index, entropy_requires_grad=False)
    assert logprobs.requires_grad and not entropy.requires_grad


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
    (logprobs[:-1].sum() + entropy.sum()).backward()
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


def test_a_banned_word_keeps_the_entropy_gradient_finite_under_any_slope() -> None:
    logits = torch.randn(3, 7)
    logits[:, 2] = float("-inf")
    logits.requires_grad_()
    (entropy_from_logits(logits) * 3.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()
