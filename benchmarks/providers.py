"""Who computes it: torch as anybody would write it, torch.compile, our backends, and the functions of the peers.

`providers(op)` gives for every name a maker: a function from a problem to a `Call`, which raises `peers.Missing` with
the reason where that contender cannot run. Layouts are made before the clock starts: a peer that works on padded
batches gets padded batches, ours get packed ones. The eager version is also the definition: in float64 it is what all
of them are checked against.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import heads, logits, tokens
from benchmarks.contender import EAGER, Maker

_BY_OP: dict[str, Callable[[], dict[str, Maker]]] = {
    "selective_log_softmax": logits.selective_log_softmax,
    "selective_log_softmax_and_entropy": logits.selective_log_softmax_and_entropy,
    "linear_logprob": heads.linear_logprob,
    "linear_ppo_loss": heads.linear_ppo_loss,
    "linear_kl": heads.linear_kl,
    "full_kl": logits.full_kl,
    "gae": tokens.gae,
    "ppo_loss": tokens.ppo_loss,
    "sample": logits.sample,
}
OPS = tuple(_BY_OP)


def providers(op: str) -> dict[str, Maker]:
    """All who compute `op`, in the order of the tables."""
    return _BY_OP[op]()


def eager(op: str) -> Maker:
    """The definition of `op`."""
    return providers(op)[EAGER]
