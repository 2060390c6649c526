"""Residence: frozen models live in the host's memory and come to the device only while they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[dict[str, Any], str, Tensor]  # a module's table of tensors, a name in it, what stands there


def pinned(model: nn.Module) -> None:
    """Move the tensors of `model` into page-locked memory, which a GPU reads at the full rate of the bus."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.pin_memory()


@contextmanager
def resident(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Lend the tensors of a frozen `model` to `device` for the time of the block; one that lives there stays as it is.

    The originals are not touched and nothing is copied back, so what the block writes into them is lost: raises
    ValueError for a model with trainable parameters. No model at all is no work.
    """
    places = [] if model is None else _away(model, device)
    if any(tensor.requires_grad for _, _, tensor in places):
        raise ValueError(f"residence: expected a frozen model to lend to {device}, got trainable parameters")
    guests: dict[Tensor, Tensor] = {}  # a tensor that stands in two places, as tied weights do, travels once
    try:
        for table, name, tensor in places:
            if tensor not in guests:
                moved = tensor.detach().to(device, non_blocking=True)
                guests[tensor] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
            table[name] = guests[tensor]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor


def _away(model: nn.Module, device: torch.device) -> list[Place]:
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    return [
        (table, name, tensor)
        for table in tables
        for name, tensor in table.items()
        if tensor is not None and tensor.device.type != device.type
    ]
