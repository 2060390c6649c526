"""What follows the matrix product of a block, in PyTorch: a pass over the block for every operation."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._head import Head
from twinhead.kernels.linear.chunked import Measures
from twinhead.kernels.linear.objective import Objective

# the log-probability that stands for log 0: its exp is 0 in every dtype, and its product with 0 is 0 and not NaN
LOG_ZERO = -1e4


def measure(products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures) -> None:
    """Spends the products; see Epilogue in chunked.py."""
    z, valid = head.capped(products), targets >= 0
    measures.peak.copy_(z.amax(-1))
    below = z.sub_(measures.peak[:, None])
    weight = below.exp()
    total = weight.sum(-1)
    measures.log_sum.copy_(total.log())
    at_targets = below.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    logprobs.copy_(torch.where(valid, at_targets - measures.log_sum, 0))
    entropy = measures.log_sum - torch.linalg.vecdot(weight, below.clamp_(min=LOG_ZERO)) / total
    measures.entropy.copy_(torch.where(valid, entropy, 0))


def gradient(
    products: Tensor,
    head: Head,
    targets: Tensor,
    measures: Measures,
    slopes: Tensor,
    entropy_slopes: Tensor | None,
) -> Tensor:
    """Of slope * logprob + entropy_slope * entropy: slope (onehot - p) - entropy_slope p (log p + entropy)."""
    z, valid = head.capped(products), targets >= 0
    logp = (z - measures.peak[:, None]).sub_(measures.log_sum[:, None])
    p, slopes = logp.exp(), slopes.where(valid, 0)[:, None]
    if entropy_slopes is None:
        dz = p.mul_(-slopes)
    else:
        tilt = logp.clamp_(min=LOG_ZERO).add_(measures.entropy[:, None]).mul_(entropy_slopes.where(valid, 0)[:, None])
        dz = p.mul_(tilt.add_(slopes).neg_())
    dz.scatter_add_(1, targets.clamp(min=0)[:, None], slopes)
    return head.through_cap(dz, z)


def learn(
    products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures, objective: Objective
) -> Tensor:
    """Both, with the slopes of the objective between them."""
    measure(products.clone(), head, targets, logprobs, measures)
    slopes, entropy_slopes = objective.slope(logprobs), objective.entropy_slope(logprobs)
    return gradient(products, head, targets, measures, slopes, entropy_slopes)
