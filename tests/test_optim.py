"""The optimizer: schedules, clipping, what a non-finite gradient does, and a state that resumes bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import cos, inf, nan, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import peers
from twinhead.engine import checkpoint
from twinhead.engine.config import RunConfig
from twinhead.engine.optim import Optimizer, learning_rate


def config(**options: Any) -> RunConfig:
    return RunConfig(output_dir="runs/test", **{"learning_rate": 0.1} | options)


def rates(total: int, **options: Any) -> list[float]:
    return [learning_rate(config(learning_rate=1.0, **options), step, total) for step in range(total)]


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def push(module: nn.Module, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Give every parameter a random gradient."""
    noise = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = scale * torch.randn(p.shape, generator=noise)
    return [p.grad for p in module.parameters()]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_a_constant_schedule_is_constant() -> None:
    assert rates(5) == [1.0] * 5


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert rates(10, warmup_ratio=0.4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)
    assert rates(4, warmup_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_linear_decay_ends_one_step_above_zero() -> None:
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(6, schedule="linear", warmup_ratio=1 / 3) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_decay_ends_at_a_tenth_of_the_peak() -> None:
    found = rates(100, schedule="cosine")
    assert found == pytest.approx([0.1 + 0.45 * (1 + cos(pi * step / 100)) for step in range(100)])
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)
    assert found == sorted(found, reverse=True)
    warmed = rates(100, schedule="cosine", warmup_ratio=0.1)
    assert warmed[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert warmed[10:] == pytest.approx([0.1 + 0.45 * (1 + cos(pi * step / 90)) for step in range(90)])


def test_every_step_uses_the_rate_of_the_schedule() -> None:
    module = layer()
    optimizer = Optimizer(module, config(schedule="linear", warmup_ratio=0.5, max_grad_norm=0.0), 4)
    applied = []
    for _ in range(4):
        before, rate = weights(module), optimizer.learning_rate
        for p in module.parameters():
            p.grad = torch.ones_like(p)  # Adam then moves every weight by the learning rate
        assert optimizer.step()["learning_rate"] == rate
        applied.append((before[0] - module.weight).mean().item())
    assert applied == pytest.approx([0.05, 0.1, 0.1, 0.05], rel=1e-4)


# -- steps -------------------------------------------------------------------------------------------------------------


def adamw(value: Tensor, gradients: list[Tensor], *, rate: float, decay: float, eps: float) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, with betas 0.8 and 0.9."""
    value, m, v = value.double(), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.8 * m + 0.2 * g.double(), 0.9 * v + 0.1 * g.double() ** 2
        value = value - rate * decay * value - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + eps)
    return value


def test_a_step_is_adamw_and_decays_matrices_alone() -> None:
    module = layer()
    start, given = weights(module), []
    options = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-3, "max_grad_norm": 0.0}
    optimizer = Optimizer(module, config(**options), 3)
    for seed in range(3):
        given.append([g.clone() for g in push(module, seed)])
        optimizer.step()
    for i, (p, decay) in enumerate(zip(module.parameters(), (0.3, 0.0), strict=True)):
        expected = adamw(start[i], [g[i] for g in given], rate=0.1, decay=decay, eps=1e-3)
        torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("limit", "clipped"), [(1.0, True), (1e6, False), (0.0, False)])
def test_gradients_are_clipped_to_the_global_norm(limit: float, clipped: bool) -> None:
    module = layer()
    gradients = torch.cat([g.flatten() for g in push(module, scale=10.0)])
    norm = gradients.norm().item()
    assert norm > 10
    optimizer = Optimizer(module, config(max_grad_norm=limit), 1)
    assert optimizer.step()["grad_norm"] == pytest.approx(norm)
    tensors, _ = optimizer.state()
    used = 10 * torch.cat([tensors[f"{name}.exp_avg"].flatten() for name in ("weight", "bias")])  # of 0.1 * gradient
    torch.testing.assert_close(used, gradients / norm if clipped else gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_gradient_that_is_not_finite_updates_nothing_and_is_counted(bad: float) -> None:
    module = layer()
    optimizer = Optimizer(module, config(schedule="linear"), 4)
    push(module)
    optimizer.step()
    before = weights(module), {name: tensor.clone() for name, tensor in optimizer.state()[0].items()}
    push(module, seed=1)
    module.bias.grad[1] = bad
    found = optimizer.step()
    assert all(map(torch.equal, weights(module), before[0]))
    tensors, counters = optimizer.state()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())
    assert counters == {"num_steps": 2, "skipped": 1}
    assert found["skipped_updates"] == 1.0
    assert all(p.grad is None for p in module.parameters())
    push(module, seed=2)
    found = optimizer.step()
    assert (found["learning_rate"], found["skipped_updates"]) == (0.05, 0.0)
    assert not torch.equal(module.weight, before[0][0])
    assert all(p.isfinite().all() for p in module.parameters())
    assert optimizer.skipped == 1


def test_gradients_are_cleared_after_a_step() -> None:
    module = layer()
    push(module)
    Optimizer(module, config(), 1).step()
    assert [p.grad for p in module.parameters()] == [None, None]


def test_parts_of_a_model_may_learn_faster() -> None:
    module = nn.ModuleDict({"trunk": layer(), "value_head": layer()})
    optimizer = Optimizer(module, config(max_grad_norm=0.0), 1, scales={"value_head.": 5.0})
    before = weights(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    assert optimizer.step()["learning_rate"] == 0.1
    moved = [(b - p).mean().item() for b, p in zip(before, module.parameters(), strict=True)]
    assert moved == pytest.approx([0.1, 0.1, 0.5, 0.5], rel=1e-4)


def test_frozen_parameters_stay_and_something_must_train() -> None:
    module = layer()
    module.weight.requires_grad_(False)
    optimizer, before = Optimizer(module, config(weight_decay=0.5), 1), weights(module)
    assert list(optimizer.parameters) == ["bias"]
    module.bias.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(module.weight, before[0])
    assert not torch.equal(module.bias, before[1])
    with pytest.raises(ValueError, match="expected at least one trainable parameter, got none"):
        Optimizer(module.requires_grad_(False), config(), 1)


# -- resuming ----------------------------------------------------------------------------------------------------------


def run(module: nn.Module, optimizer: Optimizer, seeds: range) -> list[dict[str, float]]:
    found = []
    for seed in seeds:
        push(module, seed)
        if seed == 2:
            module.weight.grad[0, 0] = nan
        found.append(optimizer.step())
    return found


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_a_state_that_went_through_a_file_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    settings = config(schedule="cosine", warmup_ratio=0.3, weight_decay=0.1)
    straight = layer()
    whole = run(straight, Optimizer(straight, settings, 8), range(8))

    first = layer()
    optimizer = Optimizer(first, settings, 8)
    begun = run(first, optimizer, range(stop))
    tensors, counters = optimizer.state()
    save_file(tensors, tmp_path / "state.safetensors")
    second = layer()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, settings, 8)
    resumed.restore(load_file(tmp_path / "state.safetensors"), counters)
    assert begun + run(second, resumed, range(stop, 8)) == whole
    assert all(map(torch.equal, weights(second), weights(straight)))
    assert resumed.skipped == 1


def test_the_state_of_another_model_is_refused() -> None:
    module = nn.Linear(3, 2)
    optimizer = Optimizer(module, config(), 1)
    push(module)
    optimizer.step()
    other = Optimizer(nn.ModuleDict({"head": layer()}), config(), 1)
    with pytest.raises(
        ValueError, match=r"optimizer state: expected every parameter of this model, but 'head\.weight' is missing"
    ):
        other.restore(*optimizer.state())


# -- states in 8 bits --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchao() -> None:
    """The package among the peers: `make peers` puts it there."""
    try:
        peers.load(peers.TORCHAO, "torchao.optim")
    except peers.Missing as missing:
        pytest.skip(f"torchao {missing}")


@pytest.fixture
def eagerly(torchao: None) -> Iterator[None]:
    """Without torchao's compiler, which takes a second for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wide() -> nn.Linear:
    """A matrix of 5120 numbers, which gets 8 bits, and a vector, which does not."""
    torch.manual_seed(0)
    return nn.Linear(64, 80)


def quantized(value: Tensor, signed: bool) -> Tensor:
    """The nearest of the 256 numbers that Dettmers et al. 2022 (section 2.2) choose, times the largest of its block."""
    from torchao.optim.quant_utils import create_dynamic_map

    blocks = value.reshape(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)
    numbers = torch.tensor(create_dynamic_map(signed=signed))
    nearest = (blocks / scale.clamp(min=1e-12))[..., None].sub(numbers).abs().argmin(-1)
    return (numbers[nearest] * scale).view(value.shape)


@pytest.mark.usefixtures("torchao")
def test_8_bits_follow_adamw_with_rounded_moments() -> None:
    """Compiled, as a user gets it."""
    module = wide()
    start, m, v, expected = weights(module)[0], 0.0, 0.0, weights(module)[0]
    optimizer = Optimizer(module, config(adam_bits=8, weight_decay=0.3, adam_eps=1e-3, max_grad_norm=0.0), 3)
    for t in range(1, 4):
        gradient = push(module, t)[0].clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-3)
        expected = expected - 0.1 * 0.3 * expected - 0.1 * step
        m, v = quantized(m, True), quantized(v, False)
    error = (module.weight - expected).norm() / (expected - start).norm()
    assert error < 1e-3  # a number between two codes may fall to either
    plain = wide()
    exact = Optimizer(plain, config(weight_decay=0.3, adam_eps=1e-3, max_grad_norm=0.0), 3)
    for t in range(1, 4):
        push(plain, t)
        exact.step()
    rounding = (module.weight - plain.weight).norm() / (plain.weight - start).norm()
    assert 10 * error < rounding < 0.1
    torch.testing.assert_close(module.bias, plain.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("eagerly")
def test_8_bits_take_a_quarter_of_the_memory() -> None:
    module, sizes = nn.Linear(1024, 64, bias=False), []
    for bits in (32, 8):
        optimizer = Optimizer(module, config(adam_bits=bits), 1)
        push(module)
        optimizer.step()
        sizes.append(sum(t.numel() * t.element_size() for t in optimizer.state()[0].values()))
    assert sizes[1] / sizes[0] == pytest.approx(1 / 4 + 1 / 256, rel=1e-3)


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_8_bits_resume_bit_for_bit(stop: int, tmp_path: Path) -> None:
    settings = config(schedule="cosine", warmup_ratio=0.3, weight_decay=0.1, adam_bits=8)
    straight = wide()
    whole = run(straight, expected := Optimizer(straight, settings, 8), range(8))

    first = wide()
    optimizer = Optimizer(first, settings, 8)
    begun = run(first, optimizer, range(stop))
    tensors, counters = optimizer.state()
    assert {t.dtype for t in tensors.values()} <= {torch.uint8, torch.float32}
    checkpoint.save_state(tmp_path, tensors, counters)
    second = wide()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, settings, 8)
    resumed.restore(*checkpoint.load_state(tmp_path))
    assert begun + run(second, resumed, range(stop, 8)) == whole
    assert all(map(torch.equal, weights(second), weights(straight)))
    theirs = expected.state()[0]
    assert {name: t.tolist() for name, t in resumed.state()[0].items()} == {n: t.tolist() for n, t in theirs.items()}


