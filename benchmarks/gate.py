"""The gate before every clock: an answer is checked against float64, value by value and gradient by gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import CHUNK, Case, Problem
from benchmarks.contender import Call, Outputs
from benchmarks.logits import filtered
from benchmarks.providers import eager

# Largest error by largest value. Half precision: every contender may round its logits to 8 bits once.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}

Answer = tuple[Outputs, tuple[Tensor, ...]]  # outputs, and the gradients of what learns


def asked(call: Call, problem: Problem) -> Callable[[], Answer]:
    """What is timed: the outputs and, where something learns, its gradients; otherwise nothing records a graph."""
    leaves = call.leaves or tuple(problem[name] for name in problem.learn)

    def run() -> Answer:
        with torch.set_grad_enabled(bool(leaves)):
            outputs = call.run()
        if not leaves:
            return outputs, ()
        given = [x for x in outputs if x is not None]
        weights = problem.cotangents or (None,) * len(given)
        cotangents = [c if c is None else c.to(x.dtype) for c, x in zip(weights, given, strict=True)]
        return outputs, torch.autograd.grad(given, leaves, cotangents)

    return run


def exact(case: Case, problem: Problem) -> Answer:
    """The answer of the definition in float64; chunk by chunk where rows do not know each other."""
    if case.op == "sample":
        settings = problem.settings
        return (filtered(problem["logits"].double(), **settings).log_softmax(-1),), ()
    if not case.by_rows:
        return _definition(case, problem.double())
    rows = next(len(tensor) for name, tensor in problem.tensors.items() if name not in problem.shared)
    answers = [_definition(case, problem.double(slice(at, at + CHUNK))) for at in range(0, rows, CHUNK)]
    outputs = tuple(_joined(parts) for parts in zip(*(outputs for outputs, _ in answers), strict=True))
    gradients = tuple(
        _added(parts) if name in problem.shared else torch.cat(parts)
        for name, parts in zip(problem.learn, zip(*(gradients for _, gradients in answers), strict=True), strict=True)
    )
    return outputs, gradients


def error(case: Case, problem: Problem, call: Call, found: Answer, expected: Answer) -> float:
    """The largest error of any output or gradient by its largest value (a loss: by 1); infinite where not finite."""
    outputs, gradients = call.read(found[0]), found[1]
    if case.op == "sample":
        tokens, logprobs = outputs
        assert tokens is not None and logprobs is not None and expected[0][0] is not None, "sample gives both"
        return _distance(logprobs, expected[0][0].gather(1, tokens[:, None]).squeeze(1))
    pairs = [*zip(outputs, expected[0], strict=True), *zip(gradients, expected[1], strict=True)]
    return max(_distance(a, b) for a, b in pairs if a is not None and b is not None)


def tolerance(problem: Problem) -> float:
    """How far an answer may be from the exact one: by the dtype of the tensors."""
    return TOLERANCES[next(x.dtype for x in problem.tensors.values() if x.is_floating_point())]


def _definition(case: Case, problem: Problem) -> Answer:
    call = eager(case.op)(problem)
    outputs, gradients = asked(call, problem)()
    return tuple(None if x is None else x.detach() for x in call.read(outputs)), gradients


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Rows one after the other; a loss is a sum over rows."""
    return torch.cat(parts) if parts[0].ndim else _added(parts)


def _added(parts: tuple[Tensor, ...]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    worst, size = 0.0, 0.0 if found.ndim else 1.0  # a loss is a mean of terms of size 1, which may cancel
    for a, b in zip(found.detach().reshape(-1).split(1 << 24), expected.reshape(-1).split(1 << 24), strict=True):
        if len(a):
            worst = max(worst, float((a.double() - b).abs().nan_to_num(math.inf, math.inf).max()))
            size = max(size, float(b.abs().max()))
    return worst / size if size else worst
