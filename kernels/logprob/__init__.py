"""Log-probability of chosen words, and entropy, from logits: the names and the argument order of TRL.

    logprobs[r, k] = log softmax(logits[r] / temperature)[index[r, k]]
    entropy[r] = -sum_v p log p,  p = softmax(logits[r] / temperature)

An import line is the whole change for who calls these functions elsewhere. float32 and float64 logits give their own
dtype. Half precision gives float32, except on the CPU, where the result is torch.log_softmax's own, in its dtype. Words
with logit -inf have probability 0 and add nothing to the entropy. Everything is differentiable to the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels._arguments import expect_positive, expect_shape
from twinhead.kernels._dispatch import Backends

_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="reference")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the words `index`, one or K per row, in nats.

    logits (..., V), index (...) or (..., K) int64 -> the shape of index. Rows where `row_mask` (...) is false are
    skipped: they give 0, receive no gradient, and may hold anything. Raises ValueError for shapes that do not fit or a
    temperature that is not > 0.
    """
    op = "selective_log_softmax"
    index, row_mask, single = _expect_rows(op, logits, index, temperature, row_mask)
    logprobs = _BACKENDS.pick(op, logits.device).selective_log_softmax(logits, index, temperature, row_mask)
    return logprobs.squeeze(-1) if single else logprobs


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """selective_log_softmax and the entropy of each row, (...), from one softmax.

    Arguments and errors are those of selective_log_softmax. With `entropy_requires_grad=False` the entropy is a
    measurement without gradient.
    """
    op = "selective_log_softmax_and_entropy"
    index, row_mask, single = _expect_rows(op, logits, index, temperature, row_mask)
    logprobs, entropy = _BACKENDS.pick(op, logits.device).selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad, temperature, row_mask
    )
    return (logprobs.squeeze(-1) if single else logprobs), entropy


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of softmax(logits) at every position, in nats: (..., V) -> (...), `chunk_size` rows at a time."""
    if chunk_size < 1:
        raise ValueError(f"entropy_from_logits: expected chunk_size >= 1, got {chunk_size}")
    return _BACKENDS.pick("entropy_from_logits", logits.device).entropy_from_logits(logits, chunk_size)


def _expect_rows(
    op: str, logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, bool]:
    """index as (..., K) int64, row_mask as bool, and whether index had one word per row and no dimension for them."""
    expect_positive(op, temperature=temperature)
    rows = logits.shape[:-1]
    single = index.shape == rows
    if not single and index.shape[:-1] != rows:
        expected = f"{tuple(rows)} or {tuple(rows)} + (K,)"
        raise ValueError(f"{op}: expected index of shape {expected}, got {tuple(index.shape)}")
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: expected index of dtype int64, got {index.dtype}")
    if row_mask is not None:
        expect_shape(op, "row_mask", row_mask, *rows)
        row_mask = row_mask.bool()
    return (index.unsqueeze(-1) if single else index).long(), row_mask, single
