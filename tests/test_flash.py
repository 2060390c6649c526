"""FlashAttention is called as its documentation says: stand-ins with the kernels' signatures and plain arithmetic.

No GPU is needed, and none is proved: tests/test_cuda_engine.py runs the kernels themselves where there is one.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from tests.test_attention import (
    GROUPS,
    HEADS,
    LONG_SEQUENCES,
    SHORT_SEQUENCES,
    WIDTH,
    laid,
    ragged,
    ragged_by_definition,
    tensors,
)
from twinhead.engine import flash
from twinhead.engine.attention import Slots, attend

KERNELS = pytest.mark.parametrize("kernel", ["torch", "torch 2.11", "flash-attn"])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 4, 1000])


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, window: tuple[int, int], causal: bool, softcap: float
) -> Tensor:
    """(T, H, D) as flash-attn documents it: query i of a sequence reads keys i - left .. i + right, -1 is no limit."""
    outputs = []
    left, right = (n if n >= 0 else len(q) for n in window)
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        i = torch.arange(b - a)
        gap = i[None, :] - i[:, None]
        hidden = (gap < -left) | (gap > (0 if causal else right))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[a:b]))
    return torch.cat(outputs)


def of_torch(signature: inspect.Signature) -> Any:
    """torch's kernel: causal is a window that ends at the query, and old ones take no enable_gqa."""

    def call(*args: Any, **options: Any) -> Tensor:
        given = signature.bind(*args, **options)
        given.apply_defaults()
        q, k, v, cu_q, cu_k, longest_q, longest_k = given.args[:7]
        assert torch.equal(cu_q, cu_k)
        assert longest_q == longest_k == cu_q.diff().max()
        assert cu_q.dtype == torch.int32
        assert options.get("enable_gqa", "enable_gqa" not in signature.parameters)
        return one_by_one(q, k, v, cu_q, options["scale"], options["window_size"], False, 0.0)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def packaged() -> SimpleNamespace:
    """The functions of flash-attn 2.8 that are called, with the arguments that they are called with."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        return one_by_one(q, k, v, cu_seqlens_q, softmax_scale, window_size, causal, softcap)

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, softmax_scale: float, causal: bool,
        window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        assert cache_seqlens.dtype == torch.int32
        assert causal, "the one query is the last of the keys"
        rows = []
        for row, n in enumerate(cache_seqlens.tolist()):
            padded = torch.cat([torch.zeros(n - 1, *q.shape[2:]), q[row]])
            keys, values, cu = k_cache[row, :n], v_cache[row, :n], torch.tensor([0, n])
            rows.append(one_by_one(padded, keys, values, cu, softmax_scale, window_size, causal, softcap)[-1:])
        return torch.stack(rows)

    return SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )


def install(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = inspect.signature(varlen_attn)
    old = real.replace(parameters=[p for name, p in real.parameters.items() if name != "enable_gqa"])
    package = packaged() if kernel == "flash-attn" else None
    monkeypatch.setattr(flash, "varlen_attn", of_torch(old if kernel == "torch 2.11" else real))
    monkeypatch.setattr(flash, "package", lambda: package)
    monkeypatch.setattr(flash, "serves", lambda q, k, v, softcap: softcap is None or package is not None)


@KERNELS
@WINDOWS
@pytest.mark.parametrize("lengths", [SHORT_SEQUENCES, LONG_SEQUENCES], ids=str)
def test_ragged_sequences(
    kernel: str, window: int | None, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(kernel, monkeypatch)
    softcap = 0.7 if kernel == "flash-attn" else None
    query, key, value = ragged(sum(lengths))
    out, _ = attend(
        nn.Module(), query, key, value, None, layout=laid(lengths), scaling=0.3, sliding_window=window, softcap=softcap
    )
    expected = ragged_by_definition(query, key, value, lengths, 0.3, window or 10_000, softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@WINDOWS
@pytest.mark.parametrize("kernel", ["torch", "flash-attn"])
def test_slots(kernel: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of three lengths; keys beyond a slot's own are garbage. Without the package they stay with SDPA."""
    span, positions = 9, torch.tensor([8, 3, 0])
    query, key, value = tensors((3, HEADS, 1, WIDTH), (3, GROUPS, span, WIDTH), (3, GROUPS, span, WIDTH))
    expected, _ = attend(nn.Module(), query, key, value, None, layout=Slots(positions, span), sliding_window=window)
    install(kernel, monkeypatch)
    calls = []
    if kernel == "flash-attn":
        kernel_call = flash.package().flash_attn_with_kvcache
        monkeypatch.setattr(
            flash.package(), "flash_attn_with_kvcache", lambda *a, **o: calls.append(a) or kernel_call(*a, **o)
        )
    out, _ = attend(nn.Module(), query, key, value, None, layout=Slots(positions, span), sliding_window=window)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == (kernel == "flash-attn")


@pytest.mark.parametrize(
    ("dim", "dtype", "device", "softcap", "served"),
    [
        (64, torch.bfloat16, "cuda", None, True),
        (64, torch.float16, "cuda", None, True),
        (64, torch.float32, "cuda", None, False),
        (60, torch.bfloat16, "cuda", None, False),
        (264, torch.bfloat16, "cuda", None, False),
        (64, torch.bfloat16, "cuda", 50.0, False),
        (64, torch.bfloat16, "cpu", None, False),
    ],
)
def test_what_the_kernel_takes(
    dim: int, dtype: torch.dtype, device: str, softcap: float | None, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "package", lambda: None)
    like: Any = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, shape=(1, 4, 7, dim))
    assert flash.serves(like, like, like, softcap) == served
    other: Any = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 4, 7, dim + 8))
    assert not flash.serves(like, like, other, softcap), "values of another width"
