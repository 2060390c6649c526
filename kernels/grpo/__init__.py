"""Group-relative policy optimisation on tokens: PPO's clipped policy loss without a critic, in three aggregations.

    token    max(-A r, -A clip(r, 1 - epsilon_low, 1 + epsilon_high)) + beta k3,  r = exp(logprobs - old_logprobs)
    grpo     mean over responses of the mean over their tokens            normalizer: number of responses
    dr_grpo  sum over tokens / (responses * longest possible response)    normalizer: that constant
    dapo     mean over tokens                                             normalizer: number of tokens

k3 = exp(ref - log p) - 1 - (ref - log p) is the estimate of the divergence from the reference. Sources: grpo arXiv
2402.03300, eq. 3 and 4; dr_grpo arXiv 2503.20783, section 3.2; dapo arXiv 2503.14476, eq. 8.
"""

from __future__ import annotations

from math import inf

from torch import Tensor

from twinhead.kernels._arguments import expect_between, expect_choice, expect_like, expect_offsets
from twinhead.kernels._dispatch import Backends

LOSS_TYPES = ("grpo", "dr_grpo", "dapo")

_BACKENDS = Backends(__name__, torch="reference")


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "grpo",
    normalizer: Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats), all 0-dimensional, float32 or wider, on the device of the inputs and without a sync.

    Packed: logprobs, old_logprobs, ref_logprobs (R,) with cu_seqlens (S+1,) int32, advantages (S,) or (R,).
    Padded: [B, T] with `mask` [B, T] true at actions (None: everywhere), advantages (B,) or [B, T]; what the mask
    leaves out may hold NaN. Advantages shaped like logprobs are per token, else per response. `epsilon_high` defaults
    to `epsilon_low`. The loss is differentiable to logprobs; the log-ratio is limited to [-20, 20] before exp.

    `normalizer` is what the sum is divided by, counted over the whole optimizer step. Its unit is that of the table
    above. By default it is counted in this call: for grpo the responses that have an action, for dapo the actions, for
    dr_grpo B * T, or S times the longest response where the batch is packed and its width unknown: pass
    responses * max_new_tokens there if gradients of different batches are to have one scale.

    The statistics are those of ppo_loss: pg_loss is the loss without the KL term, ref_kl the mean of k3 over the
    actions of this call; vf_loss, vf_clipfrac and entropy are 0.

    Raises ValueError for shapes that do not fit, an unknown loss_type, epsilon_low outside [0, 1], a negative
    epsilon_high, or a beta without ref_logprobs.
    """
    op = "grpo_loss"
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    expect_choice(op, "loss_type", loss_type, LOSS_TYPES)
    expect_between(op, 0, 1, epsilon_low=epsilon_low)
    expect_between(op, 0, inf, epsilon_high=epsilon_high)
    expect_like(op, "logprobs", logprobs, old_logprobs=old_logprobs, mask=mask, ref_logprobs=ref_logprobs)
    _expect_layout(op, logprobs, advantages, mask, cu_seqlens)
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"{op}: expected ref_logprobs for beta={beta}, got None")
    return _BACKENDS.pick(op, logprobs.device, backend).grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ref_logprobs=ref_logprobs,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        loss_type=loss_type,
        normalizer=normalizer,
    )


def _expect_layout(
    op: str, logprobs: Tensor, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if cu_seqlens is None and logprobs.ndim != 2:
        raise ValueError(f"{op}: expected logprobs [B, T], or (R,) with cu_seqlens, got shape {tuple(logprobs.shape)}")
    if cu_seqlens is not None:
        if logprobs.ndim != 1 or mask is not None:
            got = f"logprobs of shape {tuple(logprobs.shape)} and {'no ' if mask is None else 'a '}mask"
            raise ValueError(f"{op}: expected logprobs (R,) and no mask with cu_seqlens, got {got}")
        expect_offsets(op, cu_seqlens, len(logprobs))
    responses = len(logprobs) if cu_seqlens is None else len(cu_seqlens) - 1
    if advantages.shape not in (logprobs.shape, (responses,)):
        expected = f"({responses},) or {tuple(logprobs.shape)}"
        raise ValueError(f"{op}: expected advantages of shape {expected}, got {tuple(advantages.shape)}")
