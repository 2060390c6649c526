"""A watch over the operations that torch runs: how large their results are, and how much they multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}
ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation made, which operations ran, and the work of the matrix products.

    A dispatch mode does not see what happens inside an operator of torch.library, so the watch runs its body itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # elements
        self.multiplications = 0
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if ours := OPDEFS.get(func._schema.name):
            with self:
                return ours._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        self.seen.add(func.overloadpacket)
        if func is ONEDNN:
            self.multiplications += args[0].numel() * len(args[1])
        if func.overloadpacket in MATRIX_PRODUCTS:
            left, right = args[-2:]
            self.multiplications += left.numel() * right.shape[-1]
        return result
