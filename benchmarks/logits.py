"""Who computes what starts from logits: log-probabilities, entropy, exact divergence, and a drawn word."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.contender import (
    Call,
    Maker,
    Outputs,
    absent,
    call,
    expect_cuda,
    forced,
    ours_on,
    wide,
    with_compile,
)
from benchmarks.peers import LIGER, TRL, VERL
from twinhead import kernels


def selective_log_softmax() -> dict[str, Maker]:
    """logits (R, V), index (R,) -> log-probs (R,)."""

    def definition(logits: Tensor, index: Tensor) -> Outputs:
        return (logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1),)

    def ours(logits: Tensor, index: Tensor, backend: str) -> Outputs:
        with forced(backend):
            return (kernels.selective_log_softmax(logits, index),)

    def cross_entropy(logits: Tensor, index: Tensor) -> Outputs:
        return (-F.cross_entropy(logits, index, reduction="none"),)

    def trl(logits: Tensor, index: Tensor) -> Outputs:
        return (TRL.function("trl.trainer.utils", "selective_log_softmax")(logits, index),)

    def verl(logits: Tensor, index: Tensor) -> Outputs:
        function = VERL.function("verl.utils.torch_functional", "logprobs_from_logits")
        return (function(logits.unflatten(0, (8, -1)), index.unflatten(0, (8, -1))).flatten(),)

    def liger(problem: Problem) -> Call:
        expect_cuda(problem["logits"])
        function = LIGER.function("liger_kernel.ops", "LigerCrossEntropyFunction")
        # It writes the gradient over the logits, so it gets its own; only the first answer is that to the question.
        logits = problem["logits"].detach().clone().requires_grad_(bool(problem.learn))
        index = problem["index"]

        def run() -> Outputs:
            return (-function.apply(logits, index, None, -100, 0.0, 0.0, "none")[0],)

        return Call(run, leaves=(logits,) if problem.learn else ())

    return {
        **with_compile(definition),
        **ours_on(ours),
        "F.cross_entropy": call(cross_entropy),
        TRL.label: call(trl),
        VERL.label: call(verl),
        LIGER.label: liger,
    }


def selective_log_softmax_and_entropy() -> dict[str, Maker]:
    """logits (R, V), index (R,) -> log-probs and entropy (R,)."""

    def definition(logits: Tensor, index: Tensor) -> Outputs:
        logp = logits.log_softmax(-1)
        return logp.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)

    def ours(logits: Tensor, index: Tensor, backend: str) -> Outputs:
        with forced(backend):
            return kernels.selective_log_softmax_and_entropy(logits, index)

    def trl(logits: Tensor, index: Tensor) -> Outputs:
        return TRL.function("trl.trainer.utils", "selective_log_softmax_and_entropy")(logits, index)

    def verl(logits: Tensor, index: Tensor) -> Outputs:
        logprobs = VERL.function("verl.utils.torch_functional", "logprobs_from_logits")
        entropy = VERL.function("verl.utils.torch_functional", "entropy_from_logits")
        return logprobs(logits.unflatten(0, (8, -1)), index.unflatten(0, (8, -1))).flatten(), entropy(logits)

    return {
        **with_compile(definition),
        **ours_on(ours),
        TRL.label: call(trl),
        VERL.label: call(verl),
        LIGER.label: absent("its functions on logits give no entropy"),
    }


def full_kl() -> dict[str, Maker]:
    """logits and ref_logits (R, V) -> KL(policy || reference) (R,)."""

    def definition(logits: Tensor, ref_logits: Tensor) -> Outputs:
        logp, ref_logp = (wide(x).log_softmax(-1) for x in (logits, ref_logits))
        return ((logp.exp() * (logp - ref_logp)).sum(-1),)

    return {
        **with_compile(definition),
        **ours_on(lambda *tensors, backend: (kernels.full_kl(*tensors, backend=backend),)),
        TRL.label: absent("its divergence starts from hidden states: see linear_kl"),
        VERL.label: absent("kl_penalty('full') raises NotImplementedError"),
        LIGER.label: absent("its divergence starts from log-probabilities and sums over the tokens"),
    }


def sample() -> dict[str, Maker]:
    """logits (B, V), uniforms (B,) -> tokens and log-probs (B,)."""

    def definition(logits: Tensor, uniforms: Tensor, top_k: int = 0, top_p: float = 1.0) -> Outputs:
        p = filtered(logits, top_k, top_p).softmax(-1)  # (B, V)
        tokens = torch.searchsorted(p.cumsum(-1), uniforms[:, None], right=True).clamp(max=p.shape[1] - 1)
        return tokens.squeeze(1), p.gather(1, tokens).log().squeeze(1)

    def transformers(problem: Problem) -> Call:
        from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

        settings, logits = problem.settings, problem["logits"].float()
        warpers = [TopKLogitsWarper(settings["top_k"]), TopPLogitsWarper(settings["top_p"])] if settings else []

        def run() -> Outputs:
            kept = logits
            for warper in warpers:
                kept = warper(None, kept)
            tokens = torch.multinomial(kept.softmax(-1), 1)
            return tokens.squeeze(1), kept.log_softmax(-1).gather(1, tokens).squeeze(1)

        return Call(run)

    return {
        **with_compile(definition, settings=True),
        **ours_on(kernels.sample, settings=True),
        "transformers": transformers,
    }


def filtered(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits, float32 or wider, with -inf outside the top k words, then outside the shortest prefix of mass top_p."""
    logits = wide(logits)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        dropped = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
