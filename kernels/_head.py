"""The vocabulary matrix, met by one block of rows at a time, so that the logits never exist as a whole.

With cap(x) = softcap * tanh(x / softcap), or x where no softcap is given, the logits are

    z = cap(logit_scale * (hidden @ weight.T + bias)) / temperature
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from twinhead.kernels.product import add, fill, served, whole, wholly

# Every block reads and writes the whole gradient of the matrix once, which pays off from a few hundred rows: for
# linear_ppo_loss on a CPU, 512 rows are within 4% of the best size at 512, 4096, 32000 and 151936 words, and 64 rows
# cost 8 to 15% more. A GPU multiplies a hundred times faster than it moves that gradient, so its blocks are larger.
BLOCK_ROWS_CPU = 512
BLOCK_ROWS_GPU = 2048

GROUP = 16  # numbers; rows that begin at a multiple of it let a GPU load 16 bytes at a time, whatever the vocabulary


def blocks(hidden: Tensor) -> Iterator[slice]:
    """Even slices over the rows of `hidden`; at least two, so that no block is as large as the logits, at any size."""
    rows, limit = len(hidden), BLOCK_ROWS_CPU if hidden.device.type == "cpu" else BLOCK_ROWS_GPU
    count = max(2, -(-rows // limit))
    size = -(-rows // count)
    for start in range(0, rows, max(size, 1)):
        yield slice(start, start + size)


def refuse_second_derivative(op: str) -> None:
    """For a backward that autograd cannot differentiate; grad mode is only on in there under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} can be differentiated once: expected create_graph=False, got True")


class Head:
    """From hidden states to products and logits, and from the gradient of the logits to that of the products."""

    def __init__(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        dtype: torch.dtype,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        self.dtype, self.softcap, self.temperature = dtype, softcap, temperature
        self.scale = logit_scale if softcap is not None else logit_scale / temperature
        self.weight = weight if _multiplies_into_float32(weight) else weight.to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self._memory: Tensor | None = None

    def products(self, hidden: Tensor) -> Tensor:
        """hidden @ weight.T, (n, D) -> (n, V), in the working dtype; the next call overwrites the result."""
        rows, words = len(hidden), len(self.weight)
        if by_onednn := served(wide := hidden.to(self.weight.dtype), self.weight):
            wide = whole(wide)
        if self._memory is None or len(self._memory) < len(wide):  # new memory costs a page fault every 4 KB
            stride = words if hidden.device.type == "cpu" else -(-words // GROUP) * GROUP
            self._memory = hidden.new_empty(len(wide), stride, dtype=self.dtype)[:, :words]
        products = self._memory[:rows]
        if by_onednn:
            fill(self._memory[: len(wide)], wide, self.weight)
            return products
        if hidden.dtype == self.weight.dtype != self.dtype:
            return torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=products)
        return products.addmm_(hidden.to(self.dtype), self.weight.to(self.dtype).t(), beta=0)

    def whole(self, dz: Tensor) -> Tensor:
        """`dz` (n, V) with rows of zeros behind it: those of products() if it stands in their memory, else a copy."""
        if self._memory is not None and dz.data_ptr() == self._memory.data_ptr():
            return self._memory[: wholly(len(dz))]
        return whole(dz)

    def capped(self, products: Tensor) -> Tensor:
        """The logits, in the memory of the products."""
        z = products
        if self.bias is not None:
            z += self.bias
        if self.scale != 1:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V) in the working dtype; the next call overwrites the result."""
        return self.capped(self.products(hidden))

    def through_cap(self, dz: Tensor, z: Tensor) -> Tensor:
        """dz becomes, in place, the gradient of hidden @ weight.T + bias; z is spent."""
        if self.softcap is not None:
            tanh = z.mul_(self.temperature / self.softcap)
            dz *= tanh.square_().neg_().add_(1).div_(self.temperature)
        return dz.mul_(self.scale) if self.scale != 1 else dz


class HeadGradient:
    """The gradients of hidden, weight and bias, gathered block by block; what nobody needs is not computed.

    The weight's gradient is a sum over all blocks and is kept in the working dtype: rounding every block's part to
    half precision would bias training.
    """

    def __init__(self, head: Head, hidden: Tensor, needs: Sequence[bool]) -> None:
        self.head, (needs_hidden, needs_weight, needs_bias) = head, needs
        words, width = head.weight.shape
        self.hidden = hidden.new_empty(hidden.shape) if needs_hidden else None
        self.weight = torch.zeros(words, width, dtype=head.dtype, device=hidden.device) if needs_weight else None
        self.bias = torch.zeros(words, dtype=head.dtype, device=hidden.device) if needs_bias else None

    def add(self, rows: slice, hidden: Tensor, dz: Tensor) -> None:
        """One block: its hidden states (n, D), and the gradient of their products with the matrix, (n, V)."""
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.head.dtype)
        if _multiplies_into_float32(self.head.weight):
            dz = dz.to(self.head.weight.dtype)
        if served(dz, self.head.weight.t()):
            self._add_whole(rows, whole(hidden.to(dz.dtype)), self.head.whole(dz))
            return
        if self.hidden is not None:
            _set_product(self.hidden[rows], dz, self.head.weight, self.head.dtype)
        if self.weight is not None:
            _add_product(self.weight, dz.t(), hidden)

    def _add_whole(self, rows: slice, hidden: Tensor, dz: Tensor) -> None:
        """The same for blocks that have rows of zeros behind them."""
        if self.hidden is not None:
            fill(self.hidden[rows], dz, self.head.weight.t())
        if self.weight is not None:
            add(self.weight, dz, hidden)

    def result(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients in the dtypes of what they are gradients of."""
        dweight = None if self.weight is None else self.weight.to(weight.dtype)
        dbias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, dweight, dbias


def _multiplies_into_float32(weight: Tensor) -> bool:
    """CUDA multiplies half precision into a float32 result; elsewhere the matrix must be widened first."""
    return weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if left.dtype == right.dtype and _multiplies_into_float32(right):
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _set_product(result: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """`result` may hold anything, also NaN."""
    if left.dtype == right.dtype == result.dtype:
        result.addmm_(left, right, beta=0)
    else:
        result.copy_(_product(left, right, dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right, total.dtype)
