"""The one attention function that Hugging Face's modelling code calls: over ragged sequences, or one token per slot.

Registered under the name "twinhead" with `transformers.AttentionInterface`. No mask function is registered with it, so
transformers builds no (T, T) mask. The layout of the tokens arrives as the keyword argument `layout` of the model's
forward, which every supported architecture hands down to its attention layers (the self-check counts the calls).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from twinhead.engine import flash
from twinhead.engine.batch import segment_ids

NAME = "twinhead"


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences laid end to end along one row of tokens."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # (S+1,) int32, the borders of the same sequences

    def columns(self) -> tuple[Tensor, Tensor]:
        """(T,) the sequence of every token, and (T,) its position in it."""
        sequence = segment_ids(self.cu_seqlens)
        return sequence, torch.arange(len(sequence), device=sequence.device) - self.cu_seqlens[sequence]


@dataclass(slots=True)
class Slots:
    """One new token in each of B slots of the cache, whose keys 0..positions[b] are valid."""

    positions: Tensor  # (B,) int64, where the new token goes
    span: int  # keys to read: max(positions) + 1, known on the host
    even: bool = False  # every position is span - 1
    keys: Tensor | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)

    def places(self, heads: int, capacity: int) -> Tensor:
        """(B * heads,) where the new token's vectors go among all vectors of a buffer (slots, heads, capacity, D)."""
        if heads not in self.rows:
            pairs = torch.arange(len(self.positions) * heads, device=self.positions.device) * capacity
            self.rows[heads] = pairs + self.positions.repeat_interleave(heads)
        return self.rows[heads]

    @property
    def lengths(self) -> Tensor:
        """(B,) int32: valid keys of every slot."""
        if self.keys is None:
            self.keys = (self.positions + 1).to(torch.int32)
        return self.keys

    def mask(self, window: int | None) -> Tensor | None:
        """(B, 1, 1, span) bool: True where a key may be read. None: every key may."""
        if self.even and (window is None or window >= self.span):
            return None
        if window not in self.masks:
            keys = torch.arange(self.span, device=self.positions.device)
            seen = keys <= self.positions[:, None]
            if window is not None:
                seen &= keys > self.positions[:, None] - window
            self.masks[window] = seen[:, None, None]
        return self.masks[window]


def attend(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D) ragged, (B, H, 1, D) slots
    key: Tensor,  # (1, G, T, D) ragged, (B, G, span, D) slots; G divides H
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Ragged | Slots | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """(1, T, H, D) or (B, 1, H, D): softmax(q k / sqrt(D)) v over the keys that causality, window and layout allow."""
    if layout is None:
        raise ValueError("the modelling code does not hand keyword arguments (`layout`) down to its attention layers")
    if other.get("s_aux") is not None:
        raise ValueError("attention sinks (s_aux) are not supported: use a decoder without them")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)
    flashed = flash.serves(query, key, value, softcap)
    if isinstance(layout, Slots):
        if flashed and flash.package() is not None:
            return flash.slots(query, key, value, layout.lengths, scale, sliding_window, softcap), None
        return _slots(query, key, value, layout.mask(sliding_window), scale, softcap), None
    if flashed:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = max(layout.lengths)
        return flash.ragged(q, k, v, layout.cu_seqlens, longest, scale, sliding_window, softcap)[None], None
    return _ragged(query, key, value, layout, scale, sliding_window, softcap), None


def _ragged(
    query: Tensor, key: Tensor, value: Tensor, layout: Ragged, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One call per sequence: on a CPU faster at any length than one padded call (benchmarks/NOTES.md)."""
    longest = max(layout.lengths)
    mask = None
    if softcap is not None or (window is not None and window < longest):
        mask = _band(longest, window, query.device)
    outputs = []
    for q, k, v in zip(*(x.split(layout.lengths, dim=2) for x in (query, key, value)), strict=True):
        n = q.shape[2]
        outputs.append(_causal(q, k, v, scale, None if mask is None else mask[:n, :n], softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None) -> Tensor:
    if softcap is not None:
        assert mask is not None, "softcapped attention is computed with an explicit mask"
        return _explicit(q, k, v, mask, scale, softcap)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


def _slots(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Heads of one group share their keys: as rows of one query they need no repeated keys.

    On a CPU two batched products take a third of the fused kernel's time where there are many rows and few keys, and as
    much as it where there are many keys (benchmarks/NOTES.md); in half precision they do not.
    """
    batch, heads, _, dim = q.shape
    groups = k.shape[1]
    if batch > 1 and softcap is None and q.dtype == torch.float32 and not q.is_cuda:
        return _products(q, k, v, mask, scale).view(batch, 1, heads, v.shape[-1])
    q = q.reshape(batch, groups, heads // groups, dim)
    if softcap is not None:
        out = _explicit(q, k, v, mask, scale, softcap)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, v.shape[-1])


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B * G, H / G, D): the two products over batch and groups as one dimension, in as few operations as there are."""
    batch, groups, span, dim = k.shape
    scores = torch.bmm((q * scale).view(batch * groups, -1, dim), k.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores.view(batch, groups, -1, span).masked_fill_(~mask, float("-inf"))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1))


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Attention written out. Gemma 2 bounds its scores by softcap * tanh(scores / softcap), as no fused kernel does
    everywhere."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """(length, length) bool: query i reads keys i-window+1 .. i."""
    lower = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return lower if window is None else lower.triu(1 - window)


AttentionInterface.register(NAME, attend)
