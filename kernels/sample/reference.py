"""The oracle: filter, normalise, and read the inverse of the cumulative distribution at the uniform numbers."""

from __future__ import annotations

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
    p = _distribution(logits / temperature if temperature != 1 else logits, top_k, top_p, min_p)
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


def _distribution(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """softmax(logits) with everything that is filtered out at 0, (B, V); only normalised if nothing is."""
    if 0 < top_k < logits.shape[1] or top_p < 1:
        p = _ranked_distribution(logits, top_k, top_p)
    else:
        p = logits.softmax(-1)
    if min_p > 0:
        p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0)
    return p


def _ranked_distribution(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The k likeliest words, and of these the shortest prefix that holds top_p of their mass."""
    if 0 < top_k < logits.shape[1]:
        ranked, words = logits.topk(top_k)
    else:
        ranked, words = logits.sort(descending=True, stable=True)
    p = ranked.softmax(-1)
    mass_before = p.cumsum(-1).sub_(p)
    return torch.zeros_like(logits).scatter_(1, words, p.where(mass_before < top_p, 0))
