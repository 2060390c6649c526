"""Everything is computed in float32 or wider, whatever the inputs are."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among the tensors, and at least float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast, should the caller have it on, does not round matrix products to half precision."""
    return torch.autocast(device.type, enabled=False)
