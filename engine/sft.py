"""Supervised fine-tuning, and pre-training before it: next-token loss on the tokens that are to be learned.

sft        prompts are context, responses (with their EOS) are targets
pretrain   plain text, every token is a target
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twinhead.engine import data, weights
from twinhead.engine.batch import Example, micro_batches, pack
from twinhead.engine.config import RunConfig, Source, check
from twinhead.engine.data import Loaded, Order
from twinhead.engine.evaluate import perplexity
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.run import Run
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Supervised fine-tuning on demonstrations: columns prompt and completion, or messages."""

    model: str
    """Checkpoint folder to start from."""
    data: Source
    eval_data: Source = ""
    """Held-out rows: their loss and perplexity are measured at the end of every epoch."""
    output_dir: str = "runs/sft"
    epochs: int = 1
    steps: int = 0
    """Optimizer steps; 0: as many as the epochs have."""
    batch_size: int = 32
    """Sequences of one optimizer step."""
    max_length: int = 1024
    """Tokens of a row; a longer response is cut on the right."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            steps=(self.steps >= 0, "at least 0 (0: as many as the epochs have)"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            max_length=(self.max_length >= 2, "at least 2"),
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Language modelling on plain text (column text). A `model` folder without weights starts from random ones."""

    output_dir: str = "runs/pretrain"


def train(config: Config) -> Run:
    """Fine-tune on demonstrations; the final checkpoint stands in config.output_dir."""
    return _fit(config, "sft", data.demonstrations)


def pretrain(config: PretrainConfig) -> Run:
    """Train on every token of plain text; the final checkpoint stands in config.output_dir."""
    return _fit(config, "pretrain", data.documents, scratch=not weights.has_weights(config.model))


def _fit(
    config: Config,
    stage: str,
    read: Callable[[Source, Text, int], Loaded[Example]],
    scratch: bool = False,
) -> Run:
    run = Run(config, stage)
    if run.finished:
        return run
    text = Text.from_pretrained(config.model)
    train_set = read(config.data, text, config.max_length)
    eval_set = read(config.eval_data, text, config.max_length) if config.eval_data else None
    start = run.resume_from or (weights.initialise(config.model, config.seed) if scratch else config.model)
    run.say(train_set.summary())
    policy = Policy.from_pretrained(start, "none", config.torch_dtype, config.torch_device)
    check_fit(policy.model, [*train_set, *(eval_set or [])])
    order = Order(len(train_set), config.batch_size, config.seed)
    total = config.steps or order.steps(config.epochs)
    optimizer = Optimizer(policy, config, total)
    run.track(policy, text, optimizer=optimizer)

    for step in run.steps(total):
        with run.timed("update"):
            stats = update(policy, optimizer, [train_set[i] for i in order.batch(step - 1)], config)
        if eval_set is not None and (step == total or order.epoch(step) > order.epoch(step - 1)):
            with run.timed("evaluate"):
                held_out = perplexity(policy, eval_set, config.tokens_per_micro)
            stats |= {"eval/loss": held_out.loss, "eval/ppl": held_out.ppl}
        run.log(step, stats, note=f"loss {stats['loss']:.3f}")
    return run.finish()


def update(policy: Policy, optimizer: Optimizer, batch: Sequence[Example], config: Config) -> dict[str, float]:
    """One optimizer step on the token mean over the whole batch, however it is cut into micro-batches."""
    lengths = [len(example.prompt) + len(example.response) for example in batch]
    micros = [pack(m, policy.device) for m in micro_batches(batch, lengths, config.tokens_per_micro)]
    num_targets = sum(packed.num_targets for packed in micros)
    sums = Sums()
    for packed in micros:
        nll = -policy(packed, entropy=False).logprobs  # (R,)
        loss = nll.sum() / num_targets
        loss.backward()
        sums.add({"loss": loss})
    return sums.take() | optimizer.step() | {"num_targets": num_targets}
