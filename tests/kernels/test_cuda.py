"""The PyTorch backends on a GPU, which multiplies half precision without widening it, against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from twinhead import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROWS, WORDS, WIDTH = 3000, 1000, 64


def ppo(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    old_logprobs = -7 + torch.linspace(-1, 1, ROWS, device=hidden.device)
    settings: dict[str, Any] = {"bias": bias, "entropy_coef": 0.1, "dual_clip": 2.0}
    settings |= {"ref_logprobs": old_logprobs, "kl_coef": 0.1, "backend": "torch"}
    return kernels.linear_ppo_loss(hidden, weight, targets, old_logprobs, old_logprobs.sin(), **settings)[0]


def logprob(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    settings = {"return_entropy": True, "temperature": 0.7, "softcap": 20.0, "backend": "torch"}
    logprobs, entropy = kernels.linear_logprob(hidden, weight, targets, bias, **settings)
    return (logprobs + 0.1 * entropy).mean()


def kl(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    return kernels.linear_kl(hidden, weight, hidden.flip(0), weight.flip(0), backend="torch").mean() + 0 * bias.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [ppo, logprob, kl])
def test_the_head(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape).to(dtype) / 4 for shape in ((ROWS, WIDTH), (WORDS, WIDTH), (WORDS,))]
    targets = torch.randint(WORDS, (ROWS,))

    def loss_and_gradients(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in given)
        loss = function(hidden, weight, targets.to(device), bias)
        return loss, *torch.autograd.grad(loss, (hidden, weight, bias))

    loss, *gradients = loss_and_gradients("cuda", dtype)
    expected, *expected_gradients = loss_and_gradients("cpu", torch.float64)
    assert loss.dtype == torch.float32
    assert_close(loss.double().cpu(), expected, rtol=1e-4, atol=1e-4)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert (found.double().cpu() - exact).norm() <= tolerance * exact.norm() + 1e-9


@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9, "temperature": 0.7}, {"min_p": 0.1}])
def test_sampling(filters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits, uniforms = 2 * torch.randn(512, 50257), torch.rand(512)
    logits[:, ::3] = -float("inf")
    tokens, logprobs = kernels.sample(logits.cuda(), uniforms.cuda(), backend="torch", **filters)
    expected = kernels.sample(logits, uniforms, backend="torch", **filters)
    agree = tokens.cpu() == expected[0]
    assert agree.float().mean() > 0.99, "a sum in another order may move a border past a uniform number, but rarely"
    assert_close(logprobs.cpu()[agree], expected[1][agree], rtol=1e-4, atol=1e-4)
    assert logits.gather(1, tokens.cpu()[:, None]).isfinite().all()


def test_advantages() -> None:
    rewards, values = torch.randn(1000), torch.randn(1000)
    cu_seqlens = torch.tensor([0, 300, 300, 1000], dtype=torch.int32)
    found = kernels.gae(rewards.cuda(), values.cuda(), cu_seqlens=cu_seqlens.cuda(), backend="torch")
    assert_close(tuple(x.cpu() for x in found), kernels.gae(rewards, values, cu_seqlens=cu_seqlens))
