"""Direct preference optimisation: the loss of a pair from four log-probabilities of whole responses.

    h = (log policy(chosen) - log policy(rejected)) - (log ref(chosen) - log ref(rejected))
    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)                     e = label_smoothing
    robust   [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e)
    hinge    max(0, 1 - beta h)
    ipo      (h - 1 / (2 beta))^2

Sources: sigmoid arXiv 2305.18290, eq. 7, with e > 0 the conservative form of E. Mitchell's note on noisy preferences
(cDPO, 2023); robust arXiv 2403.00409; hinge arXiv 2305.10425 (SLiC); ipo arXiv 2310.12036, eq. 17, whose tau is beta.
"""

from __future__ import annotations

from torch import Tensor

from twinhead.kernels._arguments import expect_choice, expect_like, expect_positive
from twinhead.kernels._dispatch import Backends

LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo")

_BACKENDS = Backends(__name__, torch="reference")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (losses, chosen_rewards, rejected_rewards), (P,) each, float32 or wider.

    All inputs are (P,): sums of log-probabilities over a response's tokens (for "ipo" the choice between sums and
    means is the caller's; the paper sums). The losses are differentiable to all four; the rewards,
    beta * (log policy - log ref), are detached. `label_smoothing` is the share of pairs believed to be swapped, for
    "sigmoid" and "robust".

    Raises ValueError for different shapes, an unknown loss_type, a beta that is not > 0, label_smoothing outside
    [0, 0.5), or label_smoothing with a loss that has none.
    """
    op = "dpo_loss"
    others = {"policy_rejected_logps": policy_rejected_logps, "ref_chosen_logps": ref_chosen_logps}
    expect_like(op, "policy_chosen_logps", policy_chosen_logps, **others, ref_rejected_logps=ref_rejected_logps)
    expect_choice(op, "loss_type", loss_type, LOSS_TYPES)
    expect_positive(op, beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: expected label_smoothing in [0, 0.5), got {label_smoothing}")
    if label_smoothing != 0 and loss_type not in ("sigmoid", "robust"):
        raise ValueError(f"{op}: expected label_smoothing 0 for loss_type {loss_type!r}, got {label_smoothing}")
    return _BACKENDS.pick(op, policy_chosen_logps.device).dpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
    )
