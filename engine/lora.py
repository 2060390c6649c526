"""Low-rank adapters on a frozen base, through peft: attached, switched, saved beside what they amount to.

Hu et al. 2021 (LoRA): a layer computes W x + (alpha / rank) B A x, and A and B alone learn. W is never written to, here
or in generation, which runs unmerged: to add B A and subtract it again would leave another W behind. One base may carry
several adapters, of which at most one is on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twinhead.engine.config import RunConfig

if TYPE_CHECKING:  # it takes seconds to import, which only those with adapters should wait for
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

EVERY = "all-linear"  # of the trunk, as peft calls them
LEARNER = "default"  # name of the adapter that is trained, and on
FOLDER = "adapter"  # in a checkpoint; beside the weights, transformers would load adapters on top of what is merged
CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."  # of every name in peft's files
FINGERPRINT = "twinhead_base"  # an attribute of models whose frozen base was hashed


@dataclass(frozen=True, slots=True)
class Lora:
    """What adapters look like: alpha / rank scales them; targets are the last names of layers, none: EVERY."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Lora | None:
        """The adapters that the options ask for; None without lora_rank."""
        if not config.lora_rank:
            return None
        alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        return cls(config.lora_rank, alpha, config.lora_targets, config.seed)

    def layers(self, model: PreTrainedModel) -> dict[str, Any]:
        """The layers that get an adapter, by name. Raises ValueError for a target that is not there.

        EVERY names all linear layers of the trunk; the embedding and the head of the vocabulary have to be named, and a
        reward model has no such head.
        """
        trunk = {id(m) for m in model.base_model.modules() if isinstance(m, nn.Linear | Conv1D)}
        words = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        found: dict[str, Any] = {name: m for name, m in model.named_modules() if id(m) in trunk | words}
        last = {name: name.rpartition(".")[2] for name in found}
        every = {last[name] for name, m in found.items() if id(m) not in words}
        there = sorted({EVERY, *last.values()})
        if missing := [target for target in self.targets if target not in there]:
            raise ValueError(f"lora_targets: expected some of {', '.join(there)}, got {missing[0]!r}")
        wanted = {*self.targets} | (every if not self.targets or EVERY in self.targets else set())
        return {name: layer for name, layer in found.items() if last[name] in wanted}


def start(model: PreTrainedModel, lora: Lora, resume_from: str | Path | None = None) -> dict[str, Tensor]:
    """Freeze `model` under new adapters, or those of a checkpoint; returns the heads that were saved with them."""
    if resume_from is not None:
        return load(model, resume_from)
    attach(model, lora)
    return {}


def attach(model: PreTrainedModel, lora: Lora, empty: bool = False) -> None:
    """Freeze `model` and give its layers new adapters, which learn; B is 0, so that nothing changes at first.

    They are float32 whatever the base is: in bfloat16 small steps would be lost (see trunk.set_precision). `empty` ones
    have a size alone.
    """
    from peft import LoraConfig

    targets = sorted({name.rpartition(".")[2] for name in lora.layers(model)})
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        _inject(model, config, LEARNER, empty)


def _inject(model: PreTrainedModel, config: LoraConfig, name: str, empty: bool) -> None:
    from peft import inject_adapter_in_model

    learning = [p for p in model.parameters() if p.requires_grad] if attached(model) else []
    config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in model.base_model.modules())  # GPT-2's layers
    with warnings.catch_warnings(), unset_fake_temporarily():  # peft cannot move what has no data
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several on one base are the point
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # see _untied
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # GPT-2's head is not like its layers
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=empty)
    for layer in layers(model).values():
        for place in _places(layer, name).values():
            made, device = getattr(*place), layer.get_base_layer().weight.device
            drawn = torch.empty(made.shape, dtype=torch.float32, device=device) if empty else made.detach().float()
            setattr(*place, nn.Parameter(drawn))
    if learning:  # peft has turned the newest one on
        for layer in layers(model).values():
            layer.set_adapter(LEARNER)
        model.requires_grad_(False)
        for parameter in learning:
            parameter.requires_grad_(True)


