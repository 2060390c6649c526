"""What follows the matrix product of a block, in C++: one pass over the block, row by row."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels._head import Head
from twinhead.kernels.linear.chunked import Measures
from twinhead.kernels.linear.objective import Objective


def measure(products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures) -> None:
    """See Epilogue in chunked.py."""
    _C.linear_measure(**_block(products, head, targets), **_arrays(logprobs=logprobs, **measures._asdict()))


def gradient(
    products: Tensor,
    head: Head,
    targets: Tensor,
    measures: Measures,
    slopes: Tensor,
    entropy_slopes: Tensor | None,
) -> Tensor:
    """In the memory of the products."""
    given = _arrays(slopes=slopes, entropy_slopes=entropy_slopes, **measures._asdict())
    _C.linear_gradient(**_block(products, head, targets), **given)
    return products


def learn(
    products: Tensor, head: Head, targets: Tensor, logprobs: Tensor, measures: Measures, objective: Objective
) -> Tensor:
    """In the memory of the products; a row's gradient is formed while its logits are in the cache."""
    _C.linear_learn(
        **_block(products, head, targets),
        **_arrays(
            logprobs=logprobs,
            **measures._asdict(),
            old_logprobs=objective.old_logprobs,
            advantages=objective.advantages,
            ref_logprobs=objective.ref_logprobs,
        ),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=inf if objective.dual_clip is None else objective.dual_clip,
        kl_coef=objective.kl_coef,
        kl_estimator=int(objective.kl_estimator.removeprefix("k")),
        entropy_coef=objective.entropy_coef,
        divisor=objective.divisor.item(),
    )
    return products


def _block(products: Tensor, head: Head, targets: Tensor) -> dict[str, Any]:
    return {
        **_arrays(products=products, bias=head.bias, targets=targets),
        "scale": head.scale,
        "softcap": inf if head.softcap is None else head.softcap,
        "temperature": head.temperature,
        "threads": torch.get_num_threads(),
    }


def _arrays(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.numpy() for name, tensor in tensors.items()}
