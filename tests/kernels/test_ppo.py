"""The PPO loss against a loop over tokens that reads like the paper, and what masks, clips and counts do to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import ppo_loss

NAN = float("nan")
KEYS = "pg_loss vf_loss entropy approx_kl approx_kl_k3 ref_kl clipfrac vf_clipfrac ratio_mean ratio_max".split()
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clips": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "value_clip": 0.05},
    "coefficients": {"value_coef": 0.1, "entropy_coef": 0.3, "normalizer": 11},
    "no value clip": {"value_clip": None, "normalizer": torch.tensor(3)},
}


def tokens(*shape: int, extreme: bool = True) -> dict[str, Tensor]:
    """All per-token inputs: ratios on both sides of every clip, and two outside the exponent's limit if `extreme`."""
    torch.manual_seed(sum(shape))
    scales = {"logprobs": 0.3, "old_logprobs": 0.3, "advantages": 1.0, "values": 1.0, "old_values": 1.0, "returns": 1.0}
    given = {name: scale * torch.randn(shape, dtype=torch.float64) for name, scale in scales.items()}
    given["logprobs"] -= 2
    given["old_logprobs"] -= 2
    given["old_values"] = given["values"] + 0.2 * given["old_values"]
    if extreme and given["logprobs"].numel() > 5:
        given["logprobs"].view(-1)[0] += 30
        given["logprobs"].view(-1)[5] -= 30
    return given | {"entropy": torch.rand(shape, dtype=torch.float64)}


def loop(
    given: dict[str, Tensor],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    normalizer: Any = None,
) -> tuple[float, dict[str, float]]:
    """The formula, token by token."""
    rows = list(zip(*(given[name].flatten().tolist() for name in given), strict=True))
    totals = dict.fromkeys(KEYS, 0.0)
    for new, old, advantage, value, old_value, target, entropy in rows:
        log_ratio = min(max(new - old, -20.0), 20.0)
        ratio = math.exp(log_ratio)
        sides = -advantage * ratio, -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high)
        policy = max(sides)
        if dual_clip is not None and advantage < 0:
            policy = min(policy, -dual_clip * advantage)
        errors = [(value - target) ** 2]
        if value_clip is not None:
            errors.append((old_value + min(max(value - old_value, -value_clip), value_clip) - target) ** 2)
        totals["pg_loss"] += policy
        totals["vf_loss"] += max(errors) / 2
        totals["entropy"] += entropy
        totals["approx_kl"] += old - new
        totals["approx_kl_k3"] += ratio - 1 - log_ratio
        totals["clipfrac"] += sides[1] > sides[0]
        totals["vf_clipfrac"] += errors[-1] > errors[0]
        totals["ratio_mean"] += ratio
        totals["ratio_max"] = max(totals["ratio_max"], ratio)
    count = max(len(rows), 1)
    divisor = count if normalizer is None else int(normalizer)
    loss = totals["pg_loss"] + value_coef * totals["vf_loss"] - entropy_coef * totals["entropy"]
    stats = {name: total / divisor for name, total in totals.items()}
    return loss / divisor, stats | {"ratio_max": totals["ratio_max"]}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_against_the_loop(rows: int, settings: dict[str, Any]) -> None:
    given = tokens(rows)
    loss, stats = ppo_loss(**given, **settings)
    expected, expected_stats = loop(given, **settings)
    assert_close(loss.item(), expected)
    assert list(stats) == KEYS
    assert all(x.shape == () and not x.requires_grad for x in stats.values())
    assert_close({name: x.item() for name, x in stats.items()}, {name: expected_stats[name] for name in KEYS})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients(settings: dict[str, Any]) -> None:
    given = tokens(12, extreme=False)
    learned = [given[name].requires_grad_() for name in ("logprobs", "values", "entropy")]

    def loss(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        return ppo_loss(**{**given, "logprobs": logprobs, "values": values, "entropy": entropy}, **settings)[0]

    assert torch.autograd.gradcheck(loss, learned)
    far = tokens(12)["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(far, *learned[1:]), far)
    assert gradient[0] == gradient[5] == 0, "a ratio that is held at its limit has no slope"
    constants = {name: x.clone().requires_grad_() for name, x in given.items() if not x.requires_grad}
    total, _ = ppo_loss(**{**given, **constants}, **settings)
    assert torch.autograd.grad(total, list(constants.values()), allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_what_the_mask_leaves_out_may_hold_anything(poison: float) -> None:
    given = tokens(5, 8)
    mask = torch.rand(5, 8) < 0.5
    mask[2] = False
    kept = {name: x[mask].requires_grad_() for name, x in given.items()}
    padded = {name: x.masked_fill(~mask, poison).requires_grad_() for name, x in given.items()}
    settings = {"entropy_coef": 0.1, "dual_clip": 2.0}
    loss, stats = ppo_loss(**padded, **settings, mask=mask.int())
    expected, expected_stats = ppo_loss(**kept, **settings)
    assert_close(loss, expected)
    assert_close(stats, expected_stats)
    for name in ("logprobs", "values", "entropy"):
        (gradient,) = torch.autograd.grad(loss, padded[name], retain_graph=True)
        assert_close(gradient[mask], torch.autograd.grad(expected, kept[name], retain_graph=True)[0])
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0)])
def test_no_actions_are_no_loss(normalizer: Any) -> None:
    given = {name: torch.full((2, 3), NAN, requires_grad=True) for name in tokens(2, 3)}
    loss, stats = ppo_loss(**given, mask=torch.zeros(2, 3), normalizer=normalizer, entropy_coef=0.1)
    assert loss == 0 and all(x == 0 for x in stats.values())
    for name in ("logprobs", "values", "entropy"):
        assert (torch.autograd.grad(loss, given[name], retain_graph=True)[0] == 0).all()