def attached(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return hasattr(model, "peft_config")


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def tensors(model: nn.Module, adapter: str = LEARNER) -> dict[str, nn.Parameter]:
    """A and B of every layer of one adapter, by the names that peft gives them in files."""
    return {
        f"{PREFIX}{name}.{matrix}": getattr(*place)
        for name, layer in layers(model).items()
        for matrix, place in _places(layer, adapter).items()
    }


def _places(layer: LoraLayer, adapter: str) -> dict[str, tuple[nn.Module, str]]:
    """Where A and B of a layer stand, by their names in peft's files: a module, and the name of its parameter."""
    linear = {f"{part}.weight": getattr(layer, part) for part in ("lora_A", "lora_B")}
    embedding = {part: getattr(layer, part) for part in ("lora_embedding_A", "lora_embedding_B")}
    return {part: (held[adapter], "weight") for part, held in linear.items() if adapter in held} | {
        part: (held, adapter) for part, held in embedding.items() if adapter in held
    }


def through(layer: Any, states: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the adapter that is on adds to states (N, H) times W.T (H, V), as two factors: (N, rank) and (V, rank).

    The first one is computed in float32, and both are rounded to the dtype of the states. None where no adapter is on.
    """
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.active_adapters[0] not in layer.lora_A:
        return None
    on = layer.active_adapters[0]
    with torch.autocast(states.device.type, enabled=False):
        low = F.linear(states.float(), layer.lora_A[on].weight) * layer.scaling[on]
    return low.to(states.dtype), layer.lora_B[on].weight.to(states.dtype)


@contextmanager
def using(model: PreTrainedModel, adapter: str | None) -> Iterator[None]:
    """In this block the model computes with another adapter, or for None with none: as the base alone, bit by bit.

    For passes without gradients. Afterwards all is as before, also after an exception.
    """
    held = [(layer, layer.active_adapters, layer.disable_adapters) for layer in layers(model).values()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for layer, _, _ in held:
            if adapter is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(adapter, inference_mode=True)
                layer.enable_adapters(True)
        yield
    finally:
        for layer, active, disabled in held:
            layer.set_adapter(active)  # and with it lets its weights learn, whether or not they did
            layer.enable_adapters(not disabled)
            layer.requires_grad_(False)
        for parameter in learning:
            parameter.requires_grad_(True)


def base(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the model without adapters, under the names that it had before they came."""
    return _state(model, None)


def merged(model: PreTrainedModel, adapter: str = LEARNER) -> dict[str, Tensor]:
    """The tensors of the model that the adapter makes of its base, W + (alpha / rank) B A rounded to the base's dtype.

    Layers with an adapter are new tensors, on the CPU; the model itself stays as it is.
    """
    return _state(model, adapter)


@torch.no_grad()
def _state(model: PreTrainedModel, adapter: str | None) -> dict[str, Tensor]:
    adapted = layers(model)
    inside = {f"{name}.{part}": part for name, layer in adapted.items() for part in layer.state_dict()}
    state = {}
    for name, tensor in model.state_dict().items():
        part = inside.get(name, "")
        if not part or part.startswith("base_layer."):
            state[name.removesuffix(part) + part.removeprefix("base_layer.")] = tensor
    for name, layer in adapted.items():
        if adapter is not None and _places(layer, adapter):
            weight = layer.get_base_layer().weight
            state[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(adapter)).to(weight.dtype).cpu()
    return state


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the frozen trunk, whose heads may differ: what an adapter can be put onto. Taken once."""
    found = getattr(model, FINGERPRINT, None)
    if found is None:
        digest = hashlib.sha256()
        for name, tensor in sorted(base(model).items()):
            if name.startswith(f"{model.base_model_prefix}."):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found = digest.hexdigest()
        setattr(model, FINGERPRINT, found)
    return found


def save(model: PreTrainedModel, folder: Path, task: str, heads: Sequence[str] = ()) -> None:
    """Write the merged model into `folder`, and the adapter that learns, in peft's own format, into FOLDER there.

    task: CAUSAL_LM or SEQ_CLS, as peft names them. heads: layers of `model` that were trained whole beside the adapter.
    """
    with _untied(model):
        model.save_pretrained(folder, state_dict=merged(model))
    aside = folder / FOLDER
    aside.mkdir(exist_ok=True)
    trained = tensors(model) | {f"{PREFIX}{name}.weight": model.get_submodule(name).weight for name in heads}
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    save_file(found, aside / WEIGHTS, metadata={"format": "pt"})
    config: Any = model.peft_config
    described = config[LEARNER].to_dict() | {
        "task_type": task, "modules_to_save": list(heads) or None, "inference_mode": True,
        "base_model_name_or_path": model.config._name_or_path or None,
    }  # fmt: skip
    ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
    (aside / CONFIG).write_text(json.dumps(ordered, indent=1, sort_keys=True), encoding="utf-8")
    (aside / BASE).write_text(json.dumps({"sha256": fingerprint(model)}), encoding="utf-8")


@contextmanager
def _untied(model: PreTrainedModel) -> Iterator[None]:
    """In this block the configuration says that head and embedding, one of which has an adapter, are two matrices."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    apart = getattr(model.config, "tie_word_embeddings", False) and head is not None
    apart = apart and bool({head, embedding} & {*layers(model).values()})
    if apart:
        model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        if apart:
            model.config.tie_word_embeddings = True


def saved(folder: str | Path) -> bool:
    """Whether a checkpoint folder has an adapter in it."""
    return (Path(folder) / FOLDER / CONFIG).is_file()


def load(model: PreTrainedModel, folder: str | Path, adapter: str = LEARNER) -> dict[str, Tensor]:
    """Put the adapter of a checkpoint onto a model; returns the heads that were saved with it, by name.

    One of another name is frozen and off, until `using` turns it on. Raises ValueError for an adapter of another base.
    """
    from peft import LoraConfig

    aside = Path(folder) / FOLDER
    try:
        theirs = json.loads((aside / BASE).read_text(encoding="utf-8"))["sha256"]
        config = LoraConfig.from_pretrained(str(aside))
        found = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(aside / WEIGHTS).items()}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{str(folder)!r}: expected a checkpoint of training with lora_rank, got {error}") from error
    if theirs != fingerprint(model):
        raise ValueError(
            f"{str(folder)!r}: expected an adapter that was trained on this base, {model.config._name_or_path!r} in "
            f"{str(model.dtype).removeprefix('torch.')}, got one whose base has other weights or another dtype"
        )
    config.modules_to_save, config.inference_mode = None, False
    _inject(model, config, adapter, empty=True)
    with torch.no_grad():
        for name, parameter in tensors(model, adapter).items():
            parameter.copy_(found.pop(name.removeprefix(PREFIX)))
    return found


def described(folder: str | Path) -> Lora:
    """What the adapters of a checkpoint look like. Raises ValueError where there are none."""
    try:
        config = json.loads((Path(folder) / FOLDER / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(folder)!r}: expected a checkpoint of training with lora_rank, got {error}") from error
    return Lora(config["r"], config["lora_alpha"], tuple(config["target_modules"]))


def num_weights(model: PreTrainedModel, lora: Lora) -> int:
    """Numbers in the adapters that `model` would get."""
    return sum(lora.rank * sum(layer.weight.shape) for layer in lora.layers(model).values())
