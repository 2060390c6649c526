"""The reward model: a scalar head on the SFT trunk, trained on rankings of K responses to one prompt.

All pairs of a ranking are one batch element with one forward per response (Ouyang et al. 2022, section 3.5): pairs
shuffled apart would repeat every response K-1 times an epoch, and overfit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from twinhead.engine import data, losses, options, ranks
from twinhead.engine.batch import Example
from twinhead.engine.data import Comparison, Order
from twinhead.engine.evaluate import accuracies, score_groups
from twinhead.engine.lora import Lora
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import RewardModel
from twinhead.engine.run import Run
from twinhead.engine.scorers import model_scores, shared_scores
from twinhead.engine.shares import micro_batches
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit, checkpoint_gradients, set_precision

Config = options.Reward
REFERENCES = 512  # prompts of the training data whose answers tell the spread
OBJECTIVES = {"pairwise": losses.kwise, "listwise": losses.plackett_luce}


def train(config: Config) -> Run:
    """Train a reward model; the normalised model stands in config.output_dir."""
    run = Run(config, "reward")
    if run.finished:
        return run
    text = Text.from_pretrained(config.model)
    ratio = config.min_score_ratio
    train_set = data.comparisons(config.data, text, config.max_length, ratio)
    eval_set = data.comparisons(config.eval_data, text, config.max_length, ratio) if config.eval_data else None
    demonstrations = (
        list(data.demonstrations(config.demonstrations, text, config.max_length))
        if config.demonstrations
        else [c.examples[c.ranks.index(min(c.ranks))] for c in train_set]
    )
    if config.normalisation == "mean_std" and len(demonstrations) < 2:
        raise ValueError(f"normalisation: expected at least 2 demonstrations for mean_std, got {len(demonstrations)}")
    run.say(train_set.summary())
    if config.epochs > 1:
        run.say(f"epochs: {config.epochs}, where more than one overfits as a rule; watch eval/micro")
    model = load(run, config)
    set_precision(model.model, config.dtype)
    ranked = [example for comparison in [*train_set, *(eval_set or [])] for example in comparison.examples]
    check_fit(model.model, [*ranked, *demonstrations])
    if config.gradient_checkpointing:
        checkpoint_gradients(model.model)
    elements = [pair for c in train_set for pair in c.pairs()] if config.flatten_pairs else train_set
    order = Order(len(elements), config.batch_size, config.seed)
    total = order.steps(config.epochs)
    optimizer = Optimizer(model, config, total)
    run.track(model, text, optimizer=optimizer)

    for step in run.steps(total):
        with run.timed("update"):
            stats = update(model, optimizer, [elements[i] for i in order.batch(step - 1)], config)
        if eval_set is not None and (step == total or order.epoch(step) > order.epoch(step - 1)):
            with run.timed("evaluate"):
                measured = accuracies(model, eval_set, config.tokens_per_micro, ranks.spread)
                stats |= {f"eval/{name}": value for name, value in measured.items()}
        if step == total:
            stats |= normalise(model, demonstrations, train_set[:REFERENCES], config)
        run.log(step, stats, note=f"accuracy {stats['accuracy']:.2f}")
    return run.finish()


def load(run: Run, config: Config) -> RewardModel:
    """The model of the newest checkpoint, or a new head on the SFT trunk."""
    dtype, device, lora = config.torch_dtype, config.torch_device, Lora.of(config)
    if run.resume_from is not None and lora is None:
        return RewardModel.from_pretrained(run.resume_from, dtype, device)
    seed = run.seed("reward head")
    return RewardModel.from_language_model(config.model, seed, dtype, device, lora, run.resume_from)


def update(model: RewardModel, optimizer: Optimizer, batch: Sequence[Comparison], config: Config) -> dict[str, float]:
    """One optimizer step on the mean over prompts of their losses; `loss` is without the centring."""
    lengths = [sum(len(e.prompt) + len(e.response) for e in c.examples) for c in batch]
    sums = Sums()
    for micro in micro_batches(batch, lengths, config.tokens_per_micro):
        scores, ranks, cu_groups, margin = score_groups(model, micro)
        loss = OBJECTIVES[config.loss](scores, ranks, cu_groups, margin).sum() / len(batch)
        centring = losses.centring(scores, ranks, cu_groups).sum() / len(batch)
        (loss + config.centring_coef * centring).backward()
        correct, pairs = losses.pair_accuracy(scores.detach(), ranks, cu_groups)
        accuracy = (correct / pairs.clamp(min=1)).sum() / len(batch)
        sums.add({"loss": loss, "centring": centring, "accuracy": accuracy})
    return sums.take() | optimizer.step()


@torch.no_grad()
def normalise(
    model: RewardModel, demonstrations: Sequence[Example], ranked: Sequence[Comparison], config: Config
) -> dict[str, float]:
    """Shift the scores so that demonstrations average 0, and note how far answers to one prompt lie apart.

    With mean_std also scale them, in the head itself, so that those of demonstrations have a standard deviation of 1.
    Returns the raw mean that became 0, and the spread: the root mean square of scores around their prompt's mean.
    Raises ValueError where a scale is asked for and all demonstrations score the same.
    """
    ask = partial(model_scores, model)
    scores = shared_scores(ask, demonstrations, config.tokens_per_micro).double()
    model.mean += scores.mean().item()
    if config.normalisation == "mean_std":
        deviation = scores.std(correction=0).item()
        if deviation <= 1e-6 * (1 + scores.abs().max().item()):  # equal ones may differ by rounding
            raise ValueError(
                f"normalisation: expected demonstrations whose scores differ, got a deviation of {deviation}"
            )
        model.head.weight.div_(deviation)
        model.mean /= deviation
    scores = shared_scores(ask, [e for c in ranked for e in c.examples], config.tokens_per_micro).double()
    around = [group - group.mean() for group in scores.split([len(c.examples) for c in ranked])]
    model.spread = torch.cat(around).square().mean().sqrt().item()
    return {"demonstration_mean": model.mean, "spread": model.spread}
