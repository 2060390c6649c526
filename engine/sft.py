"""Supervised fine-tuning, and pre-training before it: next-token loss on the tokens that are to be learned.

sft        prompts are context, responses (with their EOS) are targets
pretrain   plain text, every token is a target
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from twinhead.engine import data, losses, options, ranks, weights
from twinhead.engine.batch import Example, Packed, pack
from twinhead.engine.config import Source
from twinhead.engine.data import Loaded, Order
from twinhead.engine.evaluate import perplexity
from twinhead.engine.lora import Lora
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.run import Run
from twinhead.engine.shares import micro_batches
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit, checkpoint_gradients, set_precision

Config = options.SFT
PretrainConfig = options.Pretrain
# The share of a micro-batch in the loss of its optimizer step, of so many targets and so many sequences that have some.
REDUCTIONS: dict[str, Callable[[Tensor, Packed, int, Tensor], Tensor]] = {
    "token_mean": lambda nll, packed, num_targets, num_sequences: nll.sum() / num_targets,
    "seq_mean": lambda nll, packed, num_targets, num_sequences: (
        losses.sequence_means(nll, packed.cu_rows).sum() / num_sequences
    ),
    "sum": lambda nll, packed, num_targets, num_sequences: nll.sum(),
}


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
    text = Text.from_pretrained(config.model, config.template)
    train_set = read(config.data, text, config.max_length)
    eval_set = read(config.eval_data, text, config.max_length) if config.eval_data else None
    if scratch and config.lora_rank:
        raise ValueError(f"lora_rank: expected 0 for a model without weights, got {config.lora_rank}")
    start = weights.initialise(config.model, config.seed) if scratch and run.resume_from is None else config.model
    run.say(train_set.summary())
    dtype, device = config.torch_dtype, config.torch_device
    policy = Policy.from_pretrained(start, "none", dtype, device, Lora.of(config), run.resume_from)
    set_precision(policy.model, config.dtype)
    check_fit(policy.model, [*train_set, *(eval_set or [])])
    if config.gradient_checkpointing:
        checkpoint_gradients(policy.model)
    order = Order(len(train_set), config.batch_size, config.seed)
    total = config.steps or order.steps(config.epochs)
    optimizer = Optimizer(policy, config, total)
    run.track(policy, text, optimizer=optimizer)

    for step in run.steps(total):
        with run.timed("update"):
            stats = update(policy, optimizer, [train_set[i] for i in order.batch(step - 1)], config)
        if eval_set is not None and (step == total or order.epoch(step) > order.epoch(step - 1)):
            with run.timed("evaluate"):
                held_out = perplexity(policy, eval_set, config.tokens_per_micro, ranks.spread)
            stats |= {"eval/loss": held_out.loss, "eval/ppl": held_out.ppl}
        run.log(step, stats, note=f"loss {stats['loss']:.3f}")
    return run.finish()


def update(policy: Policy, optimizer: Optimizer, batch: Sequence[Example], config: Config) -> dict[str, float]:
    """One optimizer step on the loss of the whole batch, however it is cut into micro-batches."""
    lengths = [len(example.prompt) + len(example.response) for example in batch]
    micros = [pack(m, policy.device) for m in micro_batches(batch, lengths, config.tokens_per_micro)]
    num_targets = ranks.total(sum(packed.num_targets for packed in micros))
    num_sequences = (ranks.cat([packed.cu_rows.diff() for packed in micros]) > 0).sum()  # stays on the device
    sums = Sums()
    for packed in micros:
        nll = -policy(packed, entropy=False).logprobs  # (R,)
        loss = REDUCTIONS[config.reduction](nll, packed, num_targets, num_sequences)
        loss.backward()
        sums.add({"loss": loss})
    return sums.take() | optimizer.step() | {"num_targets": num_targets}
