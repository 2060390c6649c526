"""The clipped policy objective and what is measured beside it, shared by ppo_loss, grpo_loss and linear_ppo_loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twinhead.kernels._actions import Actions

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far outside any trust region, and still finite when it meets an advantage

STATISTICS = ("pg_loss", "vf_loss", "entropy", "approx_kl", "approx_kl_k3", "ref_kl", "clipfrac", "vf_clipfrac",
              "ratio_mean", "ratio_max")  # fmt: skip


class Surrogate(NamedTuple):
    """The objective token by token; every field has the shape of the log-probs."""

    loss: Tensor
    log_ratio: Tensor  # new - old, as it is: only the exponent is limited
    ratio: Tensor
    clipped: Tensor  # bool: the clipped side is strictly the larger one
    free: Tensor  # bool: the loss is -advantage * ratio, so the gradient flows

    @property
    def slope(self) -> Tensor:
        """d loss / d logprobs. The derivative of -A exp(new - old) by `new` is that expression itself."""
        return torch.where(self.free, self.loss, 0)


def surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Surrogate:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), and at most -dual_clip A where A < 0 (Schulman 2017 eq. 7; Ye 2020)."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = clipped_loss > unclipped_loss
    loss = torch.where(clipped, clipped_loss, unclipped_loss)
    free = ~clipped & (log_ratio.abs() <= LOG_RATIO_LIMIT)
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        bound = (advantages < 0) & (loss > ceiling)
        loss, free = torch.where(bound, ceiling, loss), free & ~bound
    return Surrogate(loss, log_ratio, ratio, clipped, free)


@torch.no_grad()
def statistics(policy: Surrogate, actions: Actions, divisor: Tensor | int, **measured: Tensor) -> dict[str, Tensor]:
    """The 0-dimensional statistics of one call, on its device and without a sync; what was not measured is 0.

    Sums over the actions by `divisor`: approx_kl of old - new (k1 under old samples), approx_kl_k3 of ratio - 1 - log
    ratio, clipfrac, ratio_mean. With the count of a whole optimizer step they add up over its micro-batches.
    """

    def share(tokens: Tensor) -> Tensor:
        return actions.select(tokens).sum() / divisor

    log_ratio = policy.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    stats = dict.fromkeys(STATISTICS, policy.loss.new_zeros(()))
    stats["approx_kl"] = -share(policy.log_ratio)
    stats["approx_kl_k3"] = share(policy.ratio - 1 - log_ratio)
    stats["clipfrac"] = share(policy.clipped.to(policy.loss.dtype))
    stats["ratio_mean"] = share(policy.ratio)
    # the appended zero makes the maximum of no actions 0; every ratio lies above it
    stats["ratio_max"] = torch.nn.functional.pad(actions.select(policy.ratio).flatten(), (0, 1)).amax()
    return stats | {name: value.detach() for name, value in measured.items()}
