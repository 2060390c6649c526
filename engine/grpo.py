"""GRPO and its family: several answers to each prompt are compared with each other, so there is no critic.

    generate   prompts -> groups of responses, whose log-probs the decode step yields
    score      one number per response, from a reward model or from functions; optionally one per step of it
    compare    advantages: each score against those of its group
    examine    the log-probs that the ratio is taken to, and those of the reference where there is one
    update     clipped policy loss + beta * k3(policy, reference)

    grpo       (score - mean) / std; a mean over responses of means over tokens      Shao et al. 2024
    dr_grpo    score - mean; tokens over responses * max_new_tokens                  Liu et al. 2025
    dapo       as grpo, but a mean over tokens; clips higher above than below        Yu et al. 2025
    rloo       score - mean of the others; a mean over responses of sums over tokens Ahmadian et al. 2024
    gspo       as grpo, but with the ratio of the whole response                     Zheng et al. 2025

All of DAPO is loss=dapo with resample and overlong_buffer. Every per-token tensor is (R,), ragged over response tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from twinhead.engine import backbone, data, losses, mismatch, planning, ranks, rollout_options, scorers
from twinhead.engine.batch import Example, Rollout, cumulative, pack, segment_ids
from twinhead.engine.data import Order, Prompt
from twinhead.engine.evaluate import describe
from twinhead.engine.experience import Comparison, corrected, deal
from twinhead.engine.lora import Lora
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.residence import pinned, resident
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import ProcessFunction, RewardFunction, Scorer
from twinhead.engine.shares import generate
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit, checkpoint_gradients, set_precision
from twinhead.kernels import grpo_loss

Config = rollout_options.GRPO
Evaluation = Callable[[Policy], dict[str, float]]
Batch = list[list[Comparison]]  # minibatches of micro-batches


@dataclass(frozen=True, slots=True)
class Member:
    """One of the family: what its advantages, its mean and its ratio are."""

    advantages: str = "grpo"  # the kind of losses.group_advantages
    loss_type: str = "grpo"  # that of kernels.grpo_loss
    mean: str = "responses"  # what the sum over an optimizer step is divided by
    whole: bool = False  # the ratio is that of the whole response


FAMILY = {
    "grpo": Member(),
    "dr_grpo": Member("dr_grpo", "dr_grpo", mean="places"),
    "dapo": Member(loss_type="dapo", mean="tokens"),
    "rloo": Member("rloo", "dapo"),
    "gspo": Member(whole=True),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """A response, and how it stands against its group."""

    rollout: Rollout
    score: float  # with the penalties for its length
    advantages: Tensor  # (len(response),)


Group = list[Compared]  # the responses to one prompt


@dataclass(frozen=True, slots=True)
class Judge:
    """What responses are worth: scores of whole responses, and where there is a function for it, of their steps."""

    scorer: Scorer
    process: ProcessFunction | None

    def __call__(
        self, rollouts: Sequence[Rollout], asked: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """(S,) total scores, (R,) step rewards (see scorers.score_steps), and the (S,) scores of every source."""
        scores, sources = self.scorer(rollouts, asked)
        if self.process is None:
            return scores, None, sources
        return scores, scorers.score_steps(self.process, self.scorer.text, rollouts, asked), sources


def train(
    config: Config,
    reward_funcs: Sequence[RewardFunction] = (),
    evaluate: Evaluation | None = None,
    process: ProcessFunction | None = None,
) -> Run:
    """Train the policy of config.model; the final checkpoint stands in config.output_dir."""
    run = Run(config, "grpo")
    if run.finished:
        return run
    text = Text.from_pretrained(config.model)
    prompts = data.prompts(config.prompts, text, config.max_prompt_tokens)
    run.say(prompts.summary())
    functions = [*map(scorers.load_function, config.reward_functions), *reward_funcs]
    if config.process_function:
        process = scorers.load_function(config.process_function, "process_function")
    planning.foresee(config, run)
    with run.timed("load"):
        policy, reference, scorer = load(config, run, text, functions)
    for model in filter(None, (policy, scorer.reward_model)):
        check_fit(model.model, [Example(p.tokens, []) for p in prompts], config.max_new_tokens)
    optimizer = Optimizer(policy, config, config.steps * config.epochs * config.minibatches)
    run.track(policy, text, optimizer=optimizer)
    judge = Judge(scorer, process)
    sampling = Sampling(  # the policy's own distribution: no filter that its log-probs would miss
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        num_slots=config.num_slots, cache_bytes=config.cache_bytes,
        cuda_graphs=config.cuda_graphs, keep_cache=config.cuda_graphs, stop=tuple(text.stop_ids),
    )  # fmt: skip

    for step in run.steps(config.steps):
        groups, stats = gather(policy, judge, prompts, sampling, step, run, config)
        if bad := scorers.nonfinite_rows(torch.tensor([c.score for group in groups for c in group])):
            run.skip(step, stats, f"non-finite scores in rows {bad[:5]}")
            continue
        if not groups:
            run.log(step, stats, note="nothing to learn: in every group all answers are worth the same")
            continue
        with run.timed("examine"), resident(reference, policy.device):
            batch, examined = examine(policy, reference, groups, config, run.seed("deal", step))
        with run.timed("update"):
            updated = update(policy, optimizer, batch, config, random.Random(run.seed("shuffle", step)))
        if updated["mismatch/mean"] > config.mismatch_alarm:
            stats["guard/mismatch"] = updated["mismatch/mean"]
            run.say(f"step {step}: {mismatch.warning(updated['mismatch/mean'], config.mismatch_alarm)}")
        if evaluate is not None and config.eval_every and step % config.eval_every == 0:
            with run.timed("evaluate"):
                stats |= {f"eval/{name}": value for name, value in ranks.first(partial(evaluate, policy)).items()}
        run.log(step, stats | examined | updated, note=f"score {examined['objective/score']:.2f}")
    return run.finish()


def load(
    config: Config, run: Run, text: Text, functions: Sequence[RewardFunction]
) -> tuple[Policy, Policy | None, Scorer]:
    """The policy to train, the reference it is held to (None without beta), and the source of its rewards."""
    dtype, device = config.torch_dtype, config.torch_device
    policy = Policy.from_pretrained(config.model, "none", dtype, device, Lora.of(config), run.resume_from)
    if config.gradient_checkpointing:
        checkpoint_gradients(policy.model)
    home = torch.device("cpu") if config.offload else device
    reference: Policy | None = backbone.reference(policy) if config.beta > 0 else None
    if config.beta > 0 and reference is None:
        reference = Policy.from_pretrained(config.model, "none", dtype, home).requires_grad_(False).eval()
    judge = scorers.load_reward_model(config.reward_model, text, dtype, home) if config.reward_model else None
    for frozen in filter(None, (reference, judge)) if config.offload else ():
        pinned(frozen)
    for model in filter(None, (policy, reference, judge)):
        set_precision(model.model, config.dtype)
    return policy, reference, Scorer(text, judge, functions, config.reward_weights, config.tokens_per_micro)


def gather(
    policy: Policy, judge: Judge, prompts: Sequence[Prompt], sampling: Sampling, step: int, run: Run, config: Config
) -> tuple[list[Group], dict[str, float]]:
    """Generate, score, compare: the groups of one step, and statistics of all that were drawn for it.

    Dynamic sampling (Yu et al. 2025, section 3.2): groups that are all worth the same make room for other prompts.
    """
    groups: list[Group] = []
    drawn: list[Rollout] = []
    scores: list[dict[str, Tensor]] = []
    for attempt in range(1 + config.resample):
        missing = config.prompts_per_step - len(groups)
        if not missing:
            break
        order = Order(len(prompts), config.prompts_per_step, run.seed(f"prompts {attempt}"))
        asked = [prompts[i] for i in order.take(step - 1)[:missing] for _ in range(config.group_size)]
        with run.timed("generate"):
            seed = run.seed(f"rollout {attempt}", step)
            rollouts = generate(policy, [p.tokens for p in asked], replace(sampling, seed=seed))
        with run.timed("score"), resident(judge.scorer.reward_model, policy.device):
            totals, steps, sources = judge(rollouts, asked)
        found = compare(rollouts, totals, steps, config)
        groups += [group for group in found if not config.resample or varied(group)]
        drawn += rollouts
        scores.append(sources)
    every = {name: torch.cat([sources[name] for sources in scores]) for name in scores[0]}
    num_flat = len(drawn) // config.group_size - sum(map(varied, groups))
    return groups, describe(drawn, every) | {"rollout/groups": len(groups), "rollout/flat_groups": num_flat}


def compare(rollouts: Sequence[Rollout], scores: Tensor, steps: Tensor | None, config: Config) -> list[Group]:
    """Every response against the others to its prompt, its neighbours. scores: (S,); steps: (R,) step rewards."""
    lengths = torch.tensor([len(r.response) for r in rollouts])
    finished = torch.tensor([r.finished for r in rollouts])
    scores = losses.eos_rule(scores, finished, subtract=config.missing_eos_penalty)
    if config.overlong_buffer:
        scores = scores + config.overlong_penalty * losses.overlong(
            lengths, config.max_new_tokens, config.overlong_buffer
        )
    kind, cu_rows = FAMILY[config.loss].advantages, cumulative(lengths.tolist())
    advantages = losses.group_advantages(scores, config.group_size, kind=kind)[segment_ids(cu_rows)]
    if steps is not None:
        advantages = advantages + losses.process_advantages(steps, cu_rows, config.group_size, kind=kind)
    parts = zip(rollouts, scores.tolist(), advantages.split(lengths.tolist()), strict=True)
    compared = [Compared(*part) for part in parts]
    return [compared[i : i + config.group_size] for i in range(0, len(compared), config.group_size)]


def varied(group: Group) -> bool:
    """Whether there is anything to learn from a group: no advantage is not 0 where all responses are worth the same."""
    return any(bool(c.advantages.any()) for c in group)


@torch.no_grad()
def examine(
    policy: Policy, reference: Policy | None, groups: Sequence[Group], config: Config, seed: int
) -> tuple[Batch, dict[str, float]]:
    """What the update needs to know of every token, dealt into minibatches; and what the groups look like."""
    every = [c for group in groups for c in group]
    batch: Batch = []
    kls: list[Tensor] = []
    for minibatch in deal([c.rollout for c in every], config.minibatches, config.tokens_per_micro, seed):
        batch.append([])
        for micro in minibatch:
            sampled = [every[i].rollout for i in micro]
            packed = pack(sampled, policy.device)
            seen = torch.cat([r.logprobs for r in sampled])
            advantages = torch.cat([every[i].advantages for i in micro]).to(seen.device)
            logprobs, ref_logprobs = seen, None
            if config.old_logprobs == "recompute":
                logprobs = policy(packed, temperature=config.temperature, entropy=False).logprobs
            if reference is not None:
                ref_logprobs = reference(packed, temperature=config.temperature, entropy=False).logprobs
                kls.append(losses.sequence_kl(logprobs, ref_logprobs, packed.cu_rows))
            batch[-1].append(Comparison(packed, seen, logprobs, advantages, ref_logprobs))
    scores = torch.tensor([c.score for c in every], dtype=torch.float64)
    measured = {
        "objective/score": scores.mean().item(),
        "objective/score_std": scores.std(correction=0).item(),
        "adv/abs_mean": torch.cat([c.advantages for c in every]).abs().double().mean().item(),
    }
    if reference is not None:
        measured["objective/kl"] = ranks.cat(kls).double().mean().item()
    return batch if config.importance_cap is None else corrected(batch, config.importance_cap), measured


def update(policy: Policy, optimizer: Optimizer, batch: Batch, config: Config, rng: random.Random) -> dict[str, float]:
    """Epochs of minibatches: one optimizer step each, its loss a mean over all of the minibatch."""
    sums, num_updates = Sums(), 0
    first: list[tuple[Tensor, Tensor]] = []  # log-probs of the trainer and of the sampler, before any update
    for _ in range(config.epochs):
        for minibatch in rng.sample(batch, len(batch)):
            counts = count(minibatch, config)
            for comparison in minibatch:
                stats, logprobs = learn(policy, comparison, counts, config)
                sums.add(stats)
                if num_updates == 0:
                    sums.add({"first_ratio_gap": losses.ratio_gap(logprobs, comparison.logprobs)})
                    first.append((logprobs, comparison.sampled))
            sums.add(optimizer.step(), whole=True)
            num_updates += 1
    gaps = Sums()
    gaps.add(mismatch.measure(*(ranks.cat([pair[i] for pair in first]) for i in (0, 1))), whole=True)
    updated = sums.take(num_updates, prefix="policy/") | gaps.take(prefix="mismatch/")
    return updated | {"policy/num_updates": num_updates}


def count(minibatch: Sequence[Comparison], config: Config) -> dict[str, int]:
    """What a loss may be a mean over (Member.mean), of this minibatch on all ranks."""
    tokens = ranks.total(sum(c.packed.num_targets for c in minibatch))
    responses = ranks.total(sum(c.packed.num_sequences for c in minibatch))
    return {"responses": responses, "tokens": tokens, "places": responses * config.max_new_tokens}


def learn(
    policy: Policy, comparison: Comparison, counts: Mapping[str, int], config: Config
) -> tuple[dict[str, Tensor], Tensor]:
    """Add the gradient of one micro-batch's share of the loss; its statistics, and the log-probs (R,) of its tokens."""
    scored = policy(comparison.packed, temperature=config.temperature)
    assert scored.entropy is not None, "it was asked for"
    loss, stats = objective(scored.logprobs, comparison, counts, config)
    loss.backward()
    return stats | {"entropy": scored.entropy.detach().sum() / counts["tokens"]}, scored.logprobs.detach()


def objective(
    logprobs: Tensor, comparison: Comparison, counts: Mapping[str, int], config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the loss of its minibatch, and of its statistics. logprobs: (R,) of the policy."""
    member, (clip_low, clip_high) = FAMILY[config.loss], config.clips
    packed, old_logprobs, ref_logprobs = comparison.packed, comparison.logprobs, comparison.ref_logprobs
    if member.whole:
        old_logprobs = losses.response_ratio(logprobs, old_logprobs, packed.cu_rows)
    loss, stats = grpo_loss(
        logprobs, old_logprobs, comparison.advantages, cu_seqlens=packed.cu_rows,
        ref_logprobs=ref_logprobs, beta=config.beta, epsilon_low=clip_low, epsilon_high=clip_high,
        loss_type=member.loss_type, normalizer=counts[member.mean],
    )  # fmt: skip
    means = ("approx_kl", "approx_kl_k3", "clipfrac", "ratio_mean") + (() if ref_logprobs is None else ("ref_kl",))
    shares = {name: stats[name] * (packed.num_targets / counts["tokens"]) for name in means}
    return loss, shares | {"loss": loss.detach(), "ratio_max": stats["ratio_max"]}
