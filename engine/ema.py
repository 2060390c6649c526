"""An exponential moving average of the weights that learn, which follows a policy from optimizer step to step."""

from __future__ import annotations

from pathlib import Path

import torch

from twinhead.engine import lora, weights
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.text import Text

FOLDER = "ema"


class EMA:
    """`policy` is the average, in float32 whatever the weights are: a step of 1 - decay would be lost in bfloat16.

    It starts as the weights are, and has no critic. A base under adapters is one for both, as it never moves.
    """

    def __init__(self, policy: Policy, decay: float, text: Text, resume_from: Path | None = None) -> None:
        self.decay, self.text = decay, text
        if lora.attached(policy.model):  # adapters are float32
            self.policy = policy.frozen_copy()
            if resume_from is not None:
                self._restore(resume_from / FOLDER)
        elif resume_from is None:
            self.policy = policy.frozen_copy()
            self.policy.model.float()
        else:
            self.policy = Policy.from_pretrained(resume_from / FOLDER, "none", torch.float32, policy.device)
            self.policy.requires_grad_(False).eval()

    def follow(self, policy: Policy, optimizer: Optimizer) -> None:
        """From here on every step of the optimizer is followed by one of the average; skipped ones are not."""
        optimizer.followers.append(lambda: self.update(policy))

    @torch.no_grad()
    def update(self, policy: Policy) -> None:
        """average <- decay * average + (1 - decay) * weight."""
        for average, weight in zip(self.policy.model.parameters(), policy.model.parameters(), strict=True):
            if average is not weight:
                average.lerp_(weight.float(), 1.0 - self.decay)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder ema/ beside the policy: a checkpoint of its own, tokenizer included."""
        self.policy.save_pretrained(Path(folder) / FOLDER)
        self.text.save_pretrained(Path(folder) / FOLDER)

    @torch.no_grad()
    def _restore(self, folder: Path) -> None:
        saved = weights.load_tensors(folder / lora.FOLDER / lora.WEIGHTS)
        for name, average in lora.tensors(self.policy.model).items():
            average.copy_(saved[name])
