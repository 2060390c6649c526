"""Advantages against sums written out, on every backend and in every layout; whitening by hand."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import _C, gae, whiten

NAN = float("nan")
BLOCK = 32  # of the Triton backend here: the interpreter takes its time for every element of a block
# few binary digits, because the interpreter, unlike the compiler, hands every float to a kernel in single precision
GAMMA, LAM = 63 / 64, 7 / 8


@pytest.fixture(autouse=True)
def short_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that are long for the Triton backend, and more of them than it joins at a time."""
    if "triton" in request.node.name:
        gpu = import_module("twinhead.kernels.gae.gpu")
        monkeypatch.setattr(gpu, "BLOCK", BLOCK)
        monkeypatch.setattr(gpu, "PARTS", 2)


def packed(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards, values, cu_seqlens, bootstrap."""
    torch.manual_seed(sum(lengths) + len(lengths))
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return *(torch.randn(size, dtype=dtype) for size in (total, total)), cu_seqlens, torch.randn(len(lengths)).to(dtype)


def written_out(rewards: Tensor, values: Tensor, gamma: float, lam: float, bootstrap: float) -> Tensor:
    """One sequence: advantage_t = sum over u >= t of (gamma lam)^(u - t) delta_u."""
    following = torch.cat([values, torch.tensor([bootstrap], dtype=values.dtype)])[1:]
    deltas = rewards + gamma * following - values
    steps = torch.arange(len(rewards), dtype=torch.float64)
    return ((gamma * lam) ** (steps - steps[:, None]).clamp(min=0) * deltas).triu().sum(1)


LENGTHS = {
    "nothing": [],
    "empty": [0],
    "one": [1],
    "some": [6, 3, 1, 0, 4],
    "many": [0, *range(60), 0],
    "long": [3, 1000],
}


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_is_each_sequence_alone_and_padded(lengths: list[int], backend: str) -> None:
    rewards, values, cu_seqlens, bootstrap = packed(lengths)
    settings: dict[str, Any] = {"gamma": GAMMA, "lam": LAM, "backend": backend}
    advantages, returns = gae(rewards, values, cu_seqlens=cu_seqlens, bootstrap=bootstrap, **settings)
    expected = [
        written_out(r, v, GAMMA, LAM, float(b))
        for r, v, b in zip(rewards.split(lengths), values.split(lengths), bootstrap, strict=True)
    ]
    assert_close(advantages, torch.cat([rewards[:0], *expected]))
    assert_close(returns, advantages + values)

    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    nan = torch.full(mask.shape, NAN, dtype=rewards.dtype)
    padded = gae(
        nan.masked_scatter(mask, rewards), nan.masked_scatter(mask, values), mask=mask, bootstrap=bootstrap, **settings
    )
    for found, flat in zip(padded, (advantages, returns), strict=True):
        assert_close(found[mask], flat)
        assert (found[~mask] == 0).all()


def test_holes_are_stepped_over(backend: str) -> None:
    rewards, values, _, bootstrap = packed([40])
    rewards, values, bootstrap = rewards.view(4, 10), values.view(4, 10), bootstrap.expand(4)
    mask = torch.rand(4, 10) < 0.6
    mask[3] = False
    poisoned = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
    advantages, returns = gae(*poisoned, mask=mask.float(), gamma=GAMMA, lam=LAM, bootstrap=bootstrap)
    for row in range(4):
        kept = mask[row]
        expected = written_out(rewards[row][kept], values[row][kept], GAMMA, LAM, float(bootstrap[row]))
        assert_close(advantages[row][kept], expected)
        assert_close(returns[row][kept], expected + values[row][kept])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_limits_of_lambda(backend: str) -> None:
    rewards, values, _, _ = packed([12])
    rewards, values = rewards.view(2, 6), values.view(2, 6)
    advantages, returns = gae(rewards, values, gamma=0.9, lam=1.0, backend=backend)
    monte_carlo = torch.stack([(0.9 ** torch.arange(6 - t).double() * rewards[:, t:]).sum(1) for t in range(6)], 1)
    assert_close(returns, monte_carlo)
    assert_close(advantages, monte_carlo - values)
    one_step, _ = gae(rewards, values, gamma=0.9, lam=0.0, backend=backend)
    assert_close(one_step, rewards + 0.9 * torch.cat([values[:, 1:], torch.zeros(2, 1)], 1) - values)


def test_holes_longer_than_a_block(backend: str) -> None:
    rewards, values, _, bootstrap = packed([600])
    rewards, values, mask = rewards.view(3, 200), values.view(3, 200), torch.ones(3, 200, dtype=torch.bool)
    mask[0, 10:150] = mask[1, 50:] = mask[1, :3] = mask[2] = False
    poisoned = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
    settings: dict[str, Any] = {"mask": mask, "bootstrap": bootstrap.expand(3), "gamma": GAMMA, "lam": LAM}
    assert_close(gae(*poisoned, **settings, backend=backend), gae(rewards, values, **settings, backend="torch"))


@pytest.mark.parametrize("lam", [0.0, LAM, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(dtype: torch.dtype, lam: float, backend: str) -> None:
    long = 400 if backend == "triton" else 5000
    rewards, values, cu_seqlens, bootstrap = packed([300, 0, 1, long], dtype)
    settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "gamma": GAMMA, "lam": lam}
    found = gae(rewards, values, bootstrap=bootstrap, **settings)
    plain = gae(rewards, values, bootstrap=bootstrap, **settings, backend="torch")
    exact = gae(rewards.double(), values.double(), bootstrap=bootstrap.double(), **settings, backend="torch")
    assert found[0].dtype == found[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert (ours - truth).abs().amax() <= 2 * (theirs - truth).abs().amax() + 1e-6


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("padded", [False, True])
def test_torch_knows_the_operator(padded: bool, backend: str) -> None:
    rewards, values, cu_seqlens, bootstrap = packed([6, 2, 4])
    mask = torch.rand(3, 4) < 0.5
    gae(rewards, values, cu_seqlens=cu_seqlens)  # loads the backend
    operator = getattr(torch.ops.twinhead, f"gae_{backend}").default
    layout = (mask, None) if padded else (None, cu_seqlens)
    tokens = (rewards.view(mask.shape), values.view(mask.shape)) if padded else (rewards, values)
    torch.library.opcheck(operator, (*tokens, 0.9, 0.95, *layout, bootstrap, True))


def test_it_compiles_as_a_whole() -> None:
    rewards, values, cu_seqlens, bootstrap = packed([6, 2, 4])
    mask = torch.rand(3, 4) < 0.5

    def advantages(rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor]]:
        padded = gae(rewards.view(mask.shape) * 2, values.view(mask.shape), mask=mask, bootstrap=bootstrap)
        return [padded, gae(rewards * 2, values, cu_seqlens=cu_seqlens, bootstrap=bootstrap, whiten=True)]

    compiled = torch.compile(advantages, fullgraph=True)
    assert_close(compiled(rewards, values, mask, cu_seqlens), advantages(rewards, values, mask, cu_seqlens))


def test_the_number_of_threads_does_not_matter() -> None:
    rewards, values, cu_seqlens, _ = packed([30_000] * 5, torch.float32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(gae(rewards, values, cu_seqlens=cu_seqlens, whiten=True, backend="cpu")[0])
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_sequence_of_131072_actions(backend: str) -> None:
    rewards, values, cu_seqlens, _ = packed([131_072], torch.float32)
    following, advantage, expected = 0.0, 0.0, []
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        advantage = reward + following - value + LAM * advantage
        following = value
        expected.append(advantage)
    found, _ = gae(rewards, values, cu_seqlens=cu_seqlens, lam=LAM)
    assert_close(found, torch.tensor(expected[::-1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_launches_go_where_the_tensors_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x.device) or guard(x))
    rewards, values, cu_seqlens, _ = packed([3])
    gae(rewards, values, cu_seqlens=cu_seqlens)
    assert asked == [rewards.device]


def test_strided_inputs_that_learn_and_outputs_that_do_not(backend: str) -> None:
    rewards, values, _, _ = packed([12])
    strided = torch.empty(3, 8, dtype=torch.float64)[:, ::2].copy_(rewards.view(3, 4))
    columns = values.view(3, 4).t().contiguous().t().requires_grad_()
    found = gae(strided, columns, backend=backend)
    assert_close(found, gae(rewards.view(3, 4), values.view(3, 4)))
    assert not found[0].requires_grad and not found[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_broadcast_inputs_of_other_dtypes_and_contexts(dtype: torch.dtype, backend: str) -> None:
    rewards, mask = torch.tensor(2.0).expand(3, 4), torch.tensor(True).expand(3, 4)
    values, bootstrap = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype).expand(3, 4), torch.tensor(1.5).expand(3)
    expected = gae(rewards.to(dtype).clone(), values.clone(), bootstrap=bootstrap.clone(), backend="torch")
    assert expected[0].dtype == dtype
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert_close(gae(rewards, values, mask=mask, bootstrap=bootstrap.half()), expected)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_whitened_is_whitened_afterwards(lengths: list[int], backend: str) -> None:
    rewards, values, cu_seqlens, bootstrap = packed(lengths)
    settings: dict[str, Any] = {"bootstrap": bootstrap, "gamma": GAMMA, "lam": LAM}
    advantages, returns = gae(rewards, values, cu_seqlens=cu_seqlens, **settings)
    found = gae(rewards, values, cu_seqlens=cu_seqlens, **settings, whiten=True)
    apart = advantages - advantages.mean()
    expected = apart / (apart.square().mean() + 1e-8).sqrt()
    assert_close(found[0], expected)
    assert torch.equal(found[1], returns)

    mask = torch.arange(max(lengths, default=0) + 1) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    mask[::2] = mask[::2].flip(1)
    mask = mask.t().contiguous().t()
    nan = torch.full(mask.shape, NAN, dtype=rewards.dtype)
    padded = [nan.masked_scatter(mask, x) for x in (rewards, values)]
    spread, _ = gae(*padded, mask=mask, **settings, whiten=True)
    assert_close(spread[mask], expected)
    assert (spread[~mask] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whitening_of_what_is_far_from_zero(dtype: torch.dtype, mean: float, masked: bool, backend: str) -> None:
    rewards, values, _, _ = packed([330])
    rewards, values = rewards.view(3, 110).to(dtype) + mean, values.view(3, 110).to(dtype)
    mask = torch.rand(3, 110) < 0.7 if masked else None
    settings: dict[str, Any] = {"mask": mask, "lam": 0.0, "gamma": 0.0, "whiten": True}
    found, _ = gae(rewards, values, **settings)
    plain, _ = gae(rewards, values, **settings, backend="torch")
    exact, _ = gae(rewards.double(), values.double(), **settings, backend="torch")
    assert found.dtype == dtype
    assert (found - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + 1e-6


def test_whitened_advantages_of_almost_nothing(backend: str) -> None:
    zero, one = torch.zeros(2, 40), torch.full((2, 40), 7.3)
    single = torch.zeros(2, 40)
    single[1, 35] = 1
    for mask in (zero, single):
        advantages, returns = gae(one, zero, mask=mask, whiten=True)
        assert torch.equal(advantages, zero) and torch.equal(returns, one * mask)
    equal, _ = gae(one, zero, gamma=0.0, whiten=True)
    assert_close(equal, zero, rtol=0, atol=1e-2)  # one rounding of the mean, times 1e4
    poisoned, _ = gae(one.index_fill(1, torch.tensor([3]), NAN), zero, mask=1 - single, whiten=True)
    assert poisoned[1, 35] == 0 and poisoned.isnan().sum() == 79, "what is no action is 0 whatever the others are"


R, CU = torch.zeros(5), torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        (r"rewards \[B, T\], or \(R,\) with cu_seqlens, got shape \(5,\)", lambda: gae(R, R)),
        ("values of the shape of rewards", lambda: gae(R, R[:4], cu_seqlens=CU)),
        ("mask of the shape of rewards", lambda: gae(R[None], R[None], mask=R)),
        (r"rewards \(R,\) and no mask with cu_seqlens, got .* a mask", lambda: gae(R, R, mask=R, cu_seqlens=CU)),
        (r"rewards \(R,\) and no mask with cu_seqlens, got .* no mask", lambda: gae(R[None], R[None], cu_seqlens=CU)),
        ("cu_seqlens to rise from 0 to 5", lambda: gae(R, R, cu_seqlens=CU[:2])),
        ("cu_seqlens to rise from 0 to 5", lambda: gae(R, R, cu_seqlens=CU[1:])),
        ("cu_seqlens to rise from 0 to 5", lambda: gae(R, R, cu_seqlens=torch.tensor([0, 4, 3, 5]))),
        (r"cu_seqlens int32 of shape \(S \+ 1,\), got torch.float32", lambda: gae(R, R, cu_seqlens=CU.float())),
        (r"bootstrap of shape \(2,\), got \(3,\)", lambda: gae(R, R, cu_seqlens=CU, bootstrap=R[:3])),
        (r"bootstrap of shape \(1,\), got \(5,\)", lambda: gae(R[None], R[None], bootstrap=R)),
        (r"gamma in \[0, 1\], got 1.1", lambda: gae(R, R, cu_seqlens=CU, gamma=1.1)),
        (r"lam in \[0, 1\], got -0.1", lambda: gae(R, R, cu_seqlens=CU, lam=-0.1)),
        ("at least 2 entries for an unbiased variance, got 1", lambda: whiten(R[:1], unbiased=True)),
        ("at least 2 entries", lambda: whiten(R, torch.tensor([0, 0, 1, 0, 0]), unbiased=True)),
        ("mask of the shape of x", lambda: whiten(R, R[:3])),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()


def test_the_extension_checks_what_it_is_given() -> None:
    def call(**changes: Any) -> None:
        arrays: dict[str, Any] = {name: np.zeros(5) for name in ("rewards", "values", "advantages", "returns")}
        arrays |= {"offsets": np.array([0, 2, 5]), "mask": None, "bootstrap": None}
        _C.gae(**{**arrays, "gamma": 1.0, "lam": 1.0, "whitens": False, "threads": 1, **changes})

    call()
    wrong = {"values": 4, "advantages": 4, "returns": 6, "mask": 3, "bootstrap": 3}
    for name, size in wrong.items():
        with pytest.raises(ValueError, match=f"expected {name} of length . got {size}|expected {name} of length"):
            call(**{name: np.zeros(size, dtype=bool if name == "mask" else float)})
    for offsets in ([0, 2], [1, 5], [0, 9, 5], []):
        with pytest.raises(ValueError, match="offsets"):
            call(offsets=np.array(offsets, dtype=np.int64))
    with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
        call(threads=0)
    with pytest.raises(TypeError):
        call(returns=np.zeros(5, dtype=np.float32))


def test_whitening_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, NAN]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for unbiased, variance in ((False, 8 / 3), (True, 4.0)):
        scale = (variance + 1e-8) ** -0.5
        expected = torch.tensor([[-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64) * scale
        assert_close(whiten(x, mask, unbiased=unbiased), expected)
        assert_close(whiten(x, mask, shift_mean=False, unbiased=unbiased), expected + 3 * mask)
    assert_close(whiten(x[0, :2]), torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-7, atol=0)


def test_whitening_almost_nothing() -> None:
    x = torch.tensor([7.0, NAN])
    assert torch.equal(whiten(x, torch.tensor([True, False])), torch.zeros(2))
    assert torch.equal(whiten(x, torch.tensor([True, False]), shift_mean=False), torch.tensor([7.0, 0.0]))
    for unbiased in (False, True):
        assert torch.equal(whiten(x, torch.zeros(2), unbiased=unbiased), torch.zeros(2))
        assert whiten(torch.zeros(0), unbiased=unbiased).shape == (0,)
    assert torch.equal(whiten(torch.full((5,), 3.0)), torch.zeros(5))
    assert whiten(torch.zeros(5, dtype=torch.bfloat16)).dtype == torch.float32
