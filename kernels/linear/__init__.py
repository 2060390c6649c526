"""From hidden states to log-probs, entropies and the PPO loss: the (R, V) logits never exist as a whole.

    z = cap(logit_scale * (hidden @ weight.T + bias)) / temperature        (R, V), only ever one block of rows
    logprobs[r] = log softmax(z[r])[targets[r]]
    entropy[r] = -sum_v p log p,  p = softmax(z[r])

linear_logprob returns both per token, so its backward computes the logits a second time: four matrix products.
linear_ppo_loss knows the loss while the logits are at hand, and needs three.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from twinhead.kernels._arguments import (
    expect_choice,
    expect_like,
    expect_positive,
    expect_shape,
    expect_targets,
)
from twinhead.kernels._dispatch import Backends
from twinhead.kernels._precision import wide
from twinhead.kernels.linear import chunked
from twinhead.kernels.linear.objective import Objective

_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="eager")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of one target per row, and the entropy of the row's distribution.

    hidden (..., D), weight (V, D), targets (...) int64, bias (V,). Returns logprobs (...), or with
    `return_entropy` (logprobs, entropy), in nats, float32 (float64 for float64 inputs). Both are differentiable, once,
    to hidden, weight and bias; inputs that need no gradient cost none. Rows whose target is `ignore_index` give 0 and
    receive no gradient, whatever their hidden state holds.

    `softcap` bounds the logits by softcap * tanh(z / softcap) as Gemma 2 does (arXiv 2408.00118, section 2.1);
    `logit_scale` multiplies them before that. `temperature` divides last.

    Raises ValueError for shapes that do not fit, targets outside [0, V), or a temperature or softcap that is not > 0.
    """
    op = "linear_logprob"
    _expect_head(op, hidden, weight, targets, bias, ignore_index)
    expect_positive(op, temperature=temperature, softcap=softcap)
    logprobs, entropy = chunked.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        epilogue=_BACKENDS.pick(op, hidden.device, backend).__name__,
    )
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropy.view(targets.shape)) if return_entropy else logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: None = None,
) -> tuple[Tensor, Tensor]:
    """linear_logprob under the name and argument order of verl: (logprobs, entropy), not a loss.

    hidden (..., D), weight (V, D), labels (...) int64. `reduction` "none", "sum" or "mean" applies to the log-probs;
    the entropy stays per token. A vocabulary split over processes is not supported: `dist_process_group` must be None.
    """
    expect_choice("linear_cross_entropy", "reduction", reduction, ("none", "sum", "mean"))
    if dist_process_group is not None:
        raise ValueError(f"linear_cross_entropy: expected dist_process_group None, got {dist_process_group!r}")
    logprobs, entropy = linear_logprob(hidden, weight, labels, temperature=temperature, return_entropy=True)
    if reduction == "sum":
        return logprobs.sum(), entropy
    return (logprobs.mean() if reduction == "mean" else logprobs), entropy


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    normalizer: Tensor | int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_logprobs: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """The PPO policy loss straight from hidden states; loss and gradient in one pass over the logits.

    loss = [sum of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef * estimator(logprobs, ref_logprobs)
           - entropy_coef * entropy] / normalizer,   r = exp(logprobs - old_logprobs)    (arXiv 1707.06347, eq. 7 and 9)

    with at most -dual_clip * A where A < 0, if `dual_clip` is given (arXiv 1912.09729, eq. 5). hidden (..., D), weight
    (V, D), targets, old_logprobs, advantages and ref_logprobs all (...), bias (V,); `temperature`, `softcap` and
    `logit_scale` as in linear_logprob. `normalizer` is the token count of the whole optimizer step; by default that of
    this call. The log-ratio is limited to [-20, 20] before exp.

    Returns (loss, stats), or with `return_logprobs` (loss, stats, logprobs): a 0-dimensional loss, differentiable once
    to hidden, weight and bias, and 0-dimensional statistics on the same device, sums over the tokens by `normalizer`
    (they add up over micro-batches): pg_loss (the surrogate), approx_kl (of old - new), approx_kl_k3, ref_kl (of the
    estimator), entropy, clipfrac, ratio_mean. ratio_max is a maximum; vf_loss and vf_clipfrac are 0, as there are no
    values. logprobs (...) are those of linear_logprob to the last bit, and carry no gradient.

    The gradient is computed by the forward call and only scaled by backward(); under no_grad it is not computed.
    Raises ValueError for shapes that do not fit, targets outside [0, V), coefficients out of range, or a `kl_coef`
    without `ref_logprobs`.
    """
    op = "linear_ppo_loss"
    _expect_head(op, hidden, weight, targets, bias)
    expect_like(op, "targets", targets, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs)
    expect_positive(op, temperature=temperature, softcap=softcap)
    objective = Objective(
        _tokens(old_logprobs, hidden, weight),
        _tokens(advantages, hidden, weight),
        None if ref_logprobs is None else _tokens(ref_logprobs, hidden, weight),
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, normalizer,
    )  # fmt: skip
    loss, stats, logprobs = chunked.linear_ppo_loss(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias, objective,
        temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        epilogue=_BACKENDS.pick(op, hidden.device, backend).__name__,
    )  # fmt: skip
    return (loss, stats, logprobs.view(targets.shape)) if return_logprobs else (loss, stats)


def _tokens(constant: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """A per-token constant as (R,), in the dtype of the log-probs it meets."""
    return constant.detach().reshape(-1).to(wide(hidden, weight))


def _expect_head(
    op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int | None = None
) -> None:
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        got = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{op}: expected hidden (..., D) and weight (V, D), got {got}")
    expect_shape(op, "targets", targets, *hidden.shape[:-1])
    if bias is not None:
        expect_shape(op, "bias", bias, weight.shape[0])
    expect_targets(op, "targets", targets, weight.shape[0], ignore_index)
