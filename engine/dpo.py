"""DPO and its family: preferences without a reward model, as the policy's log-ratio to a reference is the reward.

    pairs     sigmoid (with label_smoothing: conservative), robust, hinge, ipo, ipo_mean: the log-ratio of the better
              answer must exceed that of the worse one
    unpaired  kto: the log-ratio of a good answer must exceed the KL from the reference, that of a bad one must not

Rafailov et al. 2023 (DPO), Mitchell 2023 (conservative), Ray Chowdhury et al. 2024 (robust), Zhao et al. 2023 (hinge),
Azar et al. 2023 (IPO), Ethayarajh et al. 2024 (KTO). A log-ratio is log pi - log pi_ref of a whole response, a sum
over its tokens; ipo_mean alone compares means over tokens, as TRL's ipo does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twinhead.engine import backbone, data, losses, options, planning, ranks
from twinhead.engine.batch import Example, cumulative, pack
from twinhead.engine.config import Source
from twinhead.engine.data import Order, Unpaired
from twinhead.engine.lora import Lora
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.reference import Reference, response_logprobs
from twinhead.engine.rows import source_name
from twinhead.engine.run import Run
from twinhead.engine.scorers import check_tokenizer
from twinhead.engine.shares import micro_batches
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit, checkpoint_gradients, set_precision
from twinhead.kernels import dpo_loss

Config = options.DPO


@dataclass(frozen=True, slots=True)
class Judged:
    """What one row teaches: answers to a prompt, and the verdict on them."""

    answers: list[Example]  # (K,); unpaired: one
    ranks: list[int]  # (K,) smaller is better, equal is a tie; unpaired: 0 for a good answer, 1 for a bad one
    stranger: Example | None = None  # unpaired: the prompt with the answer to another, for the KL estimate

    @property
    def num_pairs(self) -> int:
        return sum(a < b for a in self.ranks for b in self.ranks)


@dataclass(frozen=True, slots=True)
class Contrast:
    """P terms of the loss, each a pair or, unpaired, an answer: what they are and what they say."""

    losses: Tensor  # (P,)
    lead: Tensor  # (P,) nats by which the better log-ratio is ahead: of the worse one, or of the baseline
    good: Tensor  # indices of the better answers
    bad: Tensor  # indices of the worse ones


def train(config: Config) -> Run:
    """Train the policy of config.model on preferences; the final checkpoint stands in config.output_dir."""
    run = Run(config, "dpo")
    if run.finished:
        return run
    text = Text.from_pretrained(config.model)
    train_set, summary = read(config.data, text, config)
    eval_set, _ = read(config.eval_data, text, config) if config.eval_data else ([], "")
    run.say(summary)
    planning.foresee(config, run)
    with run.timed("load"):
        policy = load(config, run)
    examples = [e for judged in [*train_set, *eval_set] for e in (*judged.answers, judged.stranger) if e]
    check_fit(policy.model, examples)
    order = Order(len(train_set), config.batch_size, config.seed)
    total = order.steps(config.epochs)
    optimizer = Optimizer(policy, config, total)
    run.track(policy, text, optimizer=optimizer)
    with run.timed("reference"):
        reference = load_reference(policy, run, text, examples, config)

    for step in run.steps(total):
        with run.timed("update"):
            stats = update(policy, reference, optimizer, [train_set[i] for i in order.batch(step - 1)], config)
        if eval_set and (step == total or order.epoch(step) > order.epoch(step - 1)):
            with run.timed("evaluate"):
                stats |= evaluate(policy, reference, eval_set, config)
        run.log(step, stats, note=f"accuracy {stats['accuracy']:.2f}")
    return run.finish()


def read(source: Source, text: Text, config: Config) -> tuple[list[Judged], str]:
    """Comparisons, or for kto single answers, each beside a stranger; and what is to be said of their source.

    Raises ValueError naming the row for what is malformed, and where there is nothing to compare.
    """
    if config.loss != "kto":
        pairs = data.comparisons(source, text, config.max_length)
        return [Judged(c.examples, c.ranks) for c in pairs], pairs.summary()
    loaded = data.unpaired(source, text, config.max_length)
    if len({item.label for item in loaded}) == 1:
        only = "good ones (label true)" if loaded[0].label else "bad ones (label false)"
        raise ValueError(f"{source_name(source)}: expected good and bad answers, got only {only}")
    if all(item.example.prompt == loaded[0].example.prompt for item in loaded):
        raise ValueError(f"{source_name(source)}: expected answers to at least two prompts, got one prompt")
    others = strangers(loaded, config.max_length, config.seed)
    judged = [Judged([u.example], [int(not u.label)], other) for u, other in zip(loaded, others, strict=True)]
    return judged, loaded.summary()


def strangers(items: Sequence[Unpaired], max_length: int, seed: int) -> list[Example]:
    """Every prompt x_i with the answer y_j of the next row of another prompt, in one shuffled order of the rows.

    Ethayarajh et al. 2024, section 4.1, but drawn once, not in every batch: so the reference can be precomputed, and
    rows that share a prompt, as the two of a pair do, never estimate the KL from each other.
    """
    order = list(range(len(items)))
    random.Random(f"strangers of seed {seed}").shuffle(order)
    found: dict[int, Example] = {}
    for place, i in enumerate(order):
        after = (items[order[(place + k) % len(order)]].example for k in range(1, len(order)))
        prompt = items[i].example.prompt
        other = next(example for example in after if example.prompt != prompt)
        room = max_length - len(prompt)
        learn = None if other.learn is None else other.learn[:room]
        found[i] = Example(prompt, other.response[:room], learn)
    return [found[i] for i in range(len(items))]


def load(config: Config, run: Run) -> Policy:
    """The policy to train."""
    dtype, device = config.torch_dtype, config.torch_device
    policy = Policy.from_pretrained(config.model, "none", dtype, device, Lora.of(config), run.resume_from)
    set_precision(policy.model, config.dtype)
    if config.gradient_checkpointing:
        checkpoint_gradients(policy.model)
    return policy


def load_reference(learner: Policy, run: Run, text: Text, examples: Sequence[Example], config: Config) -> Reference:
    """The frozen policy that log-ratios are taken to, or what it says of all examples, computed once.

    A learner with adapters is its own without them. Raises ValueError when it does not read the policy's token ids.
    """
    policy: Policy | None = None if config.reference else backbone.reference(learner)
    if policy is None:
        path, dtype, device = config.reference or config.model, config.torch_dtype, config.torch_device
        check_tokenizer(path, text, "reference")
        policy = Policy.from_pretrained(path, "none", dtype, device).requires_grad_(False).eval()
        set_precision(policy.model, config.dtype)
        check_fit(policy.model, examples)
    if config.precompute_reference:
        return Reference.precomputed(policy, examples, run.dir, config.tokens_per_micro)
    return Reference(policy)


def update(
    policy: Policy, reference: Reference, optimizer: Optimizer, batch: Sequence[Judged], config: Config
) -> dict[str, float]:
    """One optimizer step on the mean over the batch's pairs or, for kto, over its answers."""
    sums = Sums()
    for loss, stats in objective(policy, reference, batch, config):
        loss.backward()
        sums.add(stats)
    return sums.take() | optimizer.step()


