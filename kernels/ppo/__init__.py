"""The loss of proximal policy optimisation on tokens: clipped policy, clipped value, entropy bonus.

    policy   max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(logprobs - old_logprobs)
             and at most -dual_clip * A where A < 0, if dual_clip is given
    value    1/2 max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2)
    loss     [sum policy + value_coef * sum value - entropy_coef * sum entropy] / normalizer

Policy: arXiv 1707.06347, eq. 7; dual clip: arXiv 1912.09729, eq. 5; clipped value loss: OpenAI baselines, ppo2.
"""

from __future__ import annotations

from math import inf

from torch import Tensor

from twinhead.kernels._arguments import expect_between, expect_like
from twinhead.kernels._dispatch import Backends

_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="reference")


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    normalizer: Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, stats), all 0-dimensional, float32 or wider, on the device of the inputs and without a sync.

    All tensors have one shape, (R,) or [B, T]; `mask` is true at actions, and what it leaves out may hold NaN. The loss
    is differentiable to logprobs, values and entropy; without `entropy` its term is 0. `value_clip=None` switches the
    value clipping off. The log-ratio is limited to [-20, 20] before exp.

    `normalizer` is the number of actions in the whole optimizer step, over all micro-batches and ranks; by default that
    of this call. No actions give a loss of 0 with zero gradient.

    Statistics are sums over the actions by normalizer, so they are means by default and add up over micro-batches:
    pg_loss, vf_loss, entropy, approx_kl (of old - new), approx_kl_k3 (of r - 1 - log r), clipfrac and vf_clipfrac
    (where the clipped side is strictly larger), ratio_mean. ratio_max is a maximum; ref_kl is 0: this loss knows no
    reference.

    Raises ValueError for different shapes, clip_low outside [0, 1], another negative clip, or dual_clip below 1.
    """
    op = "ppo_loss"
    others = {"old_logprobs": old_logprobs, "advantages": advantages, "values": values, "old_values": old_values}
    expect_like(op, "logprobs", logprobs, **others, returns=returns, mask=mask, entropy=entropy)
    expect_between(op, 0, 1, clip_low=clip_low)
    expect_between(op, 0, inf, clip_high=clip_high, value_clip=value_clip)
    expect_between(op, 1, inf, dual_clip=dual_clip)
    return _BACKENDS.pick(op, logprobs.device, backend).ppo_loss(
        logprobs,
        old_logprobs.detach(),
        advantages.detach(),
        values,
        old_values.detach(),
        returns.detach(),
        mask=mask,
        entropy=entropy,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        value_clip=value_clip,
        value_coef=value_coef,
        entropy_coef=entropy_coef,
        normalizer=normalizer,
    )
