"""The PPO loss against a loop over tokens that reads like the paper, and what masks, clips and counts do to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead.kernels import _C, ppo_loss

NAN = float("nan")
LEARNED = ("logprobs", "values", "entropy")
FUSED = ["cpu", "triton"]
KEYS = "pg_loss vf_loss entropy approx_kl approx_kl_k3 ref_kl clipfrac vf_clipfrac ratio_mean ratio_max".split()
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clips": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "value_clip": 0.05},
    "coefficients": {"value_coef": 0.1, "entropy_coef": 0.3, "normalizer": 11},
    "no value clip": {"value_clip": None, "normalizer": torch.tensor(3)},
}


@pytest.fixture(autouse=True)
def few_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than the Triton backend adds at a time."""
    if "triton" in request.node.name:
        monkeypatch.setattr(import_module("twinhead.kernels.ppo.gpu"), "PARTS", 2)


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
            errors.append((min(max(value, old_value - value_clip), old_value + value_clip) - target) ** 2)
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


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_against_the_loop(rows: int, settings: dict[str, Any], backend: str) -> None:
    given = tokens(rows)
    loss, stats = ppo_loss(**given, **settings)
    expected, expected_stats = loop(given, **settings)
    assert_close(loss.item(), expected)
    assert list(stats) == KEYS
    assert all(x.shape == () and not x.requires_grad for x in stats.values())
    assert_close({name: x.item() for name, x in stats.items()}, {name: expected_stats[name] for name in KEYS})


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients(settings: dict[str, Any], backend: str) -> None:
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
def test_what_the_mask_leaves_out_may_hold_anything(poison: float, backend: str) -> None:
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
def test_no_actions_are_no_loss(normalizer: Any, backend: str) -> None:
    given = {name: torch.full((2, 3), NAN, requires_grad=True) for name in tokens(2, 3)}
    loss, stats = ppo_loss(**given, mask=torch.zeros(2, 3), normalizer=normalizer, entropy_coef=0.1)
    assert loss == 0 and all(x == 0 for x in stats.values())
    for name in ("logprobs", "values", "entropy"):
        assert (torch.autograd.grad(loss, given[name], retain_graph=True)[0] == 0).all()


@pytest.mark.parametrize("normalizer", [0, torch.tensor(0)])
def test_a_normalizer_is_at_least_one(normalizer: Any, backend: str) -> None:
    given = tokens(9)
    assert_close(ppo_loss(**given, normalizer=normalizer), ppo_loss(**given, normalizer=1))


def test_micro_batches_add_up(backend: str) -> None:
    given = tokens(100)
    whole, stats = ppo_loss(**given, entropy_coef=0.1)
    parts = [
        ppo_loss(**{name: x[rows] for name, x in given.items()}, entropy_coef=0.1, normalizer=100)
        for rows in (slice(0, 30), slice(30, 100))
    ]
    assert_close(sum(loss for loss, _ in parts), whole)
    for name in ("pg_loss", "vf_loss"):
        assert_close(sum(part[name] for _, part in parts), stats[name])


def test_without_entropy_its_term_is_zero(backend: str) -> None:
    given = tokens(9)
    entropy = given.pop("entropy")
    loss, stats = ppo_loss(**given, entropy_coef=5.0)
    assert_close(loss, ppo_loss(**given, entropy=entropy)[0])
    assert stats["entropy"] == 0


def test_equal_policies_have_ratio_one(backend: str) -> None:
    given = tokens(20) | {"old_logprobs": tokens(20)["logprobs"]}
    _, stats = ppo_loss(**given)
    zero = {name: stats[name].item() for name in ("approx_kl", "approx_kl_k3", "clipfrac")}
    assert zero == dict.fromkeys(zero, 0.0) and stats["ratio_mean"] == stats["ratio_max"] == 1


