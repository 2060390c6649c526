"""Arrangements of PPO's four models, and the bytes that each takes: what to choose when they do not fit.

four models   policy, critic, reference and reward model, each whole
one trunk     the critic is a head on the policy
adapters      and the policy learns by adapters: the reference is its base
share all     and the reward model is one more adapter on that base
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from twinhead.engine import lora, planning
from twinhead.engine.lora import Lora
from twinhead.engine.outline import outline
from twinhead.engine.rollout_options import PPO

RANK = 16  # of adapters where the options ask for none


@dataclass(frozen=True)
class Arrangement:
    """Bytes of the models' weights, and of the gradients and Adam's moments of those that learn."""

    name: str
    weights: int
    learning: int
    one: int  # weights of one model, the least that there can be

    def row(self) -> list[str]:
        """Megabytes, and how many models they are."""
        sizes = [f"{size / planning.MB:,.1f}" for size in (self.weights, self.learning, self.weights + self.learning)]
        return [self.name, *sizes, f"{self.weights / self.one:.2f}"]


def arrangements(config: PPO) -> list[Arrangement]:
    """Every arrangement of models of the size of config.model. Raises ValueError as planning.plan does."""
    chosen = Lora.of(config) or Lora(RANK, 2 * RANK)
    with FakeTensorMode():
        model = outline(AutoModelForCausalLM, config.model, config)
        every: list[nn.Parameter] = list(model.parameters())
        trunk: list[nn.Parameter] = list(model.base_model.parameters())  # a critic and a reward model have another head
        lora.attach(model, chosen, empty=True)
        adapter: list[nn.Parameter] = list(lora.tensors(model).values())
        ids = {id(p) for p in model.base_model.parameters()}
        guest = [p for p in adapter if id(p) in ids]  # a reward model has no head of the vocabulary to adapt
        head = [nn.Parameter(torch.empty(model.get_input_embeddings().weight.shape[1] + 1, dtype=torch.float32))]

        def arranged(name: str, models: Sequence[nn.Parameter], learners: Sequence[nn.Parameter]) -> Arrangement:
            learning = sum(planning.moments(config, p) for p in learners) + sum(p.nbytes for p in learners)
            return Arrangement(name, sum(p.nbytes for p in models), learning, sum(p.nbytes for p in every))

        rank, critic = f"rank {chosen.rank}", trunk + head
        return [
            arranged("four models", every + every + critic + critic, every + critic),
            arranged("one trunk", every + head + every + critic, every + head),
            arranged(f"adapters of {rank}", every + adapter + head + critic, adapter + head),
            arranged(f"share all, {rank}", every + adapter + head + guest + head, adapter + head),
        ]


def table(config: PPO) -> Table:
    """One row per arrangement."""
    title = "arrangements of PPO's four models"
    rows = Table("MB", "weights", "gradients and Adam", "both", "weights of one", title=title)
    for column in rows.columns[1:]:
        column.justify = "right"
    for arrangement in arrangements(config):
        rows.add_row(*arrangement.row())
    return rows
