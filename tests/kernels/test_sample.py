"""Sampling against distributions filtered word by word, at every uniform number that could go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import sample

INF = float("inf")
JUST_BELOW_ONE = 1 - 2.0**-24
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "everything": {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    "k of all words": {"top_k": 10**6, "top_p": 0.5},
}


def filtered(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The distribution that is sampled from, word by word."""
    weights = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    ranked = sorted(range(len(weights)), key=lambda word: -weights[word])
    ranked = ranked[: top_k or None]
    mass, kept, total = 0.0, [], sum(weights[word] for word in ranked)
    for word in ranked:
        if mass < top_p:
            kept.append(word)
        mass += weights[word] / total
    kept = [word for word in kept if weights[word] >= min_p * weights[ranked[0]]]
    p = torch.zeros(len(weights), dtype=torch.float64)
    p[kept] = torch.tensor([weights[word] for word in kept], dtype=torch.float64)
    return p / p.sum()


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("words", [2, 31, 1000])
def test_the_first_word_whose_cumulative_probability_exceeds_the_number(words: int, filters: dict[str, Any]) -> None:
    torch.manual_seed(words)
    logits, uniforms = 2 * torch.randn(7, words, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    tokens, logprobs = sample(logits, uniforms, **filters)
    for row in range(7):
        p = filtered(logits[row].tolist(), **filters)
        token = int((p.cumsum(0) > uniforms[row]).nonzero()[0])
        assert tokens[row] == token
        assert_close(logprobs[row], p[token].log())


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_frequencies(filters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12)
    uniforms = (torch.arange(20000) + 0.5) / 20000
    tokens, logprobs = sample(logits.expand(20000, 12), uniforms, **filters)
    p = filtered(logits.tolist(), **filters).float()
    assert_close(tokens.bincount(minlength=12) / 20000, p, rtol=0, atol=1e-4)
    assert_close(logprobs, p.log()[tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_word_of_probability_zero_is_never_drawn(filters: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    extremes = torch.tensor([0.0, JUST_BELOW_ONE, 1.0, -1e-7, 2.0**-149, 0.5, 1 - 1e-12, *torch.rand(500)])
    for words in (2, 31, 5000):
        logits = torch.randn(len(extremes), words)
        banned = torch.rand(logits.shape) < 0.5
        banned[:, 0] = banned[:, -1] = True
        banned[torch.arange(len(extremes)), torch.randint(words, (len(extremes),))] = False
        logits = logits.masked_fill(banned, -INF)
        for uniforms in (extremes, extremes.double()):
            tokens, logprobs = sample(logits.to(dtype), uniforms, **filters)
            assert not banned.gather(1, tokens[:, None]).any()
            assert logprobs.isfinite().all() and (logprobs <= 0).all()


def test_zero_temperature_is_argmax_at_temperature_one() -> None:
    logits = torch.randn(7, 31)
    tokens, logprobs = sample(logits, torch.rand(7), temperature=0, top_k=1, top_p=0.1)
    assert torch.equal(tokens, logits.argmax(1))
    assert_close(logprobs, logits.log_softmax(1).amax(1))
    assert sample(torch.tensor([[-INF, 0.0, -INF]]), torch.zeros(1), temperature=0)[0] == 1


def test_ties_keep_the_shortest_prefix_and_exactly_k() -> None:
    logits = torch.zeros(1000, 4)
    uniforms = torch.linspace(0, 1 - 1e-6, 1000)
    for filters in ({"top_p": 0.5}, {"top_k": 2}, {"top_k": 3, "top_p": 0.6}):
        tokens, logprobs = sample(logits, uniforms, **filters)
        assert len(tokens.unique()) == 2, filters
        assert_close(logprobs, torch.full((1000,), 0.5).log())
    tokens, logprobs = sample(logits, uniforms, top_p=1e-9)
    assert len(tokens.unique()) == 1 and (logprobs == 0).all(), "one word stays, whatever top_p"


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_row_does_not_depend_on_its_neighbours(filters: dict[str, Any]) -> None:
    logits, uniforms = torch.randn(64, 257), torch.rand(64)
    tokens, logprobs = sample(logits, uniforms, **filters)
    for row in (0, 13, 63):
        alone = sample(logits[row : row + 1], uniforms[row : row + 1], **filters)
        assert torch.equal(alone[0], tokens[row : row + 1]) and torch.equal(alone[1], logprobs[row : row + 1])


def test_only_differences_matter_and_layouts_do_not() -> None:
    logits, uniforms = (torch.randn(7, 31) * 64).round() / 64, torch.rand(7)
    expected = sample(logits, uniforms)
    assert_close(sample(logits + 1e4, uniforms), expected)
    assert_close(sample(logits.t().contiguous().t(), uniforms), expected)
    tokens, logprobs = sample(logits[:0], uniforms[:0])
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64
    assert sample(logits.half(), uniforms)[1].dtype == torch.float32


def test_nothing_is_sorted_unless_a_filter_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sorted")

    monkeypatch.setattr(Tensor, "sort", refuse)
    logits, uniforms = torch.randn(7, 31), torch.rand(7)
    for filters in ({}, {"temperature": 0.5}, {"temperature": 0}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}):
        sample(logits, uniforms, **filters)
    with pytest.raises(AssertionError, match="sorted"):
        sample(logits, uniforms, top_p=0.9)


Z, U = torch.zeros(3, 5), torch.zeros(3)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        (r"logits of shape \(B, V\), V > 0, got \(5,\)", lambda: sample(Z[0], U)),
        (r"logits of shape \(B, V\), V > 0, got \(3, 0\)", lambda: sample(Z[:, :0], U)),
        (r"uniforms of shape \(3,\), got \(3, 1\)", lambda: sample(Z, U[:, None])),
        (r"uniforms of shape \(3,\), got \(2,\)", lambda: sample(Z, U[:2])),
        (r"temperature in \[0, inf\], got -0.5", lambda: sample(Z, U, temperature=-0.5)),
        (r"top_k in \[0, inf\], got -1", lambda: sample(Z, U, top_k=-1)),
        (r"top_p in \(0, 1\], got 0", lambda: sample(Z, U, top_p=0)),
        (r"top_p in \(0, 1\], got 1.5", lambda: sample(Z, U, top_p=1.5)),
        (r"min_p in \[0, 1\], got 2", lambda: sample(Z, U, min_p=2)),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
