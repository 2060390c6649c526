"""A bill of materials: the bytes of everything that PPO will hold, phase by phase, before anything is loaded.

    phase      what it holds besides what stays from one phase to the next
    load       the models, as they come from their files
    generate   the cache of keys and values; a prefill of all slots, or the logits of a decoding step
    score      one pass of the reward model
    examine    one pass of the reference, and a block of its logits
    update     gradients, what one micro-batch keeps for them, and the fused head

Weights are counted on a model without data. So are activations: PyTorch runs the passes of the real trunk on tensors
that have a size and no memory (FakeTensorMode), and a meter adds up what lives. The rest are the formulas below. The
worst case is planned: every prompt of `max_prompt_tokens`, every response of `max_new_tokens`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from twinhead.engine import adam, attention, lora, ranks, trunk
from twinhead.engine import critic as critics
from twinhead.engine.batch import Example, Packed, cumulative, pack
from twinhead.engine.generate import PREFILL_TOKENS
from twinhead.engine.lora import Lora
from twinhead.engine.rollout_options import PPO
from twinhead.kernels._head import blocks

PHASES = ("load", "generate", "score", "examine", "update")
MB = 1e6


class Unplannable(ValueError):
    """An architecture whose passes do not run without data: experts do what they read."""


@dataclass(frozen=True)
class Part:
    """A line of the bill."""

    name: str
    bytes: int
    phases: tuple[str, ...]  # that hold it


@dataclass(frozen=True)
class Plan:
    """What every phase holds when it holds most: the sum of its parts."""

    parts: tuple[Part, ...]

    def peak(self, phase: str) -> int:
        """Bytes."""
        return sum(part.bytes for part in self.parts if phase in part.phases)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of every phase."""
        return {phase: self.peak(phase) for phase in PHASES}

    def table(self) -> Table:
        """Megabytes of every part in every phase, and their sums."""
        table = Table("MB", *PHASES, title="planned memory, besides the libraries")
        for column in table.columns[1:]:
            column.justify = "right"
        for part in self.parts:
            table.add_row(part.name, *(_mb(part.bytes) if phase in part.phases else "" for phase in PHASES))
        table.add_section()
        table.add_row("peak", *(_mb(self.peak(phase)) for phase in PHASES), style="bold")
        return table


def plan(config: PPO) -> Plan:
    """The plan of a run, from the config.json of its models and from its options.

    Raises ValueError for a folder without a model, and Unplannable.
    """
    with FakeTensorMode():
        policy = outline(AutoModelForCausalLM, config.model, config)
        if chosen := Lora.of(config):
            lora.attach(policy, chosen, empty=True)
        reference = outline(AutoModelForCausalLM, config.reference, config) if config.reference else policy
        paths = [config.reward_model] if config.reward_model else config.reward_models
        judges = [outline(AutoModelForSequenceClassification, path, config, num_labels=1) for path in paths]
        network = _network(config, policy)
        try:
            return Plan(tuple(part for part in _parts(config, policy, reference, judges, network) if part.bytes))
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise Unplannable(f"plan: expected passes that run without data, got {config.model!r}: {reason}") from error


