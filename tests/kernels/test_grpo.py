"""The GRPO family against sums over responses written out, packed and padded, per response and per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import grpo_loss
from twinhead.kernels.grpo import LOSS_TYPES

NAN = float("nan")
LENGTHS = {"nothing": [], "empty": [0], "one": [1], "some": [4, 0, 1, 7], "equal": [5] * 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clips": {"epsilon_low": 0.1, "epsilon_high": 0.4},
    "kl": {"beta": 0.3},
}


def responses(lengths: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """New, old and reference log-probs of each response, and an advantage for each."""
    torch.manual_seed(sum(lengths))
    per_token = [[0.4 * torch.randn(n, dtype=torch.float64) for n in lengths] for _ in range(3)]
    return *per_token, torch.randn(len(lengths), dtype=torch.float64)


def written_out(
    lengths: list[int],
    loss_type: str,
    longest: int,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
) -> float:
    sums = []
    for new, old, ref, advantage in zip(*responses(lengths), strict=True):
        total = 0.0
        for t in range(len(new)):
            ratio = math.exp(new[t] - old[t])
            clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
            k3 = math.exp(ref[t] - new[t]) - 1 - float(ref[t] - new[t])
            total += max(-advantage * ratio, -advantage * clipped) + beta * k3
        sums.append(float(total))
    if loss_type == "grpo":
        means = [total / n for total, n in zip(sums, lengths, strict=True) if n > 0]
        return sum(means) / max(len(means), 1)
    return sum(sums) / max(len(lengths) * longest if loss_type == "dr_grpo" else sum(lengths), 1)


def padded(parts: list[Tensor], width: int) -> Tensor:
    rows = [torch.cat([x, torch.full((width - len(x),), NAN, dtype=x.dtype)]) for x in parts]
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_and_padded_are_the_sums_written_out(
    lengths: list[int], loss_type: str, settings: dict[str, Any]
) -> None:
    *per_token, advantages = responses(lengths)
    new, old, ref = (torch.cat([torch.zeros(0, dtype=torch.float64), *parts]) for parts in per_token)
    longest = max(lengths, default=0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    spread = advantages.repeat_interleave(cu_seqlens.diff())
    settings = {**settings, "loss_type": loss_type}
    found = grpo_loss(new, old, advantages, cu_seqlens=cu_seqlens, ref_logprobs=ref, **settings)
    assert_close(found[0].item(), written_out(lengths, **{"epsilon_low": 0.2, "longest": longest, **settings}))
    if sum(lengths) != len(lengths):
        assert_close(grpo_loss(new, old, spread, cu_seqlens=cu_seqlens, ref_logprobs=ref, **settings), found)

    width = longest + 2
    batch = [padded(parts, width) for parts in per_token]
    mask = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    normalizer = len(lengths) * longest if loss_type == "dr_grpo" else None
    for given in (advantages, torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, spread)):
        flat = grpo_loss(batch[0], batch[1], given, mask=mask, ref_logprobs=batch[2], normalizer=normalizer, **settings)
        assert_close(flat, found)


def test_gradients() -> None:
    lengths = [4, 0, 1, 7]
    *per_token, advantages = responses(lengths)
    new, old, ref = (torch.cat(parts) for parts in per_token)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    for loss_type in LOSS_TYPES:

        def packed_loss(new: Tensor, loss_type: str = loss_type) -> Tensor:
            settings: dict[str, Any] = {"beta": 0.2, "loss_type": loss_type, "normalizer": 5}
            return grpo_loss(new, old, advantages, cu_seqlens=cu_seqlens, ref_logprobs=ref, **settings)[0]

        assert torch.autograd.gradcheck(packed_loss, new.requires_grad_())
        (expected,) = torch.autograd.grad(packed_loss(new), new)
        batch = [padded(parts, 9).requires_grad_() for parts in per_token]
        settings: dict[str, Any] = {"beta": 0.2, "loss_type": loss_type, "normalizer": torch.tensor(5)}
        loss, _ = grpo_loss(batch[0], batch[1], advantages, mask=mask, ref_logprobs=batch[2], **settings)
        found = torch.autograd.grad(loss, batch, allow_unused=True)
        assert found[1:] == (None, None), "old and reference log-probs are constants"
        assert_close(found[0][mask], expected)
        assert (found[0][~mask] == 0).all()


def test_default_normalizers() -> None:
    ones = torch.ones(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    found = [-grpo_loss(ones, ones, torch.ones(3), mask=mask, loss_type=kind)[0].item() for kind in LOSS_TYPES]
    assert_close(found, [1.0, 5 / 12, 1.0])
    cu_seqlens = torch.tensor([0, 2, 2, 5])
    flat = torch.ones(5)
    found = [-grpo_loss(flat, flat, torch.ones(3), cu_seqlens=cu_seqlens, loss_type=k)[0].item() for k in LOSS_TYPES]
    assert_close(found, [1.0, 5 / 9, 1.0])


def test_statistics() -> None:
    new, old = torch.tensor([[-1.0, -2.0, NAN]]), torch.tensor([[-1.5, -2.0, NAN]])
    ref, mask = torch.tensor([[-2.0, -2.0, NAN]]), torch.tensor([[1, 1, 0]])
    loss, stats = grpo_loss(new, old, torch.ones(1), mask=mask, ref_logprobs=ref, beta=0.5)
    expected = {
        "pg_loss": -(1.2 + 1) / 2,
        "ref_kl": math.exp(-1) / 2,
        "approx_kl": -0.25,
        "approx_kl_k3": (math.exp(0.5) - 1.5) / 2,
        "clipfrac": 0.5,
        "ratio_mean": (math.exp(0.5) + 1) / 2,
        "ratio_max": math.exp(0.5),
        **dict.fromkeys(("vf_loss", "vf_clipfrac", "entropy"), 0.0),
    }
    assert_close({name: x.item() for name, x in stats.items()}, expected, rtol=1e-6, atol=1e-6)
    assert_close(loss.item(), expected["pg_loss"] + 0.5 * expected["ref_kl"], rtol=1e-6, atol=1e-6)
    assert grpo_loss(new.bfloat16(), old.bfloat16(), torch.ones(1), mask=mask)[0].dtype == torch.float32


X, CU = torch.zeros(5), torch.tensor([0, 2, 5], dtype=torch.int32)
B = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        ("loss_type to be one of grpo, dr_grpo, dapo, got 'bnpo'", lambda: grpo_loss(B, B, B, loss_type="bnpo")),
        (r"logprobs \[B, T\], or \(R,\) with cu_seqlens, got shape \(5,\)", lambda: grpo_loss(X, X, X)),
        (r"logprobs \(R,\) and no mask with cu_seqlens, got", lambda: grpo_loss(X, X, X, cu_seqlens=CU, mask=X)),
        (r"logprobs \(R,\) and no mask with cu_seqlens, got", lambda: grpo_loss(B, B, B, cu_seqlens=CU)),
        ("cu_seqlens to rise from 0 to 5", lambda: grpo_loss(X, X, X, cu_seqlens=CU[1:])),
        (r"advantages of shape \(2,\) or \(5,\), got \(3,\)", lambda: grpo_loss(X, X, X[:3], cu_seqlens=CU)),
        (r"advantages of shape \(2,\) or \(2, 3\), got \(3,\)", lambda: grpo_loss(B, B, B[0])),
        ("old_logprobs of the shape of logprobs", lambda: grpo_loss(B, B[0], B)),
        ("mask of the shape of logprobs", lambda: grpo_loss(B, B, B, mask=B[0])),
        ("ref_logprobs of the shape of logprobs", lambda: grpo_loss(B, B, B, ref_logprobs=B[0])),
        ("ref_logprobs for beta=0.1, got None", lambda: grpo_loss(B, B, B, beta=0.1)),
        (r"epsilon_low in \[0, 1\], got 2", lambda: grpo_loss(B, B, B, epsilon_low=2)),
        (r"epsilon_high in \[0, inf\], got -2", lambda: grpo_loss(B, B, B, epsilon_high=-2)),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