@pytest.mark.usefixtures("eagerly")
def test_the_state_of_other_bits_or_another_shape_is_refused() -> None:
    states, module = {}, wide()
    for bits in (8, 32):
        optimizer = Optimizer(module, config(adam_bits=bits), 1)
        push(module)
        optimizer.step()
        states[bits] = optimizer.state()
    sentence = (
        "optimizer state: expected of weight step, exp_avg:codes, exp_avg:scale, exp_avg_sq:codes, .*, got step, exp"
    )
    with pytest.raises(ValueError, match=sentence):
        Optimizer(module, config(adam_bits=8), 1).restore(*states[32])
    with pytest.raises(
        ValueError, match="optimizer state: expected of weight step, exp_avg, exp_avg_sq, got step, exp_a"
    ):
        Optimizer(module, config(), 1).restore(*states[8])
    with pytest.raises(ValueError, match=r"optimizer state: expected weight of shape \(80, 32\), got \(80, 64\)"):
        Optimizer(nn.Linear(32, 80), config(), 1).restore(*states[32])
    tensors, counters = states[8]
    with pytest.raises(ValueError, match=r"optimizer state: expected weight of shape \(20,\), got \(2,\)"):
        Optimizer(module, config(adam_bits=8), 1).restore(tensors | {"weight.exp_avg:scale": torch.ones(2)}, counters)


