"""FlashAttention on a GPU: the flash-attn package where it is installed, else the kernel inside torch.

Dao 2023, "FlashAttention-2" (arXiv 2307.08691). Ragged sequences need neither padding nor a mask, and half precision.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


def serves(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether the kernel takes these (..., D) tensors; torch's own has no softcap."""
    dim = query.shape[-1]
    fits = dim == key.shape[-1] == value.shape[-1] and dim % 8 == 0 and dim <= LARGEST_HEAD
    return query.is_cuda and query.dtype in DTYPES and fits and (softcap is None or package() is not None)


def ragged(
    query: Tensor,  # (T, H, D)
    key: Tensor,  # (T, G, D), G divides H
    value: Tensor,
    cu_seqlens: Tensor,  # (S+1,) int32
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(T, H, D): causal attention within each of S sequences laid end to end, differentiable."""
    left = -1 if window is None else window - 1  # keys before a query's own
    if (flash_attn := package()) is not None:
        return flash_attn.flash_attn_varlen_func(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True,
            window_size=(left, 0 if window else -1), softcap=softcap or 0.0,
        )  # fmt: skip
    grouped: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.12; before, groups are simply allowed
        grouped["enable_gqa"] = True
    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(left, 0), **grouped
    )
    assert isinstance(out, Tensor), "the attention's log-sum-exp was not asked for"
    return out


def slots(
    query: Tensor,  # (B, H, 1, D)
    key: Tensor,  # (B, G, span, D)
    value: Tensor,
    lengths: Tensor,  # (B,) int32, valid keys of every slot
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """(B, 1, H, D): one new token in every slot, whose own key is the last valid one. Needs the flash-attn package."""
    out: Tensor = package().flash_attn_with_kvcache(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), cache_seqlens=lengths, softmax_scale=scale,
        causal=True, window_size=(-1 if window is None else window - 1, 0 if window else -1), softcap=softcap or 0.0,
    )  # fmt: skip
    return out


@cache
def package() -> Any:
    """The flash-attn package, or None where it is not installed."""
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None
