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
    threads: int,
    advantages: NDArray[Real],  # (N,), written
    returns: NDArray[Real],  # (N,), written
) -> None: ...
