"""Critics with layers of their own: a branch of the policy's top layers, or a second network.

    branch     copies of the trunk's top layers and of what follows them, on the state that enters the policy's own
    separate   a whole network under a scalar head, of whatever width and depth

The branch takes its state as a constant. It has what it needs to learn values by itself, so the policy's weights learn
from the policy's loss alone, as beside a separate critic; where the value loss is to shape the trunk, the critic is
"shared". Neither reads the state that draws a token, so values come from one packed pass and not from decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from twinhead.engine import trunk, weights
from twinhead.engine.attention import Ragged
from twinhead.engine.batch import Example, Packed, pack

BRANCH, SEPARATE = "value_branch.safetensors", "critic"  # what lies beside the policy: a file, and a folder


def found(folder: str | Path, critic: str) -> Path | None:
    """Where a critic of this arrangement lies beside a policy's weights, if there is one."""
    path = Path(folder) / {"branch": BRANCH, "separate": SEPARATE}.get(critic, weights.VALUE_HEAD)
    return path if path.exists() else None


def check_branch(num_layers: int, total: int) -> None:
    """Raise ValueError where a branch of so many layers leaves none of the trunk's below."""
    if not 1 <= num_layers < total:
        raise ValueError(f"branch_layers: expected 1 to {total - 1} of the model's {total} layers, got {num_layers}")


def keep_top(config: PreTrainedConfig, num_layers: int) -> None:
    """Make a trunk's configuration that of its top layers."""
    layers = config.get_text_config()
    layers.num_hidden_layers = num_layers
    if getattr(layers, "layer_types", None):
        layers.layer_types = list(layers.layer_types[-num_layers:])


def value_head(width: int, device: torch.device) -> nn.Linear:
    """(N, H) -> (N, 1) float32, all zero: the first values are 0 and no policy step is led by noise (spec 5.1)."""
    head = nn.Linear(width, 1, dtype=torch.float32, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def read(head: nn.Linear, states: Tensor) -> Tensor:
    """(N, H) -> (N,) float32, outside of autocast: values differ by less than half precision shows."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float()).squeeze(-1)


class Branch(nn.Module):
    """The top `num_layers` layers of a trunk once more, as they are now, under a value head.

    Hugging Face's modelling code runs unchanged: a copy of the trunk that has these layers alone, whose first one is
    handed the state instead of what the copy embeds. Embeddings are the trunk's own and learn nothing here. Raises
    ValueError where the trunk has no layer left below.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        super().__init__()
        check_branch(num_layers, trunk.num_layers(model))
        stack = trunk.layers(model)
        memo: dict[int, Any] = {id(m): m for m in model.base_model.modules() if isinstance(m, nn.Embedding)}
        memo[id(stack)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in stack[-num_layers:])
        self.model: PreTrainedModel = copy.deepcopy(model.base_model, memo)
        keep_top(self.model.config, num_layers)
        shared = {id(p) for p in model.parameters()}
        self.own = {name: p for name, p in self.model.named_parameters() if id(p) not in shared}
        self.value_head = value_head(model.get_input_embeddings().weight.shape[1], model.device)
        self._heard: tuple[Packed, Tensor] | None = None
        self._version = 0  # of the trunk's weights, then
        memo[id(stack)][0].register_forward_pre_hook(self._hand_over, with_kwargs=True)

    @contextmanager
    def listening(self, model: PreTrainedModel, packed: Packed) -> Iterator[None]:
        """Keep the state that enters the top layers of `model` during a pass of `packed`."""

        def hear(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._version = trunk.version(model)
            self.hear(packed, (args[0] if args else kwargs["hidden_states"]).detach())

        handle = trunk.layers(model)[-len(trunk.layers(self.model))].register_forward_pre_hook(hear, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def knows(self, model: PreTrainedModel, packed: Packed) -> bool:
        """Whether the last pass was one of `packed`, under the weights of now, and its state was not used yet."""
        return self._heard is not None and self._heard[0] is packed and self._version == trunk.version(model)

    def hear(self, packed: Packed, state: Tensor) -> None:
        """What the next states() starts from: (1, T, H)."""
        self._heard = packed, state

    def forward(self, packed: Packed) -> Tensor:
        """(T,) float32: the value of the state after every token, of the `packed` that was listened to."""
        return read(self.value_head, self.states(packed))

    def states(self, packed: Packed) -> Tensor:
        """(T, H): what the head reads."""
        assert self._heard is not None and self._heard[0] is packed, "a branch grows from a pass of the same tokens"
        with trunk.precision(self.model):
            output = self.model(
                inputs_embeds=self._heard[1], position_ids=packed.positions[None], use_cache=False,
                layout=Ragged(packed.lengths, packed.cu_seqlens),
            )  # fmt: skip
        self._heard = None
        states: Tensor = output.last_hidden_state[0]
        return states

    def _hand_over(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        assert self._heard is not None, "the branch is entered by states()"
        state = self._heard[1]
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    def self_check(self, model: PreTrainedModel) -> None:
        """New copies must say what the trunk says, and all of them must learn. Raises ValueError."""
        size = model.get_input_embeddings().weight.shape[0]
        packed = pack([Example([], [(7 * i + n) % size for i in range(n)]) for n in (5, 9, 6)], model.device)
        with torch.no_grad(), self.listening(model, packed):
            expected = trunk.packed_pass(model, packed)
        states = self.states(packed)
        trunk.compare("the states of a branch differ from the trunk's", states.detach(), expected)
        own = [*self.own.values()]
        learned: tuple[Tensor | None, ...] = torch.autograd.grad(states.float().square().sum(), own, allow_unused=True)
        if idle := [name for name, gradient in zip(self.own, learned, strict=True) if gradient is None]:
            raise ValueError(
                f"{type(model).__name__} has no branch: expected every weight of it to learn, not {idle[0]!r}"
            )

    def load(self, path: Path) -> None:
        """Put back what save() wrote. Raises ValueError for a branch of other layers."""
        tensors, ours = weights.load_tensors(path), self._tensors()
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in ours.items()}:
            odd = next(iter(sorted(tensors.keys() ^ ours.keys())), "tensors of another shape")
            raise ValueError(f"{path}: expected a branch of {len(trunk.layers(self.model))} layers, got {odd}")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(tensors[name])

    def save(self, folder: Path) -> None:
        """Write value_branch.safetensors: its own layers and its head."""
        weights.save_tensors(folder / BRANCH, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        head = {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return {f"model.{name}": p for name, p in self.own.items()} | head


class Separate(nn.Module):
    """A second network under a value head; only its tokens are the policy's."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        trunk.adopt(model)
        self.model = model
        self.value_head = value_head(model.get_input_embeddings().weight.shape[1], model.device)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None) -> Separate:
        """The trunk of a language model, of a reward model or of a saved critic, and the latter's head."""
        critic = cls(weights.load_trunk(path, dtype))
        head = weights.load_head(path) if Path(path).name == SEPARATE else None  # elsewhere it is another critic's
        if head is not None:
            critic.value_head.load_state_dict(head)
        return critic

    def forward(self, packed: Packed) -> Tensor:
        """(T,) float32: the value of the state after every token."""
        return read(self.value_head, trunk.packed_pass(self.model, packed))

    def save(self, folder: Path) -> None:
        """Write the folder critic/: what AutoModel reads, and the value head."""
        self.model.save_pretrained(folder / SEPARATE)
        weights.save_head(folder / SEPARATE, self.value_head.state_dict())
