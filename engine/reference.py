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

from twinhead.engine import checkpoint
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
        """Answer from a table in `folder`, which is first filled with what it does not hold of these examples yet.

        Everything in it is known by what it depends on: a table of other weights, another dtype or another
        configuration is thrown away, and a response that is written or cut in another way is another one.
        """
        fingerprint = policy_fingerprint(policy)
        table = _read(folder / FILE, fingerprint)
        missing = {name: e for e in examples if (name := example_fingerprint(e)) not in table}
        lengths = [len(e.prompt) + len(e.response) for e in missing.values()]
        micros = list(micro_batches(list(missing.items()), lengths, tokens_per_micro))
        console = Console(stderr=True)
        for micro in track(micros, "reference", console=console, transient=True, disable=not console.is_terminal):
            names, asked = zip(*micro, strict=True)
            with torch.no_grad():
                found = response_logprobs(policy, pack(asked, policy.device))
            table |= zip(names, found.tolist(), strict=True)
        if missing:
            checkpoint.write_file(folder / FILE, json.dumps({"policy": fingerprint, "logprobs": table}))
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
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def example_fingerprint(example: Example) -> str:
    """A hash of the token ids of prompt and response, and of which of them are targets."""
    learn = b"" if example.learn is None else bytes(example.learn)
    digest = hashlib.blake2b(array("q", [len(example.prompt)]), digest_size=12)
    for part in (array("q", example.prompt), array("q", example.response), learn):
        digest.update(part)
    return digest.hexdigest()


def _read(file: Path, fingerprint: str) -> dict[str, float]:
    """The table in a file; empty where there is none of this policy."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return kept["logprobs"] if kept.get("policy") == fingerprint else {}
