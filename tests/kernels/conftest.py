"""What the tests of the kernels share: a watch over the operations that torch runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation made, and the work of the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # elements
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in made)])
        if func in MATRIX_PRODUCTS:
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        assert "bmm" not in str(func), "the watch does not count batched products"
        return result


@pytest.fixture
def watch() -> Watch:
    return Watch()
