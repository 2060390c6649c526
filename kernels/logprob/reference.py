"""The oracle, and with it the PyTorch backend: log-softmax, gather, and the entropy of what was normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._precision import wide


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> Tensor:
    """(..., V), (..., K) -> (..., K)."""
    if row_mask is not None:
        found = selective_log_softmax(logits[row_mask], index[row_mask], temperature, None)
        return _scattered(found, row_mask)
    return _log_softmax(logits, temperature).gather(-1, index)


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool, temperature: float, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(..., V), (..., K) -> (..., K), (...)."""
    if row_mask is not None:
        found = selective_log_softmax_and_entropy(
            logits[row_mask], index[row_mask], entropy_requires_grad, temperature, None
        )
        return _scattered(found[0], row_mask), _scattered(found[1], row_mask)
    logp = _log_softmax(logits, temperature)
    return logp.gather(-1, index), _entropy(logp if entropy_requires_grad else logp.detach())


def entropy_from_logits(logits: Tensor, chunk_size: int) -> Tensor:
    """(..., V) -> (...), `chunk_size` rows at a time."""
    rows = logits.reshape(-1, logits.shape[-1])
    entropies = [_entropy(_log_softmax(chunk, 1.0)) for chunk in rows.split(chunk_size)]
    return torch.cat(entropies).view(logits.shape[:-1])


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # Half precision on the CPU stays as it is: callers of the functions we stand in for expect torch's own result
    # there, bit for bit, and a more accurate one differs from it in every fifth element.
    dtype = logits.dtype if logits.device.type == "cpu" else wide(logits)
    logits = logits.to(dtype)
    return (logits / temperature if temperature != 1 else logits).log_softmax(-1)


def _entropy(logp: Tensor) -> Tensor:
    # the clamp only moves what has probability 0, so that 0 log 0 is 0; a root, so that slopes do not make it inf again
    return -(logp.exp() * logp.clamp(min=-(torch.finfo(logp.dtype).max ** 0.5))).sum(-1)


def _scattered(found: Tensor, row_mask: Tensor) -> Tensor:
    """The rows of `found` put back where `row_mask` is true, 0 elsewhere."""
    everywhere = found.new_zeros(row_mask.shape + found.shape[1:])
    everywhere[row_mask] = found
    return everywhere