def _parts(
    config: PPO,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    judges: Sequence[PreTrainedModel],
    network: PreTrainedModel | None,
) -> Iterator[Part]:
    words, width = policy.get_output_embeddings().weight.shape
    low = lora.through(policy.get_output_embeddings(), torch.empty(1, width))
    wide = width if low is None else width + low[0].shape[1]  # of the states that the fused head reads
    valued = width if network is None else network.get_input_embeddings().weight.shape[1]
    own = [] if network is None else _own(config, network)
    batch, slots = config.rollouts_per_step, min(config.num_slots, config.rollouts_per_step)
    length = config.max_prompt_tokens + config.max_new_tokens
    sequences = min(-(-batch // config.minibatches), max(1, config.tokens_per_micro // length))  # of one micro-batch
    micro, everyone = _packed(config, sequences), _packed(config, min(batch, max(1, config.tokens_per_micro // length)))
    home = () if config.offload else PHASES
    later = PHASES[1:]

    learning = [p for p in policy.parameters() if p.requires_grad]
    size, remembered = _bytes(policy), sum(map(partial(moments, config), (*learning, *own)))
    yield Part("policy", size, PHASES)
    yield Part("critic", sum(p.nbytes for p in own), PHASES)
    yield Part("value head", 4 * (valued + 1), PHASES)
    yield Part("average of the weights", 0 if config.ema_decay is None else 4 * policy.num_parameters(), PHASES)
    yield Part(f"Adam, {config.adam_bits} bits", remembered + 8 * (valued + 1), later)
    exact = config.kl_kind == "full" and config.kl_in == "loss"
    alone = config.reference or not config.lora_rank  # else it is the policy's base
    asked = home or (("examine", "update") if exact else ("examine",))
    yield Part("reference", _bytes(reference) if alone else 0, asked)
    if judges:
        yield from _judging(config, judges, width)
        yield Part("pass of the reward model", max(_pass(judge, everyone) for judge in judges), ("score",))
    cache = slots * length * _bytes_of_a_token(policy)
    kept = config.cuda_graphs and config.device_type == "cuda"  # graphs were captured with its addresses
    cached = later if kept else ("generate",)
    yield Part("cache of keys and values", min(cache, config.cache_bytes or cache), cached)
    read = min(slots, max(1, PREFILL_TOKENS // config.max_prompt_tokens))
    prompts = pack([Example([0] * config.max_prompt_tokens, [])] * read)
    drawing = slots * words * (4 if config.dtype == "float32" else 2 + 4)  # logits, and the float32 that is drawn from
    yield Part("prefill, or logits of a decoding step", max(_pass(policy, prompts), drawing), ("generate",))
    numbers = batch * (4 * length + 8 * config.max_new_tokens) * 8  # packed int64, and float32 of every response token
    yield Part("rollouts and experience", numbers, later)
    head = _block(micro, words, wide, config)
    several = batch > sequences * config.minibatches
    examined, valuing = (0, 0) if network is None else _valuing(network, own, micro, several)
    passed = max(_pass(reference, micro), examined, head + _rows(micro, width, config))
    yield Part("pass of the reference", passed, ("examine",))
    states = batch * config.max_new_tokens * reference.get_input_embeddings().weight.shape[1]
    yield Part("states of the reference", states * config.torch_dtype.itemsize if exact else 0, ("examine", "update"))
    gradients = sum(p.nbytes for p in learning) + 4 * (width + 1)
    yield Part("gradients", gradients, ("update",))
    yield Part("critic's gradients and activations", valuing, ("update",))
    living = _learning(policy, micro, head, several, config)
    if config.ptx_data:
        text = pack([Example([], [0] * config.ptx_max_length)] * config.ptx_batch_size)
        living = max(living, _learning(policy, text, _block(text, words, wide, config), True, config))
    yield Part("logits of the fused head", head, ("update",))
    yield Part("activations of a micro-batch", max(0, living - gradients - head), ("update",))


def _judging(config: PPO, judges: Sequence[PreTrainedModel], width: int) -> Iterator[Part]:
    """The reward models: whole ones, or an adapter and a head each on the policy's base of this width."""
    if config.share == "all":
        paths = [config.reward_model] if config.reward_model else config.reward_models
        sizes = (lora.num_weights(judge, lora.described(path)) for judge, path in zip(judges, paths, strict=True))
        yield Part("adapter and head of the reward model", 4 * (sum(sizes) + width * len(judges)), PHASES)
        return
    unread = sum(j.get_input_embeddings().weight.nbytes for j in judges) if config.device_type == "cpu" else 0
    yield Part("reward model", sum(map(_bytes, judges)) - unread, ("score",) if config.offload else PHASES)
    yield Part("its embedding, once it is read", unread, PHASES[1:])


def _network(config: PPO, policy: PreTrainedModel) -> PreTrainedModel | None:
    """The layers that a critic has of its own: those of a branch as a trunk of as many, which costs a pass the same."""
    if config.critic == "branch":
        critics.check_branch(config.branch_layers, trunk.num_layers(policy))
        described = copy.deepcopy(policy.config)
        critics.keep_top(described, config.branch_layers)
        return _shaped(AutoModel, described, config)
    if config.critic != "separate":
        return None
    beside = critics.found(config.model, "separate")
    judge = config.reward_model if config.value_init == "reward_model" else ""
    return outline(AutoModel, str(beside or judge or config.critic_model or config.model), config)


def _own(config: PPO, network: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that the critic alone has: a branch shares the policy's embeddings."""
    shared = [m.weight for m in network.modules() if isinstance(m, nn.Embedding) and config.critic == "branch"]
    return [p for p in network.parameters() if all(p is not other for other in shared)]


def _valuing(network: PreTrainedModel, own: list[nn.Parameter], packed: Packed, several: bool) -> tuple[int, int]:
    """The most that lives during a pass of a critic's own layers that keeps nothing, and while they learn from one."""
    network.requires_grad_(False)
    for p in own:
        p.requires_grad_(True)
    with Meter(network) as meter:
        for _ in range(2 if several else 1):
            trunk.packed_pass(network, packed)[packed.rows].sum().backward()
    return _pass(network, packed), meter.peak


def outline(factory: Any, path: str, config: PPO, **options: Any) -> PreTrainedModel:
    """A model that has shapes and no data, with our attention."""
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise ValueError(f"expected a checkpoint folder, got {path!r}, which does not exist")
    try:
        return _shaped(factory, AutoConfig.from_pretrained(path, **options), config)
    except Unplannable:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path!r} cannot be loaded as {factory.__name__}: {reason}") from error


def _shaped(factory: Any, described: PreTrainedConfig, config: PPO) -> PreTrainedModel:
    model = factory.from_config(described, dtype=config.torch_dtype).eval()
    if experts := [type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Experts")]:
        raise Unplannable(f"plan: expected a model without experts, which work on what they like, got {experts[0]}")
    model.set_attn_implementation(attention.NAME)
    trunk.set_precision(model, config.dtype)
    return model


def _packed(config: PPO, sequences: int) -> Packed:
    return pack([Example([0] * config.max_prompt_tokens, [0] * config.max_new_tokens)] * sequences)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def moments(config: PPO, p: nn.Parameter) -> int:
    """Both of Adam's: in 8 bits a byte and a 256th of a float32 scale for each number."""
    both = 2 * (p.numel() + 4 * p.numel() // adam.BLOCK) if adam.in_8_bits(p, config) else 2 * p.nbytes
    return both // ranks.size() if config.shard_optimizer else both


def _bytes_of_a_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers."""
    cache, token = DynamicCache(), torch.zeros(1, 1, dtype=torch.int64)
    layout = attention.Ragged((1,), cumulative([1]))
    with torch.no_grad(), trunk.precision(model):
        model.base_model(input_ids=token, position_ids=token, past_key_values=cache, use_cache=True, layout=layout)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return numbers * cache.layers[0].values.element_size()  # as cache.py has it: keys in the dtype of the values


def _pass(model: PreTrainedModel, packed: Packed) -> int:
    """The most that lives during one pass that keeps nothing."""
    with Meter(model) as meter, torch.no_grad():
        trunk.packed_pass(model, packed)
    return meter.peak


def _rows(packed: Packed, width: int, config: PPO) -> int:
    """The hidden states of all tokens, and of those that predict."""
    return (len(packed.tokens) + packed.num_targets) * width * config.torch_dtype.itemsize


def _block(packed: Packed, words: int, width: int, config: PPO) -> int:
    """A block of float32 logits; off the GPU half precision is multiplied in float32, by a copy of the head."""
    rows = next(blocks(packed.targets)).stop
    widened = config.dtype != "float32" and config.device_type == "cpu"
    return 4 * rows * words + (4 * words * width if widened else 0)


def _learning(model: PreTrainedModel, packed: Packed, block: int, several: bool, config: PPO) -> int:
    """The most that lives, gradients included, while a micro-batch is learned from; of `several`, the second one.

    The fused head holds a block of logits beside the gradients of its rows and of its matrix, and backward multiplies
    those by the slope of the loss, into new memory.
    """
    model.zero_grad()
    if config.gradient_checkpointing:
        trunk.checkpoint_gradients(model)
    layer = model.get_output_embeddings()
    with Meter(model) as meter:
        for _ in range(2 if several else 1):
            rows = trunk.packed_pass(model, packed)[packed.rows]
            learned = [rows, layer.weight] if layer.weight.requires_grad else [rows]
            if (low := lora.through(layer, rows)) is not None:
                learned = [torch.cat([x, more], dim=1) for x, more in zip((rows, layer.weight), low, strict=True)]
            logits = torch.empty(block, dtype=torch.uint8)
            found = [torch.empty_like(x, dtype=kind) for x, kind in zip(learned, (None, torch.float32), strict=False)]
            del logits
            slopes = [x * 1 for x in found]
            del found
            torch.autograd.backward(learned, [slopes.pop(0).to(x.dtype) for x in learned])
            del rows, learned, low
    model.eval()
    return meter.peak


class Meter(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make while they live; those of `model` are known already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}

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


def _mb(size: int) -> str:
    return f"{size / MB:,.1f}"
