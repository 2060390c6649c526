"""A bill of materials: the bytes of all that PPO, GRPO or DPO will hold, phase by phase, before anything is loaded.

    phase      what it holds besides what stays from one phase to the next
    load       the models, as they come from their files
    generate   the cache of keys and values; a prefill of all slots, or the logits of a decoding step
    score      one pass of the reward model
    examine    one pass of the reference, and a block of its logits
    reference  (DPO) the same, where it is asked beforehand
    update     gradients, what one micro-batch keeps for them, and the fused head

Weights are counted on a model without data. So are activations: PyTorch runs the passes of the real trunk on tensors
that have a size and no memory (FakeTensorMode), and a meter adds up what lives. The rest are the formulas below. The
worst case is planned: every prompt of `max_prompt_tokens`, every response of `max_new_tokens`; for DPO two answers to
each prompt (kto: one), each of `max_length` tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from twinhead.engine import adam, lora, meter, ranks, trunk
from twinhead.engine import critic as critics
from twinhead.engine.batch import Example, Packed, pack
from twinhead.engine.config import RunConfig
from twinhead.engine.generate import PREFILL_TOKENS
from twinhead.engine.lora import Lora
from twinhead.engine.options import DPO
from twinhead.engine.outline import Unplannable, nbytes, outline, shaped
from twinhead.engine.rollout_options import GRPO, PPO
from twinhead.engine.run import Run

PHASES = ("load", "generate", "score", "examine", "update")  # of PPO and GRPO
PAIRED = ("load", "reference", "update")  # of DPO
LATER = PHASES[1:]
MB = 1e6


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
    phases: tuple[str, ...] = PHASES

    def peak(self, phase: str) -> int:
        """Bytes."""
        return sum(part.bytes for part in self.parts if phase in part.phases)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of every phase."""
        return {phase: self.peak(phase) for phase in self.phases}

    def table(self) -> Table:
        """Megabytes of every part in every phase, and their sums."""
        table = Table("MB", *self.phases, title="planned memory, besides the libraries")
        for column in table.columns[1:]:
            column.justify = "right"
        for part in self.parts:
            table.add_row(part.name, *(_mb(part.bytes) if phase in part.phases else "" for phase in self.phases))
        table.add_section()
        table.add_row("peak", *(_mb(self.peak(phase)) for phase in self.phases), style="bold")
        return table


class Stage(NamedTuple):
    """How a stage is planned."""

    phases: tuple[str, ...]
    models: Callable[[Any], tuple[Any, ...]]  # outlines of all that it loads, from its options
    parts: Callable[..., Iterator[Part]]  # from its options and these outlines


