"""The oracle: filter, normalise, and read the inverse of the cumulative distribution at the uniform numbers."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from twinhead.kernels._precision import wide


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """(B, V), (B,) -> tokens (B,), logprobs (B,)."""
    logits = logits.to(wide(logits))
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    p = _distribution(logits, temperature, top_k, top_p, min_p)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1]
    # u stays below 1 by more than a rounding error, so u * total < total; and a word of probability 0, at which the sum
    # stands still, is never the first to exceed it
    u = uniforms.to(p.dtype).clamp(0, 1 - torch.finfo(p.dtype).eps)
    tokens = torch.searchsorted(cumulative, (u * total)[:, None], right=True)
    tokens = tokens.clamp_(max=p.shape[1] - 1)
    if p.device.type != "cpu":
        # a parallel sum associates differently on either side of a block border, so it may step at probability 0
        tokens = tokens.where(p.gather(1, tokens) > 0, p.argmax(-1, keepdim=True))
    return tokens.squeeze(1), (p.gather(1, tokens).squeeze(1) / total).log()


def _distribution(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """softmax(logits / temperature) with what is filtered out at 0, (B, V); only normalised if nothing is."""
    if 0 < top_k < logits.shape[1] or top_p < 1:
        ranked, words = _ranked(logits, top_k)
        p = (ranked / temperature).softmax(-1)
        mass_before = p.cumsum(-1).sub_(p)
        p = torch.zeros_like(logits).scatter_(1, words, p.where(mass_before < top_p, 0))
    else:
        p = (logits / temperature if temperature != 1 else logits).softmax(-1)
    if min_p > 0:
        p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    return p


def _ranked(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The logits of the k likeliest words, the likeliest first, and where they stand; of equal ones the first ones."""
    if not 0 < top_k < logits.shape[1]:
        return logits.sort(descending=True, stable=True)
    limit = logits.topk(top_k).values[:, -1:]
    spare = top_k - (logits > limit).sum(-1, keepdim=True)
    late = (logits == limit) & ((logits == limit).cumsum(-1) > spare)
    words = logits.masked_fill(late, -inf).topk(top_k).indices.sort().values
    ranked, order = logits.gather(1, words).sort(descending=True, stable=True)
    return ranked, words.gather(1, order)
