"""What the operations ask of their arguments: each refusal is a ValueError of one sentence, what, expected, got."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def expect_shape(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    """`tensor` has exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: expected {name} of shape {shape}, got {tuple(tensor.shape)}")


def expect_like(op: str, name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Every tensor of `others` that is given has the shape of `tensor`, which is called `name`."""
    for other, given in others.items():
        if given is not None and given.shape != tensor.shape:
            expected = f"expected {other} of the shape of {name}, {tuple(tensor.shape)}"
            raise ValueError(f"{op}: {expected}, got {tuple(given.shape)}")


def expect_choice(op: str, name: str, value: str, choices: Collection[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: expected {name} to be one of {', '.join(choices)}, got {value!r}")


def expect_positive(op: str, **values: float | None) -> None:
    """Every value that is given is above zero."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{op}: expected {name} > 0, got {value}")


def expect_between(op: str, low: float, high: float, **values: float | None) -> None:
    """Every value that is given lies in [low, high]."""
    for name, value in values.items():
        if value is not None and not low <= value <= high:
            raise ValueError(f"{op}: expected {name} in [{low}, {high}], got {value}")


def expect_targets(op: str, name: str, targets: Tensor, vocabulary: int, ignore_index: int | None = None) -> None:
    """Whole numbers in [0, vocabulary), or `ignore_index`.

    Only CPU values are read, and not by torch.compile: a GPU would have to sync, and a graph would break.
    """
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: expected {name} of dtype int64, got {targets.dtype}")
    if targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if wrong.any():
        raise ValueError(f"{op}: expected {name} in [0, {vocabulary}), got {targets[wrong][0].item()}")


def expect_offsets(op: str, cu_seqlens: Tensor, total: int) -> None:
    """(S+1,) whole numbers that rise from 0 to `total`. Values are read where expect_targets reads them."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{op}: expected cu_seqlens int32 of shape (S + 1,), got {got}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    if first != 0 or last != total or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{op}: expected cu_seqlens to rise from 0 to {total}, got {cu_seqlens.tolist()}")