@dataclass(frozen=True)
class Step:
    """The rollouts of one step at their longest, and how they are cut."""

    responses: int
    micro: Packed  # one micro-batch of a minibatch
    scored: Packed  # one of all rollouts
    several: bool  # a minibatch has more than one

    @classmethod
    def of(cls, config: PPO | GRPO, responses: int) -> Step:
        fitting = max(1, config.tokens_per_micro // (config.max_prompt_tokens + config.max_new_tokens))
        sequences = min(-(-responses // config.minibatches), fitting)
        micro, scored = (
            pack([Example([0] * config.max_prompt_tokens, [0] * config.max_new_tokens)] * num)
            for num in (sequences, min(responses, fitting))
        )
        return cls(responses, micro, scored, responses > sequences * config.minibatches)


def plan(config: PPO | GRPO | DPO) -> Plan:
    """The plan of a run, from the config.json of its models and from its options.

    Raises ValueError for a folder without a model, and Unplannable.
    """
    stage = next(stage for kind, stage in STAGES.items() if isinstance(config, kind))
    with FakeTensorMode():
        models = stage.models(config)
        try:
            return Plan(tuple(part for part in stage.parts(config, *models) if part.bytes), stage.phases)
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise Unplannable(f"plan: expected passes that run without data, got {config.model!r}: {reason}") from error


def foresee(config: PPO | GRPO | DPO, run: Run) -> None:
    """What memory every phase should take; the run reports what it took. A few architectures have no plan."""
    try:
        run.expect(plan(config).peaks)
    except Unplannable as error:
        run.say(str(error))


# -- PPO ---------------------------------------------------------------------------------------------------------------


def _ppo_models(config: PPO) -> tuple[Any, ...]:
    policy = _learner(config)
    reference = outline(AutoModelForCausalLM, config.reference, config) if config.reference else policy
    paths = [config.reward_model] if config.reward_model else config.reward_models
    return policy, reference, _judges(config, *paths), _network(config, policy)


def _ppo(
    config: PPO,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    judges: Sequence[PreTrainedModel],
    network: PreTrainedModel | None,
) -> Iterator[Part]:
    width = policy.get_input_embeddings().weight.shape[1]
    head = 4 * (1 + (width if network is None else network.get_input_embeddings().weight.shape[1]))
    step, own = Step.of(config, config.rollouts_per_step), [] if network is None else _own(config, network)
    exact = config.kl_kind == "full" and config.kl_in == "loss"
    alone = config.reference or not config.lora_rank  # else it is the policy's base
    asked = ("examine", "update") if exact else ("examine",)

    yield Part("policy", nbytes(policy), PHASES)
    yield Part("critic", sum(p.nbytes for p in own), PHASES)
    yield Part("value head", head, PHASES)
    averaged = [] if config.ema_decay is None else _learning(policy)
    yield Part("average of the weights", sum(4 * p.numel() for p in averaged), PHASES)
    yield _adam(config, [*_learning(policy), *own], LATER, 2 * head)
    yield Part("reference", nbytes(reference) if alone else 0, asked if config.offload else PHASES)
    if config.share == "all":
        yield _guests(config, judges, width)
    else:
        yield from _whole(config, judges, ("score",) if config.offload else PHASES)
    yield from _rollouts(config, policy, judges, step)
    examined = 0 if network is None else meter.of_a_pass(network, step.micro)
    valuing = 0 if network is None else meter.of_a_critic(network, step.micro, step.several)
    scoring = meter.of_a_scoring(reference, step.micro, config)
    yield Part("pass of the reference", max(scoring, examined), ("examine",))
    states = step.responses * config.max_new_tokens * reference.get_input_embeddings().weight.shape[1]
    yield Part("states of the reference", states * config.torch_dtype.itemsize if exact else 0, ("examine", "update"))
    yield Part("critic's gradients and activations", valuing, ("update",))
    living = meter.of_learning(policy, step.micro, config, step.several)
    if config.ptx_data:
        text = pack([Example([], [0] * config.ptx_max_length)] * config.ptx_batch_size)
        living = max(living, meter.of_learning(policy, text, config, several=True))
    yield from _update(config, policy, step.micro, living, 4 * (width + 1))


def _guests(config: PPO, judges: Sequence[PreTrainedModel], width: int) -> Part:
    """Reward models that are an adapter and a head each, on the policy's base of this width."""
    paths = [config.reward_model] if config.reward_model else config.reward_models
    sizes = (lora.num_weights(judge, lora.described(path)) for judge, path in zip(judges, paths, strict=True))
    return Part("adapter and head of the reward model", 4 * (sum(sizes) + width * len(judges)), PHASES)


def _network(config: PPO, policy: PreTrainedModel) -> PreTrainedModel | None:
    """The layers that a critic has of its own: those of a branch as a trunk of as many, which costs a pass the same."""
    if config.critic == "branch":
        critics.check_branch(config.branch_layers, trunk.num_layers(policy))
        described = copy.deepcopy(policy.config)
        critics.keep_top(described, config.branch_layers)
        return shaped(AutoModel, described, config)
    if config.critic != "separate":
        return None
    beside = critics.found(config.model, "separate")
    judge = config.reward_model if config.value_init == "reward_model" else ""
    return outline(AutoModel, str(beside or judge or config.critic_model or config.model), config)


def _own(config: PPO, network: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that the critic alone has, and that learn: a branch shares the policy's embeddings."""
    shared = [m.weight for m in network.modules() if isinstance(m, nn.Embedding) and config.critic == "branch"]
    for weight in shared:
        weight.requires_grad_(False)
    return _learning(network)


# -- GRPO --------------------------------------------------------------------------------------------------------------


def _grpo_models(config: GRPO) -> tuple[Any, ...]:
    return _learner(config), _judges(config, *filter(None, [config.reward_model]))


def _grpo(config: GRPO, policy: PreTrainedModel, judges: Sequence[PreTrainedModel]) -> Iterator[Part]:
    step, asked = Step.of(config, config.prompts_per_step * config.group_size), config.beta > 0
    yield Part("policy", nbytes(policy), PHASES)
    yield _adam(config, _learning(policy), LATER)
    held = nbytes(policy) if asked and not config.lora_rank else 0  # under adapters it is the policy's base
    yield Part("reference", held, ("examine",) if config.offload else PHASES)
    yield from _whole(config, judges, ("score",) if config.offload else PHASES)
    yield from _rollouts(config, policy, judges, step)
    scoring = meter.of_a_scoring(policy, step.micro, config)
    yield Part("pass of the reference", scoring if asked or config.old_logprobs == "recompute" else 0, ("examine",))
    living = meter.of_learning(policy, step.micro, config, step.several, early=False)
    yield from _update(config, policy, step.micro, living)


# -- DPO ---------------------------------------------------------------------------------------------------------------


def _dpo_models(config: DPO) -> tuple[Any, ...]:
    policy = _learner(config)
    return policy, outline(AutoModelForCausalLM, config.reference, config) if config.reference else policy


def _dpo(config: DPO, policy: PreTrainedModel, reference: PreTrainedModel) -> Iterator[Part]:
    example, answers = Example([0], [0] * (config.max_length - 1)), 1 if config.loss == "kto" else 2
    prompts = min(config.batch_size, max(1, config.tokens_per_micro // (answers * config.max_length)))
    micro, beforehand = pack([example] * answers * prompts), config.precompute_reference
    alone = config.reference or not config.lora_rank  # else it is the policy's base
    yield Part("policy", nbytes(policy), PAIRED)
    yield _adam(config, _learning(policy), ("update",))
    yield Part("reference", nbytes(reference) if alone else 0, PAIRED[1:2] if beforehand else PAIRED[1:])
    if beforehand:
        every = pack([example] * max(1, config.tokens_per_micro // config.max_length))
        yield Part("pass of the reference", meter.of_a_scoring(reference, every, config), ("reference",))
    several = config.batch_size > prompts
    living = meter.of_learning(policy, micro, config, several, early=False)
    if not beforehand:  # it is asked before the policy, beside the gradients of earlier micro-batches
        earlier = sum(p.nbytes for p in _learning(policy)) if several else 0
        living = max(living, earlier + meter.of_a_scoring(reference, micro, config))
    yield from _update(config, policy, micro, living)


# -- what stages share -------------------------------------------------------------------------------------------------


def _learner(config: PPO | GRPO | DPO) -> PreTrainedModel:
    """The policy, with the adapters that it learns by."""
    policy = outline(AutoModelForCausalLM, config.model, config)
    if chosen := Lora.of(config):
        lora.attach(policy, chosen, empty=True)
    return policy


def _judges(config: RunConfig, *paths: str) -> list[PreTrainedModel]:
    return [outline(AutoModelForSequenceClassification, path, config, num_labels=1) for path in paths]


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _adam(config: RunConfig, learning: Sequence[nn.Parameter], phases: tuple[str, ...], beside: int = 0) -> Part:
    return Part(f"Adam, {config.adam_bits} bits", sum(map(partial(moments, config), learning)) + beside, phases)


def moments(config: RunConfig, p: nn.Parameter) -> int:
    """Both of Adam's: in 8 bits a byte and a 256th of a float32 scale for each number."""
    both = 2 * (p.numel() + 4 * p.numel() // adam.BLOCK) if adam.in_8_bits(p, config) else 2 * p.nbytes
    return both // ranks.size() if config.shard_optimizer else both


def _whole(config: RunConfig, judges: Sequence[PreTrainedModel], phases: tuple[str, ...]) -> Iterator[Part]:
    """Reward models: on the host the rows of an embedding come from the file once they are read."""
    unread = sum(j.get_input_embeddings().weight.nbytes for j in judges) if config.device_type == "cpu" else 0
    yield Part("reward model", sum(map(nbytes, judges)) - unread, phases)
    yield Part("its embedding, once it is read", unread, LATER)


def _rollouts(
    config: PPO | GRPO, policy: PreTrainedModel, judges: Sequence[PreTrainedModel], step: Step
) -> Iterator[Part]:
    """What it takes to generate and to score."""
    passes = [meter.of_a_pass(judge, step.scored) for judge in judges]
    yield Part("pass of the reward model", max(passes, default=0), ("score",))
    length, slots = config.max_prompt_tokens + config.max_new_tokens, min(config.num_slots, step.responses)
    cache = slots * length * meter.of_a_token(policy)
    kept = config.cuda_graphs and config.device_type == "cuda"  # graphs were captured with its addresses
    cached = LATER if kept else ("generate",)
    yield Part("cache of keys and values", min(cache, config.cache_bytes or cache), cached)
    read = min(slots, max(1, PREFILL_TOKENS // config.max_prompt_tokens))
    prompts, words = (
        pack([Example([0] * config.max_prompt_tokens, [])] * read),
        len(policy.get_output_embeddings().weight),
    )
    drawing = slots * words * (4 if config.dtype == "float32" else 2 + 4)  # logits, and the float32 that is drawn from
    yield Part("prefill, or logits of a decoding step", max(meter.of_a_pass(policy, prompts), drawing), ("generate",))
    numbers = step.responses * (4 * length + 8 * config.max_new_tokens) * 8  # packed int64, float32 of response tokens
    yield Part("rollouts and experience", numbers, LATER)
    drawn = meter.of_compiled(policy, slots, config) + meter.of_compiled(policy, len(prompts.tokens), config)
    yield Part("compiled products of generating", drawn, LATER)
    scored = sum(meter.of_compiled(judge, len(step.scored.tokens), config) for judge in judges)
    yield Part("compiled products of the reward model", scored, LATER[1:])
    yield Part("compiled products of examining", meter.of_compiled(policy, len(step.micro.tokens), config), LATER[2:])


def _update(config: RunConfig, policy: PreTrainedModel, micro: Packed, living: int, beside: int = 0) -> Iterator[Part]:
    """What lives while the policy learns, of which this much are gradients and logits. beside: gradients of a head."""
    gradients, logits = sum(p.nbytes for p in _learning(policy)) + beside, meter.of_a_block(policy, micro, config)
    yield Part("gradients", gradients, ("update",))
    yield Part("logits of the fused head", logits, ("update",))
    compiled = 2 * meter.of_compiled(policy, len(micro.tokens), config)  # beside those of examining, or of a reference
    yield Part("compiled products of backward", compiled, ("update",))
    yield Part("activations of a micro-batch", max(0, living - gradients - logits), ("update",))


STAGES = {
    PPO: Stage(PHASES, _ppo_models, _ppo),
    GRPO: Stage(PHASES, _grpo_models, _grpo),
    DPO: Stage(PAIRED, _dpo_models, _dpo),
}


def _mb(size: int) -> str:
    return f"{size / MB:,.1f}"
