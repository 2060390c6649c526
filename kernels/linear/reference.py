"""The oracle: build all the logits, then say what is meant."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._precision import wide
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
    """Log-probs (R,) and, if asked for, entropies (R,)."""
    dtype, valid = wide(hidden, weight), targets != ignore_index
    logits = hidden.to(dtype).where(valid[:, None], 0) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)  # (R, V)
    p = logp.exp()
    logprobs = logp.gather(1, targets.where(valid, 0).long()[:, None]).squeeze(1)
    entropy = -torch.where(p > 0, p * logp, 0).sum(-1)
    return logprobs.where(valid, 0), entropy.where(valid, 0) if return_entropy else None


def linear_ppo_loss(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (R,)
    bias: Tensor | None,  # (V,)
    objective: Objective,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of the log-probs and entropies, and its statistics."""
    logprobs, entropy = linear_logprob(
        hidden, weight, targets, bias,
        temperature=temperature, softcap=softcap, logit_scale=logit_scale, return_entropy=True,
    )  # fmt: skip
    assert entropy is not None, "linear_logprob was asked for the entropy"
    return objective.loss(logprobs, entropy)
