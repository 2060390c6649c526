"""One frozen base for four models: the policy and its critic, the reference, and the reward model, by their adapters.

    policy, critic   the adapter that learns, and the value head
    reference        adapters off: the base itself
    reward model     an adapter and a head of its own, trained on the same base

Each is asked through a view of the policy's model, which turns its adapters on for the pass and then puts back what was
on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from twinhead.engine import lora
from twinhead.engine.batch import Packed
from twinhead.engine.policy import Policy, RewardModel, normalisation
from twinhead.engine.scorers import check_tokenizer
from twinhead.engine.text import Text


class BasePolicy(Policy):
    """A policy's base with its adapters off: what it was before it learned, without a second copy."""

    def __init__(self, policy: Policy) -> None:
        assert lora.attached(policy.model), "without adapters the policy's own weights have moved"
        nn.Module.__init__(self)
        _look(self, policy.model)
        self.critic, self.value_head, self.network, self.kept = "none", None, None, None
        self.logit_transform = policy.logit_transform

    def hidden(self, packed: Packed) -> Tensor:
        """(T, H): the trunk pass without adapters, and without gradients."""
        with torch.no_grad(), lora.using(self.model, None):
            return super().hidden(packed)

    def low_rank(self, rows: Tensor) -> None:
        """The base's head has no adapter."""

    def state(self) -> dict[str, Tensor]:
        """The tensors of the base."""
        return lora.base(self.model)


class GuestRewardModel(RewardModel):
    """A reward model whose adapter lives on the policy's base, and whose head is all that it owns.

    Raises ValueError for a checkpoint of a reward model that has no adapter, or one of another base.
    """

    def __init__(self, policy: Policy, path: str | Path, name: str = "reward") -> None:
        nn.Module.__init__(self)
        _look(self, policy.model)
        heads = lora.load(policy.model, path, name)
        if "score.weight" not in heads:
            raise ValueError(f"reward_model: expected an adapter with a score head, got a policy's in {str(path)!r}")
        self.name = name
        self.score = nn.Linear(heads["score.weight"].shape[1], 1, bias=False, device=policy.device)
        self.score.requires_grad_(False).weight.copy_(heads["score.weight"])
        self.mean, self.spread = normalisation(AutoConfig.from_pretrained(path))

    @property
    def head(self) -> nn.Linear:
        return self.score

    def raw(self, packed: Packed) -> Tensor:
        """(S,) float32 scores before normalisation, without gradients."""
        with torch.no_grad(), lora.using(self.model, self.name):
            return super().raw(packed)


def reward_model(policy: Policy, path: str, text: Text, number: int = 0) -> GuestRewardModel:
    """A reward model, one of several, on the policy's base. Raises ValueError for one that does not belong there."""
    check_tokenizer(path, text)
    return GuestRewardModel(policy, path, f"reward_{number}")


def reference(policy: Policy) -> BasePolicy | None:
    """The base of a policy that learns by adapters; None for one whose own weights move."""
    return BasePolicy(policy) if lora.attached(policy.model) else None


def _look(view: nn.Module, model: PreTrainedModel) -> None:
    """Let a view see the model without owning it: a submodule would be frozen, moved and counted with the view."""
    object.__setattr__(view, "model", model)
