"""The penalty on leaving the reference: an estimate of the divergence or all of it, in the rewards or in the loss.

    in reward   k1 | k2 | k3 | full   a number per token, whose effect on later tokens the advantages carry back
    in loss          k2 | k3 | full   its gradient at each token: that of KL(pi || pi_ref) from k2 and full, that of
                                      KL(pi_ref || pi) from k3. From k1 it is 0 in expectation, so k1 is refused there

full is exact: sum over the vocabulary of pi (log pi - log pi_ref), block after block (kernels.linear_kl).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from twinhead.engine.batch import Packed
from twinhead.engine.experience import Experience
from twinhead.engine.policy import Policy
from twinhead.engine.rollout_options import PPO
from twinhead.kernels import kl_estimate, linear_kl


@dataclass(frozen=True)
class Penalty:
    """What the loss is charged: coef for every nat of KL to the reference."""

    reference: Policy | None  # who is asked again at every step: only the exact divergence needs it
    kind: str
    coef: float
    temperature: float

    @classmethod
    def in_loss(cls, config: PPO, reference: Policy, coef: float) -> Penalty | None:
        """None where the rewards carry it."""
        if config.kl_in == "reward":
            return None
        return cls(reference if config.kl_kind == "full" else None, config.kl_kind, coef, config.temperature)

    def estimate(self, e: Experience) -> dict[str, Any]:
        """Arguments of linear_ppo_loss, which adds estimates itself."""
        if self.exact:
            return {}
        return {"ref_logprobs": e.ref_logprobs, "kl_coef": self.coef, "kl_estimator": self.kind}

    @property
    def exact(self) -> bool:
        """linear_ppo_loss cannot add it."""
        return self.reference is not None

    def nats(self, policy: Policy, rows: Tensor, e: Experience) -> Tensor:
        """(R,) float32: the exact nats at every row. rows: (R, H) of the policy."""
        assert self.reference is not None and e.ref_rows is not None, (
            "experience is gathered with the states of the reference"
        )
        return exact(policy, rows, self.reference, e.ref_rows, self.temperature)


def remembered(config: PPO, e: Experience, ref_logprobs: Tensor, ref_rows: Tensor) -> Experience:
    """The experience with what the loss must know of the reference."""
    if config.kl_in == "reward":
        return e
    return replace(e, ref_rows=ref_rows) if config.kl_kind == "full" else replace(e, ref_logprobs=ref_logprobs)


def exact(policy: Policy, rows: Tensor, reference: Policy, ref_rows: Tensor, temperature: float) -> Tensor:
    """(R,) float32 nats: KL(pi || pi_ref) at every row, from states (R, H) and (R, H')."""
    heads = []
    for model, states in ((policy, rows), (reference, ref_rows)):
        vocabulary = model.vocabulary(states)
        hidden, scale = vocabulary["hidden"], vocabulary["logit_scale"]
        heads += [hidden if scale == 1.0 else hidden * scale, vocabulary["weight"]]
    return linear_kl(*heads, temperature=temperature)


def charges(
    config: PPO,
    policy: Policy,
    reference: Policy,
    packed: Packed,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    ref_rows: Tensor,
) -> Tensor:
    """(R,) nats that are taken from the rewards, times kl_coef; 0 where the loss carries the penalty."""
    if config.kl_in == "loss":
        return torch.zeros_like(logprobs)
    if config.kl_kind != "full":
        return kl_estimate(logprobs, ref_logprobs, kind=config.kl_kind)
    return exact(policy, policy.hidden(packed)[packed.rows], reference, ref_rows, config.temperature)


def check_heads(policy: Policy, reference: Policy) -> None:
    """Raise ValueError where the exact divergence is not that of hidden @ weight.T, or the vocabularies differ."""
    for model in (policy, reference):
        bias = getattr(model.head, "bias", None)
        if bias is not None or model.logit_transform.softcap is not None:
            extra = "a bias" if bias is not None else "a softcap"
            raise ValueError(
                f"kl_kind: full expects a language-model head without bias and softcap, got one with {extra}"
            )
    ours, theirs = (len(model.head.weight) for model in (policy, reference))
    if ours != theirs:
        raise ValueError(f"kl_kind: full expects a reference with the policy's {ours} rows of vocabulary, got {theirs}")