def losses(given: dict[str, Tensor], backend: str, **settings: Any) -> tuple[Tensor, ...]:
    """The loss, its statistics, and its gradients, each divided by its largest entry."""
    given = {name: x.clone().requires_grad_() for name, x in given.items()}
    loss, stats = ppo_loss(**given, **settings, backend=backend)
    gradients = torch.autograd.grad(loss, [given[name] for name in LEARNED])
    assert all(gradient.dtype == given["logprobs"].dtype for gradient in gradients)
    return loss.detach(), torch.stack(list(stats.values())), *(g / g.abs().amax() for g in gradients)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_is_computed_in_float32(dtype: torch.dtype, masked: bool, backend: str) -> None:
    rows = 1500 if backend == "triton" else 20_000
    given = {name: x.to(dtype) for name, x in tokens(rows, extreme=False).items()}
    mask = torch.rand(given["values"].shape) < 0.7 if masked else None
    settings: dict[str, Any] = {"entropy_coef": 0.1, "dual_clip": 1.25, "mask": mask}
    found, plain = losses(given, backend, **settings), losses(given, "torch", **settings)
    exact = losses({name: x.double() for name, x in given.items()}, "torch", **settings)
    assert found[0].dtype == found[1].dtype == torch.float32
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert (ours - truth).abs().amax() <= 2 * (theirs - truth).abs().amax() + 1e-6


def test_views_are_read_where_they_lie(backend: str) -> None:
    given = tokens(6, 8)
    strided = {name: torch.full((8, 6, 2), NAN, dtype=x.dtype)[..., 1].t().copy_(x) for name, x in given.items()}
    mask = torch.zeros(6, 16)[:, ::2].copy_(torch.rand(6, 8) < 0.5)
    found = losses(strided, backend, mask=mask, entropy_coef=0.1)
    assert_close(found, losses(given, "torch", mask=mask.contiguous(), entropy_coef=0.1))


def test_only_what_learns_gets_a_gradient(backend: str) -> None:
    whole = tokens(50)
    full = losses(whole, backend, entropy_coef=0.1)
    for place, name in enumerate(LEARNED):
        given = {**whole, name: whole[name].clone().requires_grad_()}
        loss, _ = ppo_loss(**given, entropy_coef=0.1)
        (gradient,) = torch.autograd.grad(3 * loss, given[name], retain_graph=True)
        assert_close(gradient / gradient.abs().amax(), full[2 + place])
        assert torch.equal(torch.autograd.grad(3 * loss, given[name])[0], gradient)
    with torch.no_grad():
        loss, stats = ppo_loss(**given, entropy_coef=0.1)
    assert not loss.requires_grad
    assert_close((loss, torch.stack(list(stats.values()))), full[:2])


def test_a_value_near_the_old_one_is_not_clipped(backend: str) -> None:
    given = {name: x.float() for name, x in tokens(1000).items()}
    given["old_values"] = given["values"] + 0.1 * torch.rand(1000)
    assert ppo_loss(**given)[1]["vf_clipfrac"] == 0


@pytest.mark.parametrize("word", [-math.inf, math.inf, NAN, 1e4])
def test_actions_beyond_all_limits(word: float, backend: str) -> None:
    given = {name: x.float() for name, x in tokens(9).items()}
    given["logprobs"][2] = word
    settings: dict[str, Any] = {"entropy_coef": 0.1, "dual_clip": 2.0}
    loss, stats = ppo_loss(**given, **settings)
    expected, expected_stats = ppo_loss(**given, **settings, backend="torch")
    assert_close(loss, expected, equal_nan=True)
    assert_close(stats, expected_stats, equal_nan=True)
    assert loss.isfinite() != math.isnan(word) and stats["ratio_max"].isfinite() != math.isnan(word)


