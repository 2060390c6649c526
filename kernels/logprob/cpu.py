"""The C++ twin: one pass over the logits forward, one backward, for float32 and float64.

Half precision goes to torch: on the CPU the callers of these functions expect torch.log_softmax's own result, bit for
bit, and what is computed in float32 differs from it in every fifth element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels.logprob import reference
from twinhead.kernels.logprob.operator import fused, results


def forward(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., V), (..., K), row_mask (...) or None -> logprobs (..., K), entropy (...) or (0,) without, lse (..., 2)."""
    logprobs, entropy, lse = results(logits, index, temperature, row_mask, with_entropy)
    _C.logprob(
        *_read(logits, index, row_mask),
        temperature,
        torch.get_num_threads(),
        logprobs.detach().numpy(),
        entropy.detach().numpy() if with_entropy else None,
        lse.detach().numpy(),
    )
    return logprobs, entropy, lse


def backward(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
) -> Tensor:
    """The gradient of logits, contiguous, from what forward took and gave and the gradients of logprobs and entropy."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    _C.logprob_gradient(
        *_read(logits, index, row_mask),
        temperature,
        torch.get_num_threads(),
        _array(lse),
        None if dentropy is None else _array(entropy),
        _array(dlogprobs),
        None if dentropy is None else _array(dentropy),
        dlogits.numpy(),
    )
    return dlogits


def _read(logits: Tensor, index: Tensor, row_mask: Tensor | None) -> tuple[NDArray, NDArray, NDArray | None]:
    # rows may lie anywhere, the words of a row stand side by side
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    return rows.detach().numpy(), _array(index), None if row_mask is None else _array(row_mask)


def _array(tensor: Tensor) -> NDArray:
    return tensor.detach().contiguous().numpy()


def _except_half(ours: Callable[..., Any], torchs: Callable[..., Any]) -> Callable[..., Any]:
    def run(logits: Tensor, *arguments: Any) -> Any:
        return (torchs if logits.dtype in (torch.bfloat16, torch.float16) else ours)(logits, *arguments)

    return run


_OURS = fused("cpu", forward, backward)
selective_log_softmax = _except_half(_OURS.selective_log_softmax, reference.selective_log_softmax)
selective_log_softmax_and_entropy = _except_half(
    _OURS.selective_log_softmax_and_entropy, reference.selective_log_softmax_and_entropy
)
entropy_from_logits = _except_half(_OURS.entropy_from_logits, reference.entropy_from_logits)
