"""The C++ twin of sample. It goes around torch's dispatcher, because a generator calls it once per token."""

from __future__ import annotations

import torch
from torch import Tensor

from twinhead.kernels import _C
from twinhead.kernels._precision import wide


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """(B, V), (B,) -> tokens (B,), logprobs (B,). Reads float32, float64 and bfloat16 logits where they lie."""
    dtype = wide(logits)
    logits, rows = logits.detach(), len(logits)
    if logits.dtype == torch.float16:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if logits.dtype == torch.bfloat16:
        logits = logits.view(torch.uint16)  # numpy has no bfloat16
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=dtype)
    _C.sample(
        logits.numpy(),
        uniforms.detach().to(dtype).contiguous().numpy(),
        temperature,
        top_k,
        top_p,
        min_p,
        torch.get_num_threads(),
        tokens.numpy(),
        logprobs.numpy(),
    )
    return tokens, logprobs