def test_micro_batches_add_up() -> None:
    given = tokens(100)
    whole, stats = ppo_loss(**given, entropy_coef=0.1)
    parts = [
        ppo_loss(**{name: x[rows] for name, x in given.items()}, entropy_coef=0.1, normalizer=100)
        for rows in (slice(0, 30), slice(30, 100))
    ]
    assert_close(sum(loss for loss, _ in parts), whole)
    for name in ("pg_loss", "vf_loss"):
        assert_close(sum(part[name] for _, part in parts), stats[name])


def test_without_entropy_its_term_is_zero() -> None:
    given = tokens(9)
    entropy = given.pop("entropy")
    loss, stats = ppo_loss(**given, entropy_coef=5.0)
    assert_close(loss, ppo_loss(**given, entropy=entropy)[0])
    assert stats["entropy"] == 0


def test_equal_policies_have_ratio_one() -> None:
    given = tokens(20) | {"old_logprobs": tokens(20)["logprobs"]}
    _, stats = ppo_loss(**given)
    zero = {name: stats[name].item() for name in ("approx_kl", "approx_kl_k3", "clipfrac")}
    assert zero == dict.fromkeys(zero, 0.0) and stats["ratio_mean"] == stats["ratio_max"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_is_computed_in_float32(dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) for name, x in tokens(500).items()}
    loss, stats = ppo_loss(**given, entropy_coef=0.1)
    exact, exact_stats = ppo_loss(**{name: x.double() for name, x in given.items()}, entropy_coef=0.1)
    assert loss.dtype == torch.float32 and all(x.dtype == torch.float32 for x in stats.values())
    assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert_close({k: x.double() for k, x in stats.items()}, exact_stats, rtol=1e-5, atol=1e-5)


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("sentence", "mistake"),
    [
        ("returns of the shape of logprobs", lambda: ppo_loss(X, X, X, X, X, X[:2])),
        ("old_values of the shape of logprobs", lambda: ppo_loss(X, X, X, X, X[:2], X)),
        ("mask of the shape of logprobs", lambda: ppo_loss(X, X, X, X, X, X, mask=X[None])),
        ("entropy of the shape of logprobs", lambda: ppo_loss(X, X, X, X, X, X, entropy=X[:1])),
        (r"clip_low in \[0, 1\], got -1", lambda: ppo_loss(X, X, X, X, X, X, clip_low=-1)),
        (r"clip_high in \[0, inf\], got -1", lambda: ppo_loss(X, X, X, X, X, X, clip_high=-1)),
        (r"value_clip in \[0, inf\], got -1", lambda: ppo_loss(X, X, X, X, X, X, value_clip=-1)),
        (r"dual_clip in \[1, inf\], got 0.9", lambda: ppo_loss(X, X, X, X, X, X, dual_clip=0.9)),
    ],
)
def test_mistakes_end_in_one_sentence(sentence: str, mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"expected {sentence}"):
        mistake()
