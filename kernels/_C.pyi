"""The C++ extension, built from csrc/."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", np.float32, np.float64)

def gae(
    rewards: NDArray[Real],  # (N,)
    values: NDArray[Real],  # (N,)
    offsets: NDArray[np.int64],  # (S+1,), rising from 0 to N
    mask: NDArray[np.bool_] | None,  # (N,)
    bootstrap: NDArray[Real] | None,  # (S,)
    gamma: float,
    lam: float,
    whitens: bool,
    threads: int,
    advantages: NDArray[Real],  # (N,), written
    returns: NDArray[Real],  # (N,), written
) -> None: ...
def ppo_loss(
    logprobs: NDArray[Real],  # (R,), and so are the next five
    old_logprobs: NDArray[Real],
    advantages: NDArray[Real],
    values: NDArray[Real],
    old_values: NDArray[Real],
    returns: NDArray[Real],
    entropy: NDArray[Real] | None,  # (R,)
    mask: NDArray[np.bool_] | None,  # (R,)
    clip_low: float,
    clip_high: float,
    dual_clip: float,  # inf: off
    value_clip: float,  # inf: off
    value_coef: float,
    entropy_coef: float,
    divisor: float,  # 0: the number of actions
    threads: int,
    loss: NDArray[Real],  # (1,), written
    statistics: NDArray[Real],  # (10,), written
    slopes: NDArray[Real] | None,  # (2 R,), with entropy (3 R,), written
) -> None: ...
def linear_measure(
    products: NDArray[Real],  # (n, V)
    bias: NDArray[Real] | None,  # (V,)
    targets: NDArray[np.int64],  # (n,), below 0: left out
    scale: float,
    softcap: float,  # inf: none
    temperature: float,
    logprobs: NDArray[Real],  # (n,), written, and so are the next three
    entropy: NDArray[Real],
    peak: NDArray[Real],
    log_sum: NDArray[Real],
    threads: int,
) -> None: ...
def linear_gradient(
    products: NDArray[Real],  # (n, V), overwritten by the gradient
    bias: NDArray[Real] | None,  # (V,)
    targets: NDArray[np.int64],  # (n,), below 0: left out
    scale: float,
    softcap: float,  # inf: none
    temperature: float,
    entropy: NDArray[Real],  # (n,), and so are the next two
    peak: NDArray[Real],
    log_sum: NDArray[Real],
    slopes: NDArray[Real] | None,  # (n,)
    entropy_slopes: NDArray[Real] | None,  # (n,)
    threads: int,
) -> None: ...
def linear_learn(
    products: NDArray[Real],  # (n, V), overwritten by the gradient
    bias: NDArray[Real] | None,  # (V,)
    targets: NDArray[np.int64],  # (n,), below 0: left out
    scale: float,
    softcap: float,  # inf: none
    temperature: float,
    logprobs: NDArray[Real],  # (n,), written, and so are the next three
    entropy: NDArray[Real],
    peak: NDArray[Real],
    log_sum: NDArray[Real],
    old_logprobs: NDArray[Real],  # (n,)
    advantages: NDArray[Real],  # (n,)
    ref_logprobs: NDArray[Real] | None,  # (n,)
    clip_low: float,
    clip_high: float,
    dual_clip: float,  # inf: none
    kl_coef: float,
    kl_estimator: int,  # 1, 2 or 3
    entropy_coef: float,
    divisor: float,
    threads: int,
) -> None: ...
def logprob(
    logits: NDArray[Real],  # (..., V), rows anywhere, words side by side
    index: NDArray[np.int64],  # (..., K), in [0, V) where row_mask is true
    row_mask: NDArray[np.bool_] | None,  # (...)
    temperature: float,
    threads: int,
    logprobs: NDArray[Real],  # (..., K), written, and so are the next two
    entropy: NDArray[Real] | None,  # (...)
    lse: NDArray[Real],  # (..., 2)
) -> None: ...
def logprob_gradient(
    logits: NDArray[Real],  # (..., V), and the next three, as in logprob
    index: NDArray[np.int64],
    row_mask: NDArray[np.bool_] | None,
    temperature: float,
    threads: int,
    lse: NDArray[Real],  # (..., 2), as written by logprob, and so is the next
    entropy: NDArray[Real] | None,  # (...), None only without dentropy
    dlogprobs: NDArray[Real],  # (..., K)
    dentropy: NDArray[Real] | None,  # (...)
    dlogits: NDArray[Real],  # (..., V), written
) -> None: ...
def sample(
    logits: NDArray[Real],  # (B, V), rows without gaps; uint16 for the bits of bfloat16, the other numbers then float32
    uniforms: NDArray[Real],  # (B,)
    temperature: float,  # 0: the likeliest word
    top_k: int,  # 0: off
    top_p: float,  # 1: off
    min_p: float,  # 0: off
    threads: int,
    tokens: NDArray[np.int64],  # (B,), written
    logprobs: NDArray[Real],  # (B,), written
) -> None: ...
def kl(
    p: NDArray[Real],  # (n, V), rows without gaps; uint16 for the bits of bfloat16, kl and moments then float32
    q: NDArray[Real],  # (n, V)
    temperature: float,
    threads: int,
    kl: NDArray[Real],  # (n,), written
    moments: NDArray[Real],  # (n, 5), written
) -> None: ...
def kl_gradient(
    p: NDArray[Real],  # (n, V)
    q: NDArray[Real],  # (n, V)
    temperature: float,
    threads: int,
    moments: NDArray[Real],  # (n, 5)
    slopes: NDArray[Real],  # (n,)
    dp: NDArray[Real] | None,  # (n, V), written; may be p
    dq: NDArray[Real] | None,  # (n, V), written; may be q
) -> None: ...
