"""The kernels on a GPU, on problems like the benchmark's: right, without a sync, in a CUDA graph, beyond 2^31 logits.

The oracle is the definition in float64. Without a GPU the first test can be rehearsed on tiny shapes, on the CPU:
TRITON_INTERPRET=1 pytest tests/kernels/test_cuda.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import cases, gate
from benchmarks.cases import Case, Problem
from benchmarks.contender import EAGER, OURS
from benchmarks.providers import providers
from tests.kernels.interpreter import INTERPRETED
from twinhead import kernels

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = (8, 50, 8, 16, 8, 8) if INTERPRETED else (1000, 50257, 3000, 256, 64, 64)
DTYPES = (torch.bfloat16,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
CASES = {f"{case.op}, {case.title}": case for dtype in DTYPES for case in cases.every_operation(*SHAPES, dtype)}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

FAR = (14_200, 151_936)  # more than 2^31 logits
LAST = slice(-3, None)


def prepared(case: Case, name: str) -> tuple[Problem, Callable[[], gate.Answer]]:
    """The problem, and what answers it: a provider's outputs and gradients."""
    problem = case.problem(DEVICE)
    return problem, gate.asked(providers(case.op)[name](problem), problem)


def error(case: Case, name: str) -> float:
    problem, run = prepared(case, name)
    return gate.error(case, problem, providers(case.op)[name](problem), run(), gate.exact(case, problem))


@pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", pytest.param("torch", marks=needs_cuda)])
@each_case
def test_at_most_twice_as_far_from_the_truth_as_torch(case: Case, backend: str) -> None:
    assert error(case, OURS[backend]) <= 2 * error(case, EAGER) + 1e-6


@needs_cuda
@each_case
def test_the_host_never_waits(case: Case) -> None:
    _, run = prepared(case, OURS["triton"])
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_case
def test_a_cuda_graph_follows_its_inputs(case: Case) -> None:
    problem, run = prepared(case, OURS["triton"])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in problem.tensors.values():
            if tensor.is_floating_point() and tensor.ndim:
                tensor.copy_(tensor.flip(0))
    graph.replay()
    assert_close(captured, run(), rtol=0, atol=0)


@needs_cuda
def test_logits_beyond_2_to_the_31() -> None:
    """The last rows of a batch are what they are alone: log-probs, entropy, their gradient, and what is drawn."""

    def measured(logits: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = kernels.selective_log_softmax_and_entropy(logits.requires_grad_(), index)
        (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
        drawn = kernels.sample(logits.detach(), torch.full_like(entropy, 0.5))
        return tuple(x[LAST] for x in (logprobs, entropy, gradient, *drawn))

    logits, index = torch.empty(FAR, dtype=torch.bfloat16, device=DEVICE).normal_(), torch.arange(FAR[0], device=DEVICE)
    alone = measured(logits[LAST].clone(), index[LAST])
    assert_close(measured(logits, index), alone, rtol=0, atol=0)


@needs_cuda
def test_two_heads_beyond_2_to_the_31() -> None:
    logits = torch.empty(FAR, dtype=torch.bfloat16, device=DEVICE).normal_()
    found = kernels.full_kl(logits, logits.roll(1, 1))
    assert_close(found[LAST], kernels.full_kl(logits[LAST], logits[LAST].roll(1, 1)), rtol=0, atol=0)
