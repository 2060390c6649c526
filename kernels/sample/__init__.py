"""One word per row by inverse transform: the first whose cumulative probability exceeds the row's uniform number.

    p = softmax(logits / temperature), filtered by top-k, then top-p, then min-p, and renormalised
    token = min {v : p_0 + ... + p_v > u}          logprob = log p[token]

top-k keeps the k likeliest words (arXiv 1805.04833), top-p the shortest prefix of the sorted words whose mass reaches p
(arXiv 1904.09751), min-p the words at least min_p times as likely as the likeliest (arXiv 2407.01082). Of equal words
top-k and top-p keep the first, min-p all or none.

Logits, which no backend rounds, decide what ranks higher and what is equal, so top-k keeps the same words everywhere.
The limits of top-p and min-p are rounded, and so are the sums of top-p: of the words that are within rounding errors of
such a limit, in float32 a millionth of the mass, backends may keep fewer or more. What ranks above is kept by all.
"""

from __future__ import annotations

from math import inf

from torch import Tensor

from twinhead.kernels._arguments import expect_between, expect_shape
from twinhead.kernels._dispatch import Backends

_BACKENDS = Backends(__name__, triton="gpu", cpu="cpu", torch="reference")


def sample(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (tokens, logprobs): (B,) int64 and (B,), float32 or wider.

    logits (B, V); uniforms (B,), one number in [0, 1) per row, so that a row's word does not depend on its neighbours.
    The log-probability is that of the distribution the word was drawn from. A word of probability 0 is never drawn.
    `temperature=0` takes the likeliest word, without filters and without using the uniforms, and gives its
    log-probability at temperature 1. `top_k=0`, `top_p=1` and `min_p=0` filter nothing.

    Raises ValueError for shapes that do not fit, a negative temperature or top_k, top_p outside (0, 1], or min_p
    outside [0, 1].
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: expected logits of shape (B, V), V > 0, got {tuple(logits.shape)}")
    expect_shape("sample", "uniforms", uniforms, len(logits))
    expect_between("sample", 0, inf, temperature=temperature, top_k=top_k)
    expect_between("sample", 0, 1, min_p=min_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"sample: expected top_p in (0, 1], got {top_p}")
    return _BACKENDS.pick("sample", logits.device, backend).sample(
        logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