@torch.no_grad()
def evaluate(policy: Policy, reference: Reference, held_out: Sequence[Judged], config: Config) -> dict[str, float]:
    """The loss of all held-out rows as one batch, and the same statistics as in training."""
    sums = Sums()
    for _, stats in objective(policy, reference, held_out, config):
        sums.add(stats)
    return sums.take(prefix="eval/")


def objective(
    policy: Policy, reference: Reference, batch: Sequence[Judged], config: Config
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Each micro-batch's share of the mean loss, to be led back to the policy, and of the statistics.

    One pass for all answers of a micro-batch; everything is over the counts of the whole batch.
    """
    baseline = measure_kl(policy, reference, batch, config) if config.loss == "kto" else None
    count, num_good, num_bad = counts(batch, config)
    lengths = [sum(len(e.prompt) + len(e.response) for e in judged.answers) for judged in batch]
    for micro in micro_batches(batch, lengths, config.tokens_per_micro):
        answers = [e for judged in micro for e in judged.answers]
        packed = pack(answers, policy.device)
        ref_logprobs = reference(packed, answers)  # (S,); asked first, while nothing is kept for the gradient
        logprobs = response_logprobs(policy, packed)  # (S,)
        if baseline is None:
            found = contrast_pairs(logprobs, ref_logprobs, packed.cu_rows.diff(), micro, config)
        else:
            found = contrast_answers(logprobs, ref_logprobs, micro, baseline, config)
        loss = found.losses.sum() / count
        stats = {
            "loss": loss,
            "accuracy": ((found.lead > 0).double() + 0.5 * (found.lead == 0)).sum() / count,
            "rewards/margins": config.beta * found.lead.sum() / count,
        }
        logps, ratios = logprobs.detach(), (logprobs - ref_logprobs).detach()
        for side, indices, num in (("chosen", found.good, num_good), ("rejected", found.bad, num_bad)):
            if num:  # a batch of kto may lack one side
                stats[f"rewards/{side}"] = config.beta * ratios[indices].sum() / num
                stats[f"logps/{side}"] = logps[indices].sum() / num
        if baseline is not None:
            stats["kl"] = baseline * (len(micro) / count)
        yield loss, stats


def counts(batch: Sequence[Judged], config: Config) -> tuple[int, int, int]:
    """Terms of the batch's loss, better answers in them and worse ones; of a ranking an answer counts in each pair."""
    if config.loss != "kto":
        pairs = sum(judged.num_pairs for judged in batch)
        return pairs, pairs, pairs
    bad = sum(judged.ranks[0] for judged in batch)
    return len(batch), len(batch) - bad, bad


def contrast_pairs(
    logprobs: Tensor, ref_logprobs: Tensor, num_targets: Tensor, micro: Sequence[Judged], config: Config
) -> Contrast:
    """Every pair of answers to one prompt that its ranking decides.

    logprobs, ref_logprobs: (S,) of whole responses; num_targets: (S,), how many tokens each is a sum over.
    """
    ranks = torch.tensor([rank for judged in micro for rank in judged.ranks], device=logprobs.device)
    cu_groups = cumulative([len(judged.answers) for judged in micro]).to(logprobs.device)
    winner, loser, _ = losses.pairs(ranks, cu_groups)
    ratios = (logprobs - ref_logprobs).detach()
    if config.loss == "ipo_mean":
        some = num_targets.clamp(min=1)
        logprobs, ref_logprobs = logprobs / some, ref_logprobs / some
    found, _, _ = dpo_loss(
        logprobs[winner], logprobs[loser], ref_logprobs[winner], ref_logprobs[loser],
        beta=config.beta, loss_type=config.loss.removesuffix("_mean"), label_smoothing=config.label_smoothing,
    )  # fmt: skip
    return Contrast(found, ratios[winner] - ratios[loser], winner, loser)


def contrast_answers(
    logprobs: Tensor, ref_logprobs: Tensor, micro: Sequence[Judged], baseline: Tensor, config: Config
) -> Contrast:
    """Every answer against the baseline. logprobs, ref_logprobs: (S,) of whole responses."""
    good = torch.tensor([judged.ranks[0] == 0 for judged in micro], device=logprobs.device)
    ratios = logprobs - ref_logprobs
    found = losses.kto(
        ratios, good, baseline, beta=config.beta,
        desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
    )  # fmt: skip
    ahead = ratios.detach() - baseline
    return Contrast(found, torch.where(good, ahead, -ahead), good.nonzero()[:, 0], (~good).nonzero()[:, 0])


@torch.no_grad()
def measure_kl(policy: Policy, reference: Reference, batch: Sequence[Judged], config: Config) -> Tensor:
    """0-dim: the baseline of kto, from the log-ratios of the batch's strangers."""
    others = [judged.stranger for judged in batch if judged.stranger is not None]
    lengths = [len(e.prompt) + len(e.response) for e in others]
    ratios = []
    for micro in micro_batches(others, lengths, config.tokens_per_micro):
        packed = pack(micro, policy.device)
        ratios.append(response_logprobs(policy, packed) - reference(packed, micro))
    return losses.kl_baseline(ranks.cat(ratios))
