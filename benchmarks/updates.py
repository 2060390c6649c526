"""How fast is training: the SFT loss of ragged sequences, forward and backward, ours packed, transformers' both ways.

The gate is one stock pass per sequence in float32: the loss and the whole gradient must be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import race, shapes
from benchmarks.race import Entrant, Maker, Race, Wrong
from benchmarks.rollouts import HALF_BILLION
from benchmarks.shapes import PAD, Shape
from twinhead.engine import Example, pack

OURS, PADDED, PACKED = f"{race.OURS} packed", "HF padded", "HF packed"
# Relative, of loss and gradient. Half precision: every stock pass in bfloat16 is 6e-2 from the one in float32.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
UNLEARNED = -100  # the label that transformers' loss leaves out

Loss = Callable[[], Tensor]
Truth = tuple[float, list[Tensor]]  # loss, and the gradient of every parameter


def main(device: str, quick: bool, results: Path, minutes: float | None = None) -> None:
    """Measure every case on `device` and write train_DEVICE.json into `results`; raises SystemExit as race.run does."""
    found = Race("train", cases(torch.device(device), quick), (OURS, PADDED, PACKED), PADDED)
    race.run(found, device, quick, results, minutes)


@dataclass(frozen=True)
class Training:
    """Sequences of uniformly random lengths, the first half of each a prompt; one step on all of them."""

    shape: Shape
    dtype: torch.dtype
    batch: int = 16
    shortest: int = 32
    longest: int = 512

    @property
    def title(self) -> str:
        lengths = f"{self.batch} sequences of {self.shortest} to {self.longest} tokens"
        return f"{self.shape.title}, {lengths}, {shapes.name(self.dtype)}"

    @property
    def steps(self) -> int | None:
        return 1

    @cached_property
    def examples(self) -> list[Example]:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(self.shortest, self.longest, (self.batch,), generator=generator).tolist()
        return [Example(s[: len(s) // 2], s[len(s) // 2 :]) for s in self.shape.sequences(lengths)]

    def entrants(self, device: torch.device) -> Mapping[str, Maker]:
        model = self.shape.model(self.dtype, device).train()
        truth = one_by_one(self.examples, copy.deepcopy(model).float())
        makers = {OURS: ours, PADDED: padded, PACKED: packed}
        return {name: partial(self._entrant, make, truth, model) for name, make in makers.items()}

    def _entrant(
        self, make: Callable[[list[Example], PreTrainedModel], Loss], truth: Truth, model: PreTrainedModel
    ) -> Entrant:
        own = copy.deepcopy(model)
        loss = make(self.examples, own)

        def run() -> None:
            loss().backward()
            own.zero_grad()  # afterwards: the gradients are part of what the step holds

        return Entrant(run, lambda: self.figures(loss, own, truth))

    def figures(self, loss: Loss, model: PreTrainedModel, truth: Truth) -> dict[str, float]:
        """`tokens`, and `error`: the relative one of the loss, the gradient's norm or the gradient. Raises Wrong."""
        value = loss()
        value.backward()
        pairs = [(p.grad.float(), g) for p, g in zip(model.parameters(), truth[1], strict=True) if p.grad is not None]
        if len(pairs) < len(truth[1]):
            raise Wrong(f"{len(truth[1]) - len(pairs)} parameters without a gradient")
        norm, distance = _norm([g for _, g in pairs]), _norm([found - g for found, g in pairs])
        error = max(abs(value.item() / truth[0] - 1), abs(_norm([g for g, _ in pairs]) / norm - 1), distance / norm)
        model.zero_grad()
        if not error <= TOLERANCES[self.dtype]:
            raise Wrong(f"error {error:.1e} of the loss or the gradient, expected at most {TOLERANCES[self.dtype]:.0e}")
        return {"tokens": sum(len(e.prompt) + len(e.response) for e in self.examples), "error": error}


def cases(device: torch.device, quick: bool) -> list[Training]:
    """Two vocabularies; bfloat16 where it is fast; on a GPU a real shape too."""
    if quick:
        tiny = Shape(64, hidden=32, inner=48, layers=2, heads=4, groups=2)
        return [Training(tiny, torch.float32, batch=4, shortest=4, longest=20)]
    found = [Training(Shape(vocabulary), dtype) for dtype in shapes.dtypes(device) for vocabulary in (8192, 32000)]
    return [*found, *([Training(HALF_BILLION, torch.bfloat16)] if device.type == "cuda" else [])]


def ours(examples: list[Example], model: PreTrainedModel) -> Loss:
    """What `twinhead.engine.sft` steps on."""
    policy, batch = shapes.policy(model, "none"), pack(examples, model.device)
    return lambda: -policy(batch, entropy=False).logprobs.sum() / batch.num_targets


def padded(examples: list[Example], model: PreTrainedModel) -> Loss:
    """A row per sequence, as long as the longest."""
    longest = max(len(e.prompt) + len(e.response) for e in examples)
    tokens = torch.full((len(examples), longest), PAD)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, UNLEARNED)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.response)
        tokens[row, :end] = torch.tensor(example.prompt + example.response)
        mask[row, :end] = 1
        labels[row, start:end] = tokens[row, start:end]
    given = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return _stock_loss(model, given)


def packed(examples: list[Example], model: PreTrainedModel) -> Loss:
    """One row of all sequences; positions that start again tell transformers where one ends."""
    batch = pack(examples)
    labels = torch.full_like(batch.tokens, UNLEARNED)
    labels[batch.rows + 1] = batch.targets
    given = {"input_ids": batch.tokens, "position_ids": batch.positions, "labels": labels}
    return _stock_loss(model, {name: tensor[None] for name, tensor in given.items()})


def _stock_loss(model: PreTrainedModel, given: dict[str, Tensor]) -> Loss:
    given = {name: tensor.to(model.device) for name, tensor in given.items()}
    return lambda: model(**given, use_cache=False).loss


def one_by_one(examples: list[Example], model: PreTrainedModel) -> Truth:
    """The loss and its gradients from a stock pass per sequence: nothing to pad, nothing to tell apart."""
    total, targets = 0.0, sum(len(example.response) for example in examples)
    for example in examples:
        ids = torch.tensor([example.prompt + example.response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
        loss = F.cross_entropy(logits, ids[0, len(example.prompt) :], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in model.parameters() if p.grad is not None]


def _norm(tensors: list[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
