"""The fused head: block after block of rows, never the whole logits, and gradients by hand.

The matrix products are the library's. What follows them is the backend's: a module with the functions of Epilogue.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from twinhead.kernels._head import Head, HeadGradient, blocks, refuse_second_derivative
from twinhead.kernels._precision import full_precision, wide
from twinhead.kernels._surrogate import STATISTICS
from twinhead.kernels.linear.objective import Objective


class Measures(NamedTuple):
    """Of each row's softmax, (R,) each, in the working dtype."""

    entropy: Tensor
    peak: Tensor  # the largest logit
    log_sum: Tensor  # log of the sum of exp(logit - peak); apart from it, as large logits would round it away

    def at(self, rows: slice) -> Measures:
        """Those of one block."""
        return Measures(*(measure[rows] for measure in self))


class Epilogue(Protocol):
    """What a backend does with the products (n, V) of one block; rows whose target is below 0 are left out."""

    def measure(self, products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures) -> None:
        """Writes logprobs (n,) and the measures (n,); a row that is left out has log-prob and entropy 0."""

    def gradient(
        self,
        products: Tensor,
        head: Head,
        targets: Tensor,
        measures: Measures,
        slopes: Tensor,
        entropy_slopes: Tensor | None,
    ) -> Tensor:
        """The products' gradient (n, V) of sum slopes * logprobs + entropy_slopes * entropy; the products are spent."""

    def learn(
        self,
        products: Tensor,
        head: Head,
        targets: Tensor,
        logprobs: Tensor,
        measures: Measures,
        objective: Objective,
    ) -> Tensor:
        """Writes what `measure` writes, and returns the products' gradient of the objective of these rows."""


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (R,): one matrix product forward, three backward."""
    targets = targets.long()
    targets = targets.where(targets != ignore_index, -1)
    logprobs, entropy, _, _ = _linear_logprob(
        hidden, weight, bias, targets, temperature, softcap, logit_scale, epilogue
    )
    return logprobs, entropy


@torch.library.custom_op("twinhead::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    epilogue: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, peak and log_sum."""
    run, logprobs, measures = _load(epilogue), *_unmeasured(hidden, weight)
    with full_precision(hidden.device):
        head = Head(weight, bias, logprobs.dtype, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
        hidden = _without_ignored(hidden, targets)
        for rows in blocks(hidden):
            run.measure(head.products(hidden[rows]), head, targets[rows], logprobs[rows], measures.at(rows))
    return logprobs, *measures


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, measures = _unmeasured(hidden, weight)
    return logprobs, *measures


@torch.library.custom_op("twinhead::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    slopes: Tensor,
    entropy_slopes: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    epilogue: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of those of hidden, weight and bias that need one."""
    run, measures = _load(epilogue), Measures(entropy, peak, log_sum)
    slopes, entropy_slopes = slopes.contiguous(), None if entropy_slopes is None else entropy_slopes.contiguous()
    with full_precision(hidden.device):
        head = Head(weight, bias, peak.dtype, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
        hidden = _without_ignored(hidden, targets)
        gradient = HeadGradient(head, hidden, needs)
        for rows in blocks(hidden):
            tilts = None if entropy_slopes is None else entropy_slopes[rows]
            products = head.products(hidden[rows])
            dz = run.gradient(products, head, targets[rows], measures.at(rows), slopes[rows], tilts)
            gradient.add(rows, hidden[rows], dz)
    return _found(gradient, weight, bias)


@_linear_logprob_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> list[Tensor]:
    return _like_found(hidden, weight, bias, others[-1])


def _save_for_linear_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.settings = inputs
    _, entropy, peak, log_sum = output
    # a copy, because the entropy belongs to the caller, who may write to it
    ctx.save_for_backward(hidden, weight, bias, targets, entropy.clone(), peak, log_sum)
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.set_materialize_grads(False)


def _linear_logprob_gradient(
    ctx: Any, slopes: Tensor | None, entropy_slopes: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_logprob")
    *inputs, peak, log_sum = ctx.saved_tensors
    slopes = torch.zeros_like(peak) if slopes is None else slopes
    needs = ctx.needs_input_grad[:3]
    found = _linear_logprob_backward(*inputs, peak, log_sum, slopes, entropy_slopes, *ctx.settings, list(needs))
    return *_by_input(found, needs), *[None] * 5


_linear_logprob.register_autograd(_linear_logprob_gradient, setup_context=_save_for_linear_logprob)


def linear_ppo_loss(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    objective: Objective,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    epilogue: str,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, its statistics and the log-probs (R,), with the gradient found while the logits are at hand: three
    matrix products, or one if nothing needs it."""
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, statistics, logprobs, _ = _linear_ppo_loss(
        hidden,
        weight,
        bias,
        targets.long(),
        objective.old_logprobs,
        objective.advantages,
        objective.ref_logprobs,
        objective.clip_low,
        objective.clip_high,
        objective.dual_clip,
        objective.kl_coef,
        objective.kl_estimator,
        objective.entropy_coef,
        objective.divisor,
        temperature,
        softcap,
        logit_scale,
        epilogue,
        needs,
    )
    return loss, dict(zip(STATISTICS, statistics.unbind(), strict=True)), logprobs


@torch.library.custom_op("twinhead::linear_ppo_loss", mutates_args=())
def _linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    divisor: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    epilogue: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, statistics in the order of STATISTICS, log-probs (R,), and the gradients that are needed."""
    tokens, clips = (old_logprobs, advantages, ref_logprobs), (clip_low, clip_high, dual_clip)
    objective = Objective(*tokens, *clips, kl_coef, kl_estimator, entropy_coef, divisor)
    run, logprobs, measures = _load(epilogue), *_unmeasured(hidden, weight)
    with full_precision(hidden.device):
        head = Head(weight, bias, logprobs.dtype, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
        gradient = HeadGradient(head, hidden, needs)
        for rows in blocks(hidden):
            block = (head.products(hidden[rows]), head, targets[rows], logprobs[rows], measures.at(rows))
            if any(needs):
                gradient.add(rows, hidden[rows], run.learn(*block, objective.at(rows)))
            else:
                run.measure(*block)
    loss, statistics = objective.loss(logprobs, measures.entropy)
    return loss, torch.stack([statistics[name] for name in STATISTICS]), logprobs, _found(gradient, weight, bias)


@_linear_ppo_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    loss = hidden.new_empty((), dtype=wide(hidden, weight))
    logprobs = loss.new_empty(len(hidden))
    return loss, loss.new_empty(len(STATISTICS)), logprobs, _like_found(hidden, weight, bias, others[-1])


def _save_for_linear_ppo_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, statistics, logprobs, gradients = output
    ctx.needs = inputs[-1]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(statistics, logprobs, *gradients)


def _linear_ppo_loss_gradient(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_ppo_loss")
    return *_by_input([d * slope for d in ctx.saved_tensors], ctx.needs), *[None] * 16


_linear_ppo_loss.register_autograd(_linear_ppo_loss_gradient, setup_context=_save_for_linear_ppo_loss)


def _load(epilogue: str) -> Epilogue:
    return cast(Epilogue, importlib.import_module(epilogue))


def _unmeasured(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Measures]:
    """Memory for log-probs and measures."""
    dtype = wide(hidden, weight)
    logprobs, *measures = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(4))
    return logprobs, Measures(*measures)


def _without_ignored(hidden: Tensor, targets: Tensor) -> Tensor:
    """0 for the states that are left out: a NaN in one would reach the weight's gradient as 0 * NaN."""
    valid = targets >= 0
    if valid.device.type == "cpu" and valid.all():  # the usual case, which a GPU would have to sync to see
        return hidden
    return hidden.where(valid[:, None], 0)


def _found(gradient: HeadGradient, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [found for found in gradient.result(weight, bias) if found is not None]


def _like_found(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> list[Tensor]:
    needed = [x for x, needed in zip((hidden, weight, bias), needs, strict=True) if x is not None and needed]
    return [x.new_empty(x.shape) for x in needed]


def _by_input(found: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One entry for each of hidden, weight and bias, from the gradients of those that need one."""
    gradients = iter(found)
    return [next(gradients) if needed else None for needed in needs]
