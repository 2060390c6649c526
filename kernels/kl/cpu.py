"""The C++ twin of full_kl: one pass over two rows of logits forward, one backward."""

from __future__ import annotations

import sys

import torch
from numpy.typing import NDArray
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels._precision import wide
from twinhead.kernels.kl.operator import fused


def measure(p: Tensor, q: Tensor, temperature: float, kl: Tensor, moments: Tensor) -> None:
    """See Pass in operator.py."""
    _C.kl(_array(p), _array(q), temperature, torch.get_num_threads(), _array(kl), _array(moments))


def gradient(
    p: Tensor,
    q: Tensor,
    temperature: float,
    moments: Tensor,
    slopes: Tensor,
    dp: Tensor | None,
    dq: Tensor | None,
) -> None:
    """See Pass in operator.py."""
    found = (None if x is None else _array(x) for x in (dp, dq))
    _C.kl_gradient(_array(p), _array(q), temperature, torch.get_num_threads(), _array(moments), _array(slopes), *found)


def _array(tensor: Tensor) -> NDArray:
    # numpy has no bfloat16
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


_full_kl = fused("cpu", sys.modules[__name__])


def full_kl(logits: Tensor, ref_logits: Tensor, *, direction: str, temperature: float) -> Tensor:
    """(..., V) twice -> (...). Reads float32, float64 and bfloat16 where they lie."""
    if logits.dtype == torch.float16 or ref_logits.dtype == torch.float16:
        dtype = wide(logits, ref_logits)
        logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    return _full_kl(logits, ref_logits, direction=direction, temperature=temperature)
