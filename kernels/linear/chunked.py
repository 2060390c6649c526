"""The fused head in PyTorch: block after block of rows, never the whole logits, and gradients by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twinhead.kernels._head import LOG_ZERO, Head, HeadGradient, blocks, refuse_second_derivative
from twinhead.kernels._precision import full_precision, wide
from twinhead.kernels.linear.objective import Objective


def linear_logprob(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (R,) and, if asked for, entropies (R,): one matrix product forward, three backward."""
    shape = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    valid = targets != ignore_index
    if valid.device.type == "cpu" and valid.all():  # the usual case, which a GPU would have to sync to see
        return _LinearLogprob.apply(hidden, weight, bias, targets.long(), shape, return_entropy)
    # the states too: a NaN in an ignored one would reach the weight's gradient as 0 * NaN
    hidden, targets = hidden.where(valid[:, None], 0), targets.where(valid, 0).long()
    logprobs, entropy = _LinearLogprob.apply(hidden, weight, bias, targets, shape, return_entropy)
    return logprobs.where(valid, 0), None if entropy is None else entropy.where(valid, 0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: dict[str, Any],
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with full_precision(hidden.device):
            head = Head(weight, bias, wide(hidden, weight), **shape)
            logprobs = hidden.new_empty(len(hidden), dtype=head.dtype)
            entropy = torch.empty_like(logprobs) if return_entropy else None
            for rows in blocks(hidden):
                z = head.logits(hidden[rows])
                logp = z.log_softmax(-1)
                logprobs[rows] = _at_targets(logp, targets[rows])
                if entropy is not None:
                    entropy[rows] = _entropy(z.softmax(-1), logp)
        # a copy, because the entropy belongs to the caller, who may write to it
        ctx.save_for_backward(hidden, weight, bias, targets, None if entropy is None else entropy.clone())
        ctx.set_materialize_grads(False)
        ctx.shape = shape
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, entropy_slope: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_logprob")
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        slope = torch.zeros_like(entropy) if slope is None else slope
        with full_precision(hidden.device):
            head = Head(weight, bias, wide(hidden, weight), **ctx.shape)
            gradient = HeadGradient(head, hidden, ctx.needs_input_grad[:3])
            for rows in blocks(hidden):
                z = head.logits(hidden[rows])
                p, from_entropy = z.softmax(-1), None
                if entropy_slope is not None:
                    from_entropy = _entropy_gradient(p, z.log_softmax(-1), entropy[rows], entropy_slope[rows])
                dz = _logprob_gradient(p, targets[rows], slope[rows])
                gradient.add(rows, hidden[rows], dz if from_entropy is None else dz.add_(from_entropy), z)
        return *gradient.result(weight, bias), None, None, None


def linear_ppo_loss(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    objective: Objective,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradient while the logits are at hand: three matrix products, or one if nothing needs it."""
    # an autograd.Function runs without grad mode, so it could not tell no_grad from inside
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _LinearPPOLoss.apply(hidden, weight, bias, targets.long(), objective, temperature, needs)


class _LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        objective: Objective,
        temperature: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with full_precision(hidden.device):
            head = Head(weight, bias, wide(hidden, weight), temperature=temperature)
            gradient = HeadGradient(head, hidden, needs) if any(needs) else None
            logprobs = hidden.new_empty(len(hidden), dtype=head.dtype)
            entropy = torch.empty_like(logprobs)
            for rows in blocks(hidden):
                z = head.logits(hidden[rows])
                p, logp = z.softmax(-1), z.log_softmax(-1)
                logprobs[rows] = _at_targets(logp, targets[rows])
                entropy[rows] = _entropy(p, logp)
                if gradient is not None:
                    dz = _objective_gradient(p, logp, targets[rows], logprobs[rows], entropy[rows], objective, rows)
                    gradient.add(rows, hidden[rows], dz, z)
        ctx.save_for_backward(*(gradient.result(weight, bias) if gradient is not None else ()))
        return objective.loss(logprobs, entropy)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_ppo_loss")
        return *(None if d is None else d * slope for d in ctx.saved_tensors), None, None, None, None


def _at_targets(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(1, targets[:, None]).squeeze(1)


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    """-sum p log p, (n,); log p is clamped in place, so that 0 log 0 is 0."""
    return -torch.linalg.vecdot(p, logp.clamp_(min=LOG_ZERO))


def _logprob_gradient(p: Tensor, targets: Tensor, slope: Tensor) -> Tensor:
    """slope * (onehot(target) - p), (n, V), in the memory of p."""
    return p.mul_(-slope[:, None]).scatter_add_(1, targets[:, None], slope[:, None])


def _entropy_gradient(p: Tensor, logp: Tensor, entropy: Tensor, slope: Tensor) -> Tensor:
    """slope * -p (log p + entropy), (n, V), in the memory of log p."""
    return logp.clamp_(min=LOG_ZERO).add_(entropy[:, None]).mul_(p).mul_(-slope[:, None])


def _objective_gradient(
    p: Tensor, logp: Tensor, targets: Tensor, logprobs: Tensor, entropy: Tensor, objective: Objective, rows: slice
) -> Tensor:
    """The gradient of the objective by the logits of one block, (n, V), in the memory of p and log p."""
    from_entropy = None
    if objective.entropy_coef != 0:
        from_entropy = _entropy_gradient(p, logp, entropy, objective.entropy_slope(entropy))
    dz = _logprob_gradient(p, targets, objective.slope(logprobs, rows))
    return dz if from_entropy is None else dz.add_(from_entropy)
