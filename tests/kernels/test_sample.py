"""Sampling on every backend against distributions filtered word by word, at every number that could go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import _C, sample

INF, NAN = float("inf"), float("nan")
FUSED = ["cpu", "triton"]
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


def exact(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The same for rows of many words, in float64; of equal words those that come first are kept."""
    logits = logits.double() / temperature
    ranked, words = logits.sort(descending=True, stable=True)
    p = ranked.softmax(-1)
    if top_k:
        p[:, top_k:] = 0
    p /= p.sum(-1, keepdim=True)
    p = p.where(p.cumsum(-1) - p < top_p, 0)
    p = p.where(p >= min_p * p[:, :1], 0)
    return torch.zeros_like(p).scatter_(1, words, p / p.sum(-1, keepdim=True))


@pytest.mark.usefixtures("nan_empty", "backend")
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
def test_frequencies(filters: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(12), 20 if backend == "triton" else 20000
    uniforms = (torch.arange(draws) + 0.5) / draws
    tokens, logprobs = sample(logits.expand(draws, 12), uniforms, **filters)
    p = filtered(logits.tolist(), **filters).float()
    assert_close(tokens.bincount(minlength=12) / draws, p, rtol=0, atol=2 / draws)
    assert_close(logprobs, p.log()[tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("backend", FUSED, indirect=True)
@pytest.mark.parametrize("filters", [*FILTERS.values(), {"top_k": 700, "top_p": 0.95}], ids=[*FILTERS, "many of many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_large_vocabularies(dtype: torch.dtype, filters: dict[str, Any], backend: str) -> None:
    """Where rounding moves a border of the cumulative distribution past a number, its neighbour is drawn instead."""
    torch.manual_seed(0)
    for rows, words in ((1, 9001),) if backend == "triton" else ((16, 32000), (3, 50257), (2, 151936)):
        logits, uniforms = (2 * torch.randn(rows, words)).to(dtype), torch.rand(rows)
        tokens, logprobs = sample(logits, uniforms, **filters)
        p = exact(logits, **filters)
        found = p.gather(1, tokens[:, None]).squeeze(1)
        above = p.cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
        assert (found > 0).all(), "the word was filtered out"
        assert (above - found - 1e-6 <= uniforms).all() and (uniforms <= above + 1e-6).all()
        assert_close(logprobs.double(), found.log(), rtol=1e-6, atol=2e-6)


CROWDS: dict[str, Tensor] = {
    "one value": torch.zeros(999),
    "two values": (torch.arange(999) % 2).float(),
    "smaller and smaller": 2.0 ** -torch.arange(999).float().clamp(max=140),
    "neighbours": torch.full((999,), 3.0) + torch.arange(999) * 2.0**-22,
    "masked": torch.where(torch.arange(999) % 3 == 0, torch.arange(999) / 400, torch.finfo(torch.float32).min),
    "excluded": torch.where(torch.arange(999) % 3 == 0, torch.arange(999) / 400, -INF),
    "few excluded words": torch.where(torch.arange(999) < 40, -INF, 1e-3 * torch.arange(999)),
}


@pytest.mark.parametrize("backend", FUSED, indirect=True)
@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS)
def test_crowded_logits(crowd: Tensor, backend: str) -> None:
    draws = 2 if backend == "triton" else 50
    logits, uniforms = crowd.expand(draws, 999), torch.linspace(0, 1, draws)
    for filters in ({"top_k": 7}, {"top_p": 0.3}, {"top_k": 500, "top_p": 0.61}, {"temperature": 0.5, "top_k": 400}):
        tokens, logprobs = sample(logits, uniforms, **filters)
        p = exact(crowd[None], **filters)[0]
        assert (p[tokens] > 0).all()
        assert_close(logprobs.double(), p[tokens].log(), rtol=1e-5, atol=1e-5)
        assert tokens[0] == p.nonzero()[0] and tokens[-1] == p.nonzero()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_word_of_probability_zero_is_never_drawn(filters: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    extremes = torch.tensor([0.0, JUST_BELOW_ONE, 1.0, -1e-7, 2.0**-149, 0.5, 1 - 1e-12, *torch.rand(500)])
    extremes = extremes[:7] if backend == "triton" else extremes
    for words in (31,) if backend == "triton" else (2, 31, 5000):
        logits = torch.randn(len(extremes), words)
        banned = torch.rand(logits.shape) < 0.5
        banned[:, 0] = banned[:, -1] = True
        banned[torch.arange(len(extremes)), torch.randint(words, (len(extremes),))] = False
        logits = logits.masked_fill(banned, -INF)
        for uniforms in (extremes.double(), extremes)[: 1 if backend == "triton" else 2]:
            tokens, logprobs = sample(logits.to(dtype), uniforms, **filters)
            assert not banned.gather(1, tokens[:, None]).any()
            assert logprobs.isfinite().all() and (logprobs <= 0).all()


@pytest.mark.usefixtures("backend")
def test_words_that_round_to_probability_zero_are_not_drawn() -> None:
    logits = torch.full((3, 2000), -200.0)
    logits[:, :700], logits[:, 1500] = -300.0, 0.0
    tokens, logprobs = sample(logits, torch.tensor([0.0, 0.5, JUST_BELOW_ONE]))
    assert (tokens == 1500).all() and (logprobs == 0).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("filters", [*FILTERS.values(), {"temperature": 0}], ids=[*FILTERS, "greedy"])
def test_a_row_without_words_gives_nan_and_disturbs_nobody(filters: dict[str, Any]) -> None:
    logits, uniforms = torch.randn(3, 31), torch.rand(3)
    expected = sample(logits, uniforms, **filters)
    logits[1] = -INF
    tokens, logprobs = sample(logits, uniforms, **filters)
    assert logprobs.isnan().tolist() == [False, True, False] and 0 <= tokens[1] < 31
    assert torch.equal(tokens[::2], expected[0][::2]) and torch.equal(logprobs[::2], expected[1][::2])


@pytest.mark.usefixtures("backend")
def test_zero_temperature_is_argmax_at_temperature_one() -> None:
    logits = torch.randn(7, 31)
    tokens, logprobs = sample(logits, torch.rand(7), temperature=0, top_k=1, top_p=0.1)
    assert torch.equal(tokens, logits.argmax(1))
    assert_close(logprobs, logits.log_softmax(1).amax(1))
    assert sample(torch.tensor([[-INF, 0.0, -INF]]), torch.zeros(1), temperature=0)[0] == 1
    many = torch.zeros(1, 3000).index_fill_(1, torch.tensor([700, 1800, 2900]), 5.0)
    assert sample(many, torch.zeros(1), temperature=0)[0] == 700


BORDERS: dict[str, Callable[[], Tensor]] = {
    "ties": lambda: (4 * torch.randn(300)).round() / 4,
    "neighbours": lambda: 1.9 + torch.randperm(300) * 2.0**-23,  # a third of them is the same float for several
    "both zeros": lambda: torch.tensor([-1.0, 0.0, -0.0, 0.5]).repeat(75),
    "almost all": lambda: torch.arange(300).where(torch.arange(300) > 250, 1.0).div(300),
}
CUTS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 101, "temperature": 3.0},
    {"top_k": 299},
    {"top_p": 0.603, "temperature": 3.0},
    {"top_k": 260, "top_p": 0.3033},
    {"top_k": 260, "top_p": 1 - 2.0**-53},
    {"top_k": 150, "top_p": 0.9, "min_p": 0.7},
    {"top_k": 100, "min_p": 1.0},
]


@pytest.mark.parametrize("filters", CUTS, ids=str)
@pytest.mark.parametrize("border", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_words_at_the_border(
    dtype: torch.dtype, border: Callable[[], Tensor], filters: dict[str, Any], backend: str
) -> None:
    """Each kept word is drawn by the middle of its share, and its log-probability shows that no other one is kept."""
    torch.manual_seed(0)
    logits = border().to(dtype)
    p = exact(logits[None], **filters)[0]
    rank = p.sort(descending=True, stable=True).indices
    kept = rank[: int((p > 0).sum())][-1 if backend == "triton" else 0 :]
    tokens, logprobs = sample(logits.expand(len(kept), 300), (p.cumsum(0) - p / 2)[kept], **filters)
    assert torch.equal(tokens, kept)
    assert_close(logprobs.double(), p[kept].log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_both_zeros_have_one_key(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """A search that told them apart would never end on a GPU, whose minimum of the two is the negative one."""
    import triton

    from twinhead.kernels.sample import gpu

    monkeypatch.setitem(globals(), "gpu", gpu)  # a kernel sees the names of its module only

    @triton.jit
    def write(numbers: Any, keys: Any) -> None:
        lane = gpu.tl.arange(0, 4)
        gpu.tl.store(keys + lane, gpu._key(gpu.tl.load(numbers + lane)))

    for dtype, integer in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        keys = torch.empty(4, dtype=integer)
        write[(1,)](torch.tensor([-1.0, -0.0, 0.0, 1.0], dtype=dtype), keys)
        assert keys[0] < keys[1] == keys[2] < keys[3]


def test_ties_keep_the_shortest_prefix_and_exactly_k(backend: str) -> None:
    draws = 6 if backend == "triton" else 1000
    logits = torch.zeros(draws, 4)
    uniforms = torch.linspace(0, 1 - 1e-6, draws)
    for filters in ({"top_p": 0.5}, {"top_k": 2}, {"top_k": 3, "top_p": 0.6}):
        tokens, logprobs = sample(logits, uniforms, **filters)
        assert len(tokens.unique()) == 2, filters
        assert_close(logprobs, torch.full((draws,), 0.5).log())
    many = torch.zeros(1, 9000).index_fill_(1, torch.arange(8990, 9000), 1.0)
    assert sample(many, torch.tensor([0.9999]), top_k=4110)[0] == 8999, "no other zero comes before the last words"
    tokens, logprobs = sample(logits, uniforms, top_p=1e-9)
    assert len(tokens.unique()) == 1 and (logprobs == 0).all(), "one word stays, whatever top_p"


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_row_does_not_depend_on_its_neighbours(filters: dict[str, Any], backend: str) -> None:
    rows = 3 if backend == "triton" else 64
    logits, uniforms = torch.randn(rows, 257), torch.rand(rows)
    tokens, logprobs = sample(logits, uniforms, **filters)
    for row in (rows // 2, rows - 1):
        alone = sample(logits[row : row + 1], uniforms[row : row + 1], **filters)
        assert torch.equal(alone[0], tokens[row : row + 1]) and torch.equal(alone[1], logprobs[row : row + 1])


@pytest.mark.usefixtures("backend")
def test_only_differences_matter_and_layouts_do_not() -> None:
    logits, uniforms = (torch.randn(7, 31) * 64).round() / 64, torch.rand(7)
    expected = sample(logits, uniforms)
    assert_close(sample(logits + 1e4, uniforms), expected)
    assert_close(sample(logits.t().contiguous().t(), uniforms), expected)
    wide = torch.full((7, 40), NAN)
    assert_close(sample(wide[:, 5:36].copy_(logits), uniforms), expected)
    assert_close(sample(logits.clone().requires_grad_(), uniforms[:, None].expand(7, 2)[:, 1]), expected)
    rows = logits[:1].expand(7, 31)
    assert_close(sample(rows, uniforms), sample(rows.contiguous(), uniforms))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_close(sample(logits.bfloat16(), uniforms), sample(logits.bfloat16().float(), uniforms))
    tokens, logprobs = sample(logits[:, :1], uniforms, top_k=1, top_p=0.5, min_p=0.5)
    assert (tokens == 0).all() and (logprobs == 0).all()
    tokens, logprobs = sample(logits[:0], uniforms[:0])
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int64
    assert sample(logits.half(), uniforms)[1].dtype == torch.float32
    halves = logits.bfloat16()
    assert_close(sample(halves, uniforms), sample(halves.float(), uniforms))


def test_no_row_is_sorted_unless_a_filter_asks(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    sort = Tensor.sort

    def refuse(row: Tensor, *args: Any, **options: Any) -> Any:
        assert row.shape[-1] < 31, "sorted"
        return sort(row, *args, **options)

    monkeypatch.setattr(Tensor, "sort", refuse)
    logits, uniforms = torch.randn(7, 31), torch.rand(7)
    for filters in ({}, {"temperature": 0.5}, {"temperature": 0}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}):
        sample(logits, uniforms, **filters)
    if backend == "torch":
        with pytest.raises(AssertionError, match="sorted"):
            sample(logits, uniforms, top_p=0.9)
    else:
        sample(logits, uniforms, top_p=0.9)


def test_many_rows() -> None:
    logits, uniforms = torch.randn(70_000, 3), torch.rand(70_000)
    for filters in ({}, {"top_k": 2}):
        ours, plain = (sample(logits, uniforms, **filters, backend=backend) for backend in ("cpu", "torch"))
        assert (ours[0] != plain[0]).sum() <= 2
        assert_close(ours[1][ours[0] == plain[0]], plain[1][ours[0] == plain[0]])


def test_the_number_of_threads_does_not_matter() -> None:
    logits, uniforms = torch.randn(50, 1000), torch.rand(50)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(sample(logits, uniforms, top_k=100, top_p=0.9, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_the_extension_checks_what_it_is_given() -> None:
    def call(**changes: Any) -> None:
        arrays: dict[str, Any] = {"logits": np.zeros((3, 5)), "uniforms": np.zeros(3), "logprobs": np.zeros(3)}
        arrays |= {"tokens": np.zeros(3, dtype=np.int64), "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        _C.sample(**{**arrays, "threads": 1, **changes})

    call()
    for name, wrong in (("uniforms", np.zeros(4)), ("logprobs", np.zeros(2)), ("tokens", np.zeros(1, dtype=np.int64))):
        with pytest.raises(ValueError, match=f"expected {name} of length 3, got {len(wrong)}"):
            call(**{name: wrong})
    for logits in (np.zeros(5), np.zeros((3, 0)), np.zeros((3, 10))[:, ::2]):
        with pytest.raises(ValueError, match="sample: expected"):
            call(logits=logits)
    with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
        call(threads=0)
    with pytest.raises(TypeError):
        call(uniforms=np.zeros(3, dtype=np.float32))


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
