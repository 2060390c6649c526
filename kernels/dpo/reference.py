"""The oracle: four losses of one margin, the scaled log-ratio of chosen over rejected, policy against reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu, softplus

from twinhead.kernels._precision import wide


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Four (P,) -> the losses and the rewards of chosen and rejected, (P,) each."""
    dtype = wide(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen = policy_chosen_logps.to(dtype) - ref_chosen_logps.to(dtype)
    rejected = policy_rejected_logps.to(dtype) - ref_rejected_logps.to(dtype)
    losses = _losses(chosen - rejected, beta, loss_type, label_smoothing)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def _losses(h: Tensor, beta: float, loss_type: str, label_smoothing: float) -> Tensor:
    # softplus(-x) is -log sigmoid(x), and finite for every finite x
    right, wrong = softplus(-beta * h), softplus(beta * h)
    if loss_type == "sigmoid":
        return (1 - label_smoothing) * right + label_smoothing * wrong
    if loss_type == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return relu(1 - beta * h)
    return (h - 1 / (2 * beta)).square()
