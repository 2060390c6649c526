"""A meter of memory: the bytes that live while the passes of a model without data run, and formulas for what it misses.

What the fused head takes (twinhead.kernels._head) is made inside an operator, where the meter does not look.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from twinhead.engine import attention, lora, trunk
from twinhead.engine.batch import Packed, cumulative
from twinhead.engine.config import RunConfig
from twinhead.kernels._head import blocks
from twinhead.kernels.product import TILE, served, wholly

COMPILED = 576 << 10  # bytes of the code for one shape


class Meter(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make while they live; those of `models` are known already."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        known = [x for model in models for x in (*model.parameters(), *model.buffers())]
        self._known = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


def of_a_token(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in all layers."""
    cache, token = DynamicCache(), torch.zeros(1, 1, dtype=torch.int64)
    layout = attention.Ragged((1,), cumulative([1]))
    with torch.no_grad(), trunk.precision(model):
        model.base_model(input_ids=token, position_ids=token, past_key_values=cache, use_cache=True, layout=layout)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return numbers * cache.layers[0].values.element_size()  # as cache.py has it: keys in the dtype of the values


def of_a_pass(model: PreTrainedModel, packed: Packed) -> int:
    """The most that lives during one pass that keeps nothing."""
    with Meter(model) as meter, torch.no_grad():
        trunk.packed_pass(model, packed)
    return meter.peak


def of_compiled(model: PreTrainedModel, rows: int, config: RunConfig) -> int:
    """What oneDNN keeps of products with so many rows: code for every shape of a matrix."""
    if config.device_type != "cpu" or config.dtype != "float32":
        return 0
    shapes = {module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)}
    return COMPILED * sum(served(torch.empty(rows, width), torch.empty(words, width)) for words, width in shapes)


def of_rows(model: PreTrainedModel, packed: Packed, config: RunConfig) -> int:
    """The hidden states of all tokens, and of those that predict."""
    width = model.get_input_embeddings().weight.shape[1]
    return (len(packed.tokens) + packed.num_targets) * width * config.torch_dtype.itemsize


def of_a_block(model: PreTrainedModel, packed: Packed, config: RunConfig) -> int:
    """A block of float32 logits; off the GPU half precision is multiplied in float32, by a copy of the head.

    oneDNN's has rows behind it, and beside it a piece of what is being multiplied.
    """
    layer, rows = model.get_output_embeddings(), next(blocks(packed.targets)).stop
    words, width = layer.weight.shape
    low = lora.through(layer, torch.empty(1, width))
    width += 0 if low is None else low[0].shape[1]  # of the states that the fused head reads
    widened = 4 * words * width if config.dtype != "float32" and config.device_type == "cpu" else 0
    if config.device_type == "cpu" and served(torch.empty(rows, width), torch.empty(words, width)):
        largest = words * max(wholly(rows), width if layer.weight.requires_grad or low is not None else 0)
        return 4 * (wholly(rows) * words + min(TILE, largest)) + widened
    return 4 * rows * words + widened


def of_a_scoring(model: PreTrainedModel, packed: Packed, config: RunConfig) -> int:
    """A pass that keeps nothing, and the head that scores its rows."""
    head = of_a_block(model, packed, config) + of_rows(model, packed, config)
    return max(of_a_pass(model, packed), head)


def of_learning(model: PreTrainedModel, packed: Packed, config: RunConfig, several: bool, early: bool = True) -> int:
    """The most that lives, gradients included, while a micro-batch is learned from; of `several`, the second one.

    early: the fused head finds its gradients with the loss (linear_ppo_loss), else in backward (linear_logprob).
    """
    model.zero_grad()
    if config.gradient_checkpointing:
        trunk.checkpoint_gradients(model)
    layer, block = model.get_output_embeddings(), of_a_block(model, packed, config)
    with Meter(model) as meter:
        for _ in range(2 if several else 1):
            rows, weight = trunk.packed_pass(model, packed)[packed.rows], layer.weight
            if (low := lora.through(layer, rows)) is not None:
                rows, weight = (torch.cat([x, more], dim=1) for x, more in zip((rows, weight), low, strict=True))
            if early:
                loss = EarlyHead.apply(rows, weight, block)
            else:
                loss = LateHead.apply(rows, weight, block)
                del rows, weight, low
            loss.backward()
            del loss
    model.eval()
    return meter.peak


class LateHead(torch.autograd.Function):
    """What linear_logprob holds: a block of logits, and in backward beside it the gradients of rows and matrix."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, block: int) -> Tensor:
        torch.empty(block, dtype=torch.uint8)
        ctx.save_for_backward(rows, weight)
        ctx.block = block
        return rows.new_empty(())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        return *_gradients(rows, weight, ctx.block), None


class EarlyHead(torch.autograd.Function):
    """What linear_ppo_loss holds: the same in forward, and in backward the gradients times the loss's own slope."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(*_gradients(rows, weight, block))
        return rows.new_empty(())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if found is None else found * slope for found in ctx.saved_tensors), None


def _gradients(rows: Tensor, weight: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
    """Those of the matrix are gathered in float32."""
    logits = torch.empty(block, dtype=torch.uint8)
    dweight = torch.empty_like(weight, dtype=torch.float32) if weight.requires_grad else None
    drows = torch.empty_like(rows)
    del logits
    return drows, None if dweight is None else dweight.to(weight.dtype)


def of_a_critic(network: PreTrainedModel, packed: Packed, several: bool) -> int:
    """The same for a critic's own layers, as far as their weights learn."""
    with Meter(network) as meter:
        for _ in range(2 if several else 1):
            trunk.packed_pass(network, packed)[packed.rows].sum().backward()
    return meter.peak
