"""Kullback-Leibler divergence between a policy and its reference: per-token estimates, or exact over the vocabulary.

    k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d        d = log policy(y) - log reference(y),  y sampled from the policy
    reverse = KL(policy || reference) = sum_v policy (log policy - log reference),  forward = KL(reference || policy)

k1 and k3 are unbiased for the reverse divergence, k2 is not. As loss terms they differ: in expectation the gradient of
k1 is 0, of k2 that of the reverse, of k3 that of the forward divergence. (J. Schulman, "Approximating KL divergence",
2020; gradients: arXiv 2510.01555.)
"""

from __future__ import annotations

from torch import Tensor

from twinhead.kernels._arguments import expect_choice, expect_like, expect_positive
from twinhead.kernels._dispatch import Backends
from twinhead.kernels._estimators import KINDS
from twinhead.kernels.kl import chunked

DIRECTIONS = ("reverse", "forward")

_ESTIMATE_BACKENDS = Backends(__name__, torch="reference")
_FULL_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="reference")
_LINEAR_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="eager")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """The estimate `kind` ("k1", "k2" or "k3") for every token, in nats.

    Two tensors of one shape -> the same shape, float32 or wider; differentiable to both. Only k3's exponent is limited,
    to 20: no value is clamped. Raises ValueError for another kind or different shapes.
    """
    expect_choice("kl_estimate", "kind", kind, KINDS)
    expect_like("kl_estimate", "logprobs", logprobs, ref_logprobs=ref_logprobs)
    return _ESTIMATE_BACKENDS.pick("kl_estimate", logprobs.device).kl_estimate(logprobs, ref_logprobs, kind)


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "reverse",
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The exact divergence at every position, in nats: (..., V) twice -> (...), float32 or wider.

    Both logits are divided by `temperature`. A word of probability 0 in the distribution that is summed over adds 0,
    also where both logits are -inf; a word that only the other one excludes makes the divergence infinite.
    Differentiable to both. Raises ValueError for another direction than "reverse" or "forward", different shapes, or a
    temperature not > 0.
    """
    expect_choice("full_kl", "direction", direction, DIRECTIONS)
    expect_like("full_kl", "logits", logits, ref_logits=ref_logits)
    expect_positive("full_kl", temperature=temperature)
    implementation = _FULL_BACKENDS.pick("full_kl", logits.device, backend)
    return implementation.full_kl(logits, ref_logits, direction=direction, temperature=temperature)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    direction: str = "reverse",
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """full_kl of two heads' logits, which never exist as a whole.

    hidden (..., D) with weight (V, D), ref_hidden (..., E) with ref_weight (V, E) -> (...), float32 or wider.
    Differentiable once to all four; inputs that need no gradient cost none. Raises ValueError as full_kl does.
    """
    op = "linear_kl"
    expect_choice(op, "direction", direction, DIRECTIONS)
    expect_positive(op, temperature=temperature)
    for side, states, matrix in (("", hidden, weight), ("ref_", ref_hidden, ref_weight)):
        if states.ndim < 2 or matrix.ndim != 2 or states.shape[-1] != matrix.shape[1]:
            got = f"{tuple(states.shape)} and {tuple(matrix.shape)}"
            raise ValueError(f"{op}: expected {side}hidden (..., D) and {side}weight (V, D), got {got}")
    if hidden.shape[:-1] != ref_hidden.shape[:-1] or len(weight) != len(ref_weight):
        got = f"{tuple(hidden.shape)}, {len(weight)} words and {tuple(ref_hidden.shape)}, {len(ref_weight)} words"
        raise ValueError(f"{op}: expected two heads over the same rows and the same vocabulary, got {got}")
    kl = chunked.linear_kl(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        direction=direction,
        temperature=temperature,
        epilogue=_LINEAR_BACKENDS.pick(op, hidden.device, backend).__name__,
    )
    return kl.view(hidden.shape[:-1])