def test_expanded_inputs_and_slopes(backend: str) -> None:
    """What stands for many numbers in one place: inputs of stride 0, and a slope of stride 0."""
    given = {name: x[:, :1].expand(4, 5) for name, x in tokens(4, 5).items()}
    gradients = {}
    for name in (backend, "torch"):
        learned = {key: given[key].clone().expand(4, 5).requires_grad_() for key in LEARNED}
        loss, _ = ppo_loss(**{**given, **learned}, entropy_coef=0.1, backend=name)
        gradients[name] = torch.autograd.grad(loss.expand(3).sum(), list(learned.values()))
    assert_close(gradients[backend], gradients["torch"])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_dtypes_mix_and_contexts_do_not_matter(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    given = tokens(20)
    for place, name in enumerate(given):
        given[name] = given[name].to(dtypes[place % 2]).requires_grad_(name in LEARNED)
    expected, expected_stats = ppo_loss(**given, backend="torch")
    assert expected.dtype == dtypes[1]
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            loss, stats = ppo_loss(**given)
        assert loss.requires_grad != isinstance(context, torch.inference_mode)
        assert_close(loss, expected)
        assert_close(stats, expected_stats)
        if loss.requires_grad:
            found, exact = (torch.autograd.grad(x, given["logprobs"], retain_graph=True)[0] for x in (loss, expected))
            assert found.dtype == dtypes[0]
            assert_close(found, exact)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_launches_go_where_the_tensors_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x.device) or guard(x))
    ppo_loss(**tokens(3))
    assert asked == [X.device]


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_a_second_derivative_is_refused(backend: str) -> None:
    given = {name: x.requires_grad_() for name, x in tokens(9).items()}
    loss, _ = ppo_loss(**given)
    with pytest.raises(RuntimeError, match="ppo_loss can be differentiated once"):
        torch.autograd.grad(loss, given["logprobs"], create_graph=True)


@pytest.mark.parametrize("backend", FUSED, indirect=True)
@pytest.mark.parametrize("masked", [False, True])
def test_torch_knows_the_operator(masked: bool, backend: str) -> None:
    given = {name: x.requires_grad_() for name, x in tokens(5, 4).items()}
    clips, coefficients = (0.2, 0.3, 2.0, math.inf), (0.5, 0.1)
    mask, counted = (torch.rand(5, 4) < 0.5, torch.tensor(7)) if masked else (None, None)
    operator = getattr(torch.ops.twinhead, f"ppo_loss_{backend}").default
    ppo_loss(**given)  # loads the backend
    torch.library.opcheck(operator, (*given.values(), mask, counted, 0, [*clips, *coefficients], True))


def test_it_compiles_as_a_whole() -> None:
    given = {name: x.requires_grad_() for name, x in tokens(5, 4).items()}
    mask = torch.rand(5, 4) < 0.5

    def loss(given: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        given = {**given, "logprobs": given["logprobs"] * 1}
        return ppo_loss(**given, mask=mask, entropy_coef=0.1, normalizer=mask.sum())

    compiled, eager = torch.compile(loss, fullgraph=True)(given, mask), loss(given, mask)
    assert_close(compiled, eager)
    learned = [given[name] for name in LEARNED]
    assert_close(torch.autograd.grad(compiled[0], learned), torch.autograd.grad(eager[0], learned))


def test_the_number_of_threads_does_not_matter() -> None:
    given = {name: x.float() for name, x in tokens(150_000).items()}
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(losses(given, "cpu", entropy_coef=0.1))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_the_extension_checks_what_it_is_given() -> None:
    sizes = dict.fromkeys(["logprobs", "old_logprobs", "advantages", "values", "old_values", "returns"], 5)
    sizes |= {"entropy": 5, "mask": 5, "loss": 1, "statistics": len(KEYS), "slopes": 15}
    settings = dict.fromkeys(["clip_low", "clip_high", "dual_clip", "value_clip", "value_coef", "entropy_coef"], 1.0)

    def call(**changes: Any) -> None:
        arrays = {name: np.zeros(size, dtype=bool if name == "mask" else float) for name, size in sizes.items()}
        _C.ppo_loss(**{**arrays, **settings, "divisor": 0.0, "threads": 1, **changes})

    call()
    call(entropy=None, mask=None, slopes=None)
    for name, size in sizes.items():
        if name != "logprobs":
            wrong = np.zeros(size + 1, dtype=bool if name == "mask" else float)
            with pytest.raises(ValueError, match=f"expected {name} of length {size}, got {size + 1}"):
                call(**{name: wrong})
    with pytest.raises(ValueError, match="expected slopes of length 10, got 15"):
        call(entropy=None)
    with pytest.raises(ValueError, match="expected divisor >= 0, got -1"):
        call(divisor=-1.0)
    with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
        call(threads=0)
    with pytest.raises(TypeError):
        call(slopes=np.zeros(15, dtype=np.float32))


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
