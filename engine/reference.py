"""The reference policy: log-probs of whole responses under weights that never move, asked for or computed once."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from twinhead.engine import checkpoint, ranks
from twinhead.engine.batch import Example, Packed, micro_batches, pack, segment_sum
from twinhead.engine.policy import Policy
from twinhead.engine.trunk import MIXED

FILE = "reference.json"  # {"policy": its fingerprint, "logprobs": {fingerprint of a response: its log-prob}}


def response_logprobs(policy: Policy, packed: Packed) -> Tensor:
    """(S,) float32: the sum over each response's target tokens of log pi, at temperature 1."""
    return segment_sum(policy(packed, entropy=False).logprobs, packed.cu_rows)


class Reference:
    """log pi_ref of whole responses: from a policy that is held in memory, or from a table that it left behind."""

    def __init__(self, policy: Policy | None, table: Mapping[str, float] | None = None) -> None:
        assert (policy is None) != (table is None), "either the policy answers or its table"
        self.policy, self.table = policy, table

    @classmethod
    def precomputed(cls, policy: Policy, examples: Sequence[Example], folder: Path, tokens_per_micro: int) -> Reference:
        """Answer from a table in `folder`, which all ranks first fill with what it does not hold of these examples yet.

        Everything in it is known by what it depends on: a table of other weights, another dtype or another
        configuration is thrown away, and a response that is written or cut in another way is another one.
        """
        fingerprint = policy_fingerprint(policy)
        table = _read(folder / FILE, fingerprint)
        missing = {name: e for e in examples if (name := example_fingerprint(e)) not in table}
        named = [*missing.items()]

        def ask(part: range) -> dict[str, float]:
            return _ask(policy, named[part.start : part.stop], tokens_per_micro)

        for found in ranks.spread(ask, len(named)):
            table |= found
        if missing:
            content = json.dumps({"policy": fingerprint, "logprobs": table})
            ranks.first(lambda: checkpoint.write_file(folder / FILE, content))
        return cls(None, table)

    @torch.no_grad()
    def __call__(self, packed: Packed, examples: Sequence[Example]) -> Tensor:
        """(S,) float32, of `examples` as they were packed."""
        if self.table is None:
            assert self.policy is not None, "without a table there is a policy"
            return response_logprobs(self.policy, packed)
        known = [self.table[example_fingerprint(e)] for e in examples]
        return torch.tensor(known, dtype=torch.float32, device=packed.tokens.device)


def policy_fingerprint(policy: Policy) -> str:
    """A hash of all that its log-probs depend on: every weight and its dtype, the configuration, the precision."""
    origin = ("_name_or_path", "transformers_version")
    settings = {name: value for name, value in policy.model.config.to_dict().items() if name not in origin}
    settings["mixed"] = getattr(policy.model, MIXED, False)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for tensor in policy.state().values():
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def example_fingerprint(example: Example) -> str:
    """A hash of the token ids of prompt and response, and of which of them are targets."""
    learn = b"" if example.learn is None else bytes(example.learn)
    digest = hashlib.blake2b(array("q", [len(example.prompt)]), digest_size=12)
    for part in (array("q", example.prompt), array("q", example.response), learn):
        digest.update(part)
    return digest.hexdigest()


@torch.no_grad()
def _ask(policy: Policy, named: Sequence[tuple[str, Example]], tokens_per_micro: int) -> dict[str, float]:
    """What the policy says of examples, by their fingerprints."""
    lengths = [len(e.prompt) + len(e.response) for _, e in named]
    micros = list(micro_batches(named, lengths, tokens_per_micro))
    console = Console(stderr=True, quiet=ranks.rank() > 0)
    table: dict[str, float] = {}
    for micro in track(micros, "reference", console=console, transient=True, disable=not console.is_terminal):
        found = response_logprobs(policy, pack([example for _, example in micro], policy.device))
        table |= zip((name for name, _ in micro), found.tolist(), strict=True)
    return table


def _read(file: Path, fingerprint: str) -> dict[str, float]:
    """The table in a file; empty where there is none of this policy."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return kept["logprobs"] if kept.get("policy") == fingerprint else {}
