"""Who computes what starts from hidden states: log-probabilities, the PPO loss, the divergence of two heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    ours_on,
    wide,
    with_compile,
)
from benchmarks.peers import CCE, LIGER, TRL, VERL, Missing, load
from benchmarks.tokens import CLIP, clipped
from twinhead import kernels


def linear_logprob() -> dict[str, Maker]:
    """hidden (R, D), weight (V, D), targets (R,) -> log-probs (R,)."""

    def ours(*tensors: Tensor, backend: str) -> Outputs:
        logprobs = kernels.linear_logprob(*tensors, backend=backend)
        assert isinstance(logprobs, Tensor), "nobody asked for the entropy"
        return (logprobs,)

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        if not hasattr(F, "linear_cross_entropy"):
            raise Missing(f"torch {torch.__version__} does not have it yet")
        return (-F.linear_cross_entropy(hidden, weight, targets, reduction="none"),)

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        expect_cuda(hidden)
        function = LIGER.function("liger_kernel.ops", "LigerFusedLinearCrossEntropyFunction")
        return (-function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")[0],)

    def liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        function = LIGER.function("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
        return (-function.apply(hidden, weight, targets),)

    def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        function = CCE.function("cut_cross_entropy", "linear_cross_entropy")
        impl = "cce" if hidden.is_cuda else "torch_compile"  # what its documentation says for other devices
        return (-function(hidden, weight, targets, reduction="none", impl=impl),)

    return {
        **with_compile(_head),
        **ours_on(ours),
        "F.linear_cross_entropy": call(cross_entropy),
        TRL.label: call(_trl_head),
        VERL.label: call(_verl_head),
        LIGER.label: call(liger),
        f"{LIGER.label} scaled": call(liger_scaled),
        CCE.label: call(cce),
    }


def linear_ppo_loss() -> dict[str, Maker]:
    """The same and old_logprobs, advantages (R,), count () -> a loss."""

    def after(head: Callable[..., Outputs]) -> Callable[..., Outputs]:
        """The clipped loss on the log-probs of a head."""

        def loss(
            hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, count: Tensor
        ) -> Outputs:
            logprobs = head(hidden, weight, targets)[0]
            assert logprobs is not None, "a head gives log-probs"
            return (clipped(logprobs, old_logprobs, advantages).sum() / count,)

        return loss

    def ours(*tensors: Tensor, backend: str) -> Outputs:
        *given, count = tensors
        loss, _ = kernels.linear_ppo_loss(*given, normalizer=count, backend=backend)
        return (loss,)

    def liger(problem: Problem) -> Call:
        loss = LIGER.function("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
        function = loss(beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP)
        hidden, weight = problem["hidden"], problem["weight"]
        targets, old_logprobs = (problem[name].unflatten(0, (8, -1)) for name in ("targets", "old_logprobs"))
        advantages = problem["advantages"].unflatten(0, (8, -1))[:, 0].contiguous()
        mask = torch.ones_like(targets)

        def run() -> Outputs:
            batch = hidden.unflatten(0, (8, -1))
            return (function(batch, weight, targets, mask, advantages, old_per_token_logps=old_logprobs)[0],)

        return Call(run)

    return {
        **with_compile(after(_head)),
        **ours_on(ours),
        TRL.label: call(after(_trl_head)),
        VERL.label: call(after(_verl_head)),
        LIGER.label: liger,
        CCE.label: absent("has no such loss; its log-probs are under linear_logprob"),
    }


def linear_kl() -> dict[str, Maker]:
    """Two heads -> KL(policy || reference) (R,)."""

    def definition(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
        logp, ref_logp = (wide(h @ w.t()).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
        return ((logp.exp() * (logp - ref_logp)).sum(-1),)

    def trl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Outputs:
        function = TRL.function("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
        _trl_utils()
        return (function.apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)[0],)

    return {
        **with_compile(definition),
        **ours_on(lambda *tensors, backend: (kernels.linear_kl(*tensors, backend=backend),)),
        TRL.label: call(trl),
        VERL.label: absent("has no exact divergence"),
        LIGER.label: absent("its fused divergences give one number for the batch"),
    }


def _head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    return (wide(hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1),)


def _trl_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    utils = _trl_utils()
    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return (utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, width, None, 1.0, ())[0],)


def _verl_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    if hidden.is_cuda:
        function = VERL.function("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
        return (function(hidden, weight, targets, 1.0)[0],)
    function = VERL.function("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()
    return (function(hidden, weight, targets)[0],)


def _trl_utils() -> Any:
    """trl.trainer.utils, which TRL's kernels import during backward, when its folder is no longer on the path."""
    return load(TRL, "trl.trainer.utils")
