"""The slot cache: one contiguous stretch of keys and values per running sequence, refilled as sequences finish."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from twinhead.engine.attention import Ragged, Slots


class SlotLayer(CacheLayerMixin):
    """Keys and values of one attention layer, (slots, heads, capacity, D) each."""

    is_sliding = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self._owner = weakref.ref(owner)  # no cycle: the memory goes when the cache does

    @property
    def owner(self) -> SlotCache:
        owner = self._owner()
        assert owner is not None, "a layer is used while its cache lives"
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.owner.num_slots, key_states.shape[1], self.owner.capacity)
        keys = value_states.new_zeros(*shape, key_states.shape[-1])  # mixed precision rotates keys in float32
        self.hold(keys, value_states.new_zeros(*shape, value_states.shape[-1]))

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take these buffers."""
        self.keys, self.values = keys, values
        self.vectors = [memory.view(-1, memory.shape[-1]) for memory in (keys, values)]  # (slots * heads * capacity, D)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens where the owner's layout says; return what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if isinstance(self.owner.layout, Ragged):  # prefill: prompts attend to themselves, packed
            rows, columns = self.owner.rows, self.owner.columns
            self.keys[rows, :, columns] = key_states[0].transpose(0, 1).to(self.keys.dtype)
            self.values[rows, :, columns] = value_states[0].transpose(0, 1)
            return key_states, value_states
        places = self.owner.layout.places(self.keys.shape[1], self.owner.capacity)
        for vectors, states in zip(self.vectors, (key_states, value_states), strict=True):
            vectors.index_copy_(0, places, states.reshape(-1, vectors.shape[-1]).to(vectors.dtype))
        batch, span = len(key_states), self.owner.layout.span
        return self.keys[:batch, :, :span], self.values[:batch, :, :span]

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.capacity, 0


class SlotCache(Cache):
    """`num_slots` sequences of at most `capacity` tokens. Running sequences always occupy slots 0..B-1, so that a
    decode step reads a view of the buffers and copies nothing."""

    def __init__(self, num_layers: int, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.layout: Ragged | Slots
        self.rows: Tensor  # of a prefill: the slot of every token,
        self.columns: Tensor  # and its place in it
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def prefill(self, slots: Sequence[int], layout: Ragged) -> Ragged:
        """The next forward carries whole prompts, packed, into these slots."""
        sequence, self.columns = layout.columns()
        self.rows = torch.tensor(list(slots), device=sequence.device)[sequence]
        self.layout = layout
        return layout

    def decode(self, positions: Tensor, span: int, even: bool) -> Slots:
        """The next forward carries one token for each of the slots 0..len(positions)-1, written at `positions`."""
        self.layout = layout = Slots(positions, span, even)
        return layout

    def resize(self, num_slots: int, capacity: int, running: int, span: int) -> None:
        """Other slots, in which the first `span` tokens of the slots 0..running-1 are what they were."""
        self.num_slots, self.capacity = num_slots, capacity
        for layer in self.layers:
            if layer.is_initialized:
                layer.hold(*(self._resized(m, running, span) for m in (layer.keys, layer.values)))

    def _resized(self, memory: Tensor, running: int, span: int) -> Tensor:
        larger = memory.new_zeros(self.num_slots, memory.shape[1], self.capacity, memory.shape[3])
        larger[:running, :, :span] = memory[:running, :, :span]
        return larger

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in all slots."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of `length` tokens into another slot."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