def test_8_bits_need_torchao_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="adam_bits: expected 8 or 32, got 4"):
        config(adam_bits=4)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao.optim", None)
        with pytest.raises(
            ValueError, match=r"adam_bits: 8 expects torchao, got none \(pip install 'twinhead\[lowbit\]'\)"
        ):
            Optimizer(wide(), config(adam_bits=8), 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"adam_bits: expected a C\+\+ compiler .* for 8 bits on a CPU, got none"):
        Optimizer(wide(), config(adam_bits=8), 1)


def test_what_no_gradient_has_reached_yet_has_no_state_to_resume() -> None:
    """As after a checkpoint in a critic's warm-up."""
    module, again = (nn.ModuleDict({"model": layer(), "network": layer()}) for _ in range(2))
    optimizer, resumed = (Optimizer(m, config(), 4) for m in (module, again))
    push(module["network"])
    optimizer.step()
    tensors, counters = optimizer.state()
    assert {name.split(".")[0] for name in tensors} == {"network"}
    resumed.restore(tensors, counters)
    assert resumed.state()[1] == counters
    torn = {name: tensor for name, tensor in tensors.items() if "bias" not in name}
    with pytest.raises(
        ValueError, match=r"^optimizer state: expected every parameter of this model, but .* is missing$"
    ):
        resumed.restore(torn, counters)
