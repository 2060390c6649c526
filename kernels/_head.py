"""The vocabulary matrix, met by one block of rows at a time, so that the logits never exist as a whole.

With cap(x) = softcap * tanh(x / softcap), or x where no softcap is given, the logits are

    z = cap(logit_scale * (hidden @ weight.T + bias)) / temperature
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 512 rows and 512 words are 1 MB of logits, which stays in a core's cache; a GPU reads and writes the whole gradient of
# the matrix once per block, so its blocks are larger
BLOCK_ROWS_CPU = 512
BLOCK_ROWS_GPU = 2048

# the log-probability that stands for log 0: its exp is 0 in every dtype, and its product with 0 is 0 and not NaN
LOG_ZERO = -1e4


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
    """From hidden states to logits, and from the gradient of the logits to the gradient of the matrix product."""

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
        self.bias = None if bias is None else bias.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), a new tensor in the working dtype."""
        z = _product(hidden, self.weight.t(), self.dtype)
        if self.bias is not None:
            z += self.bias
        if self.scale != 1:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z

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

    def __init__(self, head: Head, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self.head, (needs_hidden, needs_weight, needs_bias) = head, needs
        words, width = head.weight.shape
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight = torch.zeros(words, width, dtype=head.dtype, device=hidden.device) if needs_weight else None
        self.bias = torch.zeros(words, dtype=head.dtype, device=hidden.device) if needs_bias else None

    def add(self, rows: slice, hidden: Tensor, dz: Tensor, z: Tensor) -> None:
        """One block: its hidden states (n, D), its logits z (n, V), and their gradient dz; the last two are spent."""
        dz = self.head.through_cap(dz, z)
        if self.bias is not None:
            self.bias += dz.sum(0)
        if _multiplies_into_float32(self.head.weight):
            dz = dz.to(self.head.weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _product(dz, self.head.weight, self.head.dtype)
        if self.weight is not None:
            _add_product(self.weight, dz.t(), hidden)

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


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right, total.dtype)
