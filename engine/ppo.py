"""PPO with one trunk: the actor and the critic are two heads on the same hidden states.

    generate   prompts -> responses, whose log-probs and values the decode step yields
    score      one number per response, from a reward model or from functions; optionally one per step of it
    examine    reward -kl_coef * (log pi - log pi_ref) on every token, the score on the last; GAE; whitening
    update     clipped policy loss + clipped value loss - entropy bonus, one backward through the shared trunk

Critics with layers of their own (critic=branch or separate) have their values from one packed pass in `examine`.

Ouyang et al. 2022 (InstructGPT), Ziegler et al. 2019, Schulman et al. 2017. Every per-token tensor is (R,), ragged
over response tokens: there is no padding, hence no mask.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from twinhead.engine import backbone, critic, data, losses, mismatch, penalty, planning, ranks, rollout_options, scorers
from twinhead.engine.batch import Example, Packed, Rollout, pack, segment_sum
from twinhead.engine.best import Best
from twinhead.engine.critic import Separate
from twinhead.engine.data import Order, Prompt
from twinhead.engine.ema import EMA
from twinhead.engine.evaluate import describe, objective
from twinhead.engine.experience import Batch, Experience, behaviour, corrected, deal, whitened
from twinhead.engine.lora import Lora
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.penalty import Penalty
from twinhead.engine.policy import Policy
from twinhead.engine.residence import pinned, resident
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import Ensemble, ProcessFunction, RewardFunction, RunningScale, Scorer
from twinhead.engine.shares import generate
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit, checkpoint_gradients, set_precision
from twinhead.engine.validation import Evaluation, HeldOut, Validation
from twinhead.kernels import gae, linear_ppo_loss

Config = rollout_options.PPO
plan = planning.plan


def train(
    config: Config,
    reward_funcs: Sequence[RewardFunction] = (),
    evaluate: Evaluation | None = None,
    process: ProcessFunction | None = None,
) -> Run:
    """Train the policy of config.model; the final checkpoint, critic included, stands in config.output_dir."""
    run = Run(config, "ppo")
    if run.finished:
        return run
    text = Text.from_pretrained(config.model)
    prompts = data.prompts(config.prompts, text, config.max_prompt_tokens)
    mix = data.documents(config.ptx_data, text, config.ptx_max_length) if config.ptx_data else None
    run.say(prompts.summary())
    functions = [*map(scorers.load_function, config.reward_functions), *reward_funcs]
    process = scorers.load_function(config.process_function, "process_function") if config.process_function else process
    planning.foresee(config, run)
    with run.timed("load"):
        policy, reference, scorer = load(config, run, text, functions)
    expect_fit(policy, scorer, prompts, mix, config)
    optimizer, ema = follow(policy, text, run, config)
    kl = losses.AdaptiveKL(config.kl_coef, config.kl_target_nats, config.kl_horizon)
    scale, best = RunningScale(), Best(config.best_by, config.patience)
    run.track(policy, text, *filter(None, [ema]), optimizer=optimizer, kl=kl, scale=scale, best=best)
    validation = measured(policy, ema, text, scorer, evaluate, config)
    sampling, order = drawing(text, config), Order(len(prompts), config.rollouts_per_step, config.seed)

    for step in run.steps(config.steps):
        asked = [prompts[i] for i in order.take(step - 1)]
        with run.timed("generate"):
            rollouts = generate(policy, [p.tokens for p in asked], replace(sampling, seed=run.seed("rollout", step)))
        with run.timed("score"), resident(scorer.reward_model, policy.device):
            scores, sources = scorer(rollouts, asked)
            steps = scorers.score_steps(process, text, rollouts, asked) if process else None
        stats = {"objective/kl_coef": kl.coef, **describe(rollouts, sources)}
        if bad := scorers.nonfinite_rows(scores):
            run.skip(step, stats, f"non-finite scores in rows {bad[:5]}")
            continue
        if config.normalise_scores:
            scores = scale.normalised(scores)
            stats |= {"score/running_mean": scale.mean, "score/running_std": scale.std}
        seed, rng = run.seed("deal", step), random.Random(run.seed("shuffle", step))
        with run.timed("examine"), resident(reference, policy.device):
            batch, examined = examine(policy, reference, rollouts, scores, kl.coef, config, seed, steps)
        if config.stop_kl_nats is not None and examined["objective/kl"] > config.stop_kl_nats:
            run.log(step, stats | examined, note=f"stopped at {examined['objective/kl']:.2f} nats from the reference")
            break
        warming, charged = step <= config.critic_warmup, Penalty.in_loss(config, reference, kl.coef)
        with run.timed("update"), resident(charged.reference if charged else None, policy.device):
            updated = update(policy, optimizer, batch, mix, config, rng, charged, warming)
        if not warming:
            kl.update(examined["objective/kl"], len(rollouts))
        if updated["mismatch/mean"] > config.mismatch_alarm:
            stats["guard/mismatch"] = updated["mismatch/mean"]
            run.say(f"step {step}: {mismatch.warning(updated['mismatch/mean'], config.mismatch_alarm)}")
        stats |= validation(step, run.timed)
        run.log(step, stats | examined | updated, note=f"score {examined['objective/score']:.2f}")
        if best.settled(step, stats, run.save_best):
            break
    return run.finish()


def expect_fit(
    policy: Policy, scorer: Scorer, prompts: Sequence[Prompt], mix: Sequence[Example] | None, config: Config
) -> None:
    """Raise ValueError, before any work, for what one of the models cannot read."""
    check_fit(policy.model, mix or [])
    critic_model = [policy.network] if isinstance(policy.network, Separate) else []
    for model in (policy, *critic_model, *scorer.reward_models):
        check_fit(model.model, [Example(p.tokens, []) for p in prompts], config.max_new_tokens)


def follow(policy: Policy, text: Text, run: Run, config: Config) -> tuple[Optimizer, EMA | None]:
    """The optimizer, in which a critic's own layers are apart, and the average that follows its steps."""
    own = 1.0 if config.critic_learning_rate is None else config.critic_learning_rate / config.learning_rate
    scales = {"value_head.": config.value_lr_scale, "network.value_head.": own * config.value_lr_scale, "network.": own}
    apart = None if policy.network is None else "network."
    optimizer = Optimizer(policy, config, config.steps * config.epochs * config.minibatches, scales, apart)
    if config.ema_decay is None:
        return optimizer, None
    ema = EMA(policy, config.ema_decay, text, run.resume_from)
    ema.follow(policy, optimizer)
    return optimizer, ema


def measured(
    policy: Policy, ema: EMA | None, text: Text, scorer: Scorer, evaluate: Evaluation | None, config: Config
) -> Validation:
    """What is measured every eval_every steps: what the caller measures, and the score of held-out prompts."""
    evaluations: list[Evaluation] = []
    if evaluate is not None:  # a caller's own, which knows nothing of ranks
        evaluations.append(lambda policy: ranks.first(partial(evaluate, policy)))
    if config.eval_prompts:
        asked = data.prompts(config.eval_prompts, text, config.max_prompt_tokens)
        for model in (policy, *scorer.reward_models):
            check_fit(model.model, [Example(p.tokens, []) for p in asked], config.max_new_tokens)
        sampling = replace(drawing(text, config), bootstrap=False, seed=config.seed)
        evaluations.append(HeldOut(asked, scorer, sampling))
    subjects = {"eval": policy} | ({"eval_ema": ema.policy} if ema is not None else {})
    return Validation(config.eval_every, evaluations, subjects)


def drawing(text: Text, config: Config) -> Sampling:
    """The policy's own distribution: no filter that its log-probs would miss."""
    valued = config.critic in ("shared", "detached")  # the other critics say nothing while decoding
    return Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, num_slots=config.num_slots,
        cache_bytes=config.cache_bytes, bootstrap=config.bootstrap_truncated and valued,
        cuda_graphs=config.cuda_graphs, keep_cache=config.cuda_graphs, stop=tuple(text.stop_ids),
    )  # fmt: skip


def load(config: Config, run: Run, text: Text, functions: Sequence[RewardFunction]) -> tuple[Policy, Policy, Scorer]:
    """The policy to train, the reference it is held to, and the source of its rewards."""
    dtype, device = config.torch_dtype, config.torch_device
    policy = load_actor(config, run, text)
    home = torch.device("cpu") if config.offload else device
    reference: Policy | None = None if config.reference else backbone.reference(policy)
    if reference is None:
        held_to = config.reference or config.model
        scorers.check_tokenizer(held_to, text, "reference")
        reference = Policy.from_pretrained(held_to, "none", dtype, home).requires_grad_(False).eval()
    paths = [config.reward_model] if config.reward_model else config.reward_models
    judges = (
        [backbone.reward_model(policy, path, text, i) for i, path in enumerate(paths)]
        if config.share == "all"
        else [scorers.load_reward_model(path, text, dtype, home) for path in paths]
    )
    for frozen in (reference, *judges) if config.offload else ():
        pinned(frozen)
    for model in (policy, reference, *judges, *filter(None, [policy.network])):
        set_precision(model.model, config.dtype)
    if config.kl_kind == "full":
        penalty.check_heads(policy, reference)
    judge = judges[0] if config.reward_model else None
    ensemble = Ensemble(judges, config.ensemble, config.ensemble_coef) if config.reward_models else None
    if critic.found(run.resume_from or config.model, config.critic) is None:
        if config.value_init == "reward_model":
            policy.value_from(judge)
        elif config.value_init == "sft":
            policy.draw_values(run.seed("value head"))
    return policy, reference, Scorer(text, judge or ensemble, functions, config.reward_weights, config.tokens_per_micro)


def load_actor(config: Config, run: Run, text: Text) -> Policy:
    """The policy with its critic: the one beside it, or a new one."""
    trunk_of = config.critic_model or config.model
    if config.critic == "separate" and critic.found(run.resume_from or config.model, "separate") is None:
        if config.value_init == "reward_model" and config.reward_model:
            trunk_of = config.reward_model
        scorers.check_tokenizer(trunk_of, text, "critic_model")
    policy = Policy.from_pretrained(
        config.model, config.critic, config.torch_dtype, config.torch_device, Lora.of(config), run.resume_from,
        branch_layers=config.branch_layers, critic_model=trunk_of,
    )  # fmt: skip
    whole = [policy.network.model] if isinstance(policy.network, Separate) else []
    for model in (policy.model, *whole) if config.gradient_checkpointing else ():
        checkpoint_gradients(model)
    return policy


@torch.no_grad()
def examine(
    policy: Policy,
    reference: Policy,
    rollouts: list[Rollout],
    scores: Tensor,
    kl_coef: float,
    config: Config,
    seed: int,
    steps: Tensor | None = None,
) -> tuple[Batch, dict[str, float]]:
    """Token rewards, advantages and returns of every rollout, dealt into minibatches; and what they look like.

    steps: (R,) over all rollouts, what the step that ends at a token is worth, NaN where none ends.
    """
    finished = torch.tensor([r.finished for r in rollouts])
    scores = losses.eos_rule(scores, finished, subtract=config.missing_eos_penalty)
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    batch: Batch = []
    kls, charges = list[Tensor](), list[Tensor]()  # (S,) per micro-batch: nats, and those that the rewards pay for
    lengths = [len(r.response) for r in rollouts]
    worth = steps.nan_to_num(0.0).split(lengths) if steps is not None else None
    for minibatch in deal(rollouts, config.minibatches, config.tokens_per_micro, seed):
        batch.append([])
        for micro in minibatch:
            sampled = [rollouts[i] for i in micro]
            packed = pack(sampled, policy.device)
            seen, logprobs, values, after = behaviour(
                policy, packed, sampled, config.temperature, config.old_logprobs, config.bootstrap_truncated
            )
            ref_rows = reference.hidden(packed)[packed.rows]
            ref_logprobs = reference.score(ref_rows, packed, temperature=config.temperature, entropy=False).logprobs
            charged = penalty.charges(config, policy, reference, packed, logprobs, ref_logprobs, ref_rows)
            score = scores[micro].to(packed.tokens.device)
            rewards = losses.token_rewards(charged, score, packed.cu_rows, kl_coef)
            if worth is not None:
                rewards = rewards + torch.cat([worth[i] for i in micro]).to(rewards.device)
            advantages, returns = advantage(rewards, values, after, packed, config)
            e = Experience(packed, seen, logprobs, values, advantages, returns)
            batch[-1].append(penalty.remembered(config, e, ref_logprobs, ref_rows))
            kls.append(losses.sequence_kl(logprobs, ref_logprobs, packed.cu_rows))
            charges.append(segment_sum(charged, packed.cu_rows))
    non_score = -kl_coef * ranks.cat(charges).double().mean().item()
    if worth is not None:
        non_score += torch.cat(worth).double().sum().item() / len(rollouts)
    measured = objective(batch, ranks.cat(kls), scores, non_score)
    batch = whitened(batch)
    return batch if config.importance_cap is None else corrected(batch, config.importance_cap), measured


def advantage(rewards: Tensor, values: Tensor, after: Tensor, packed: Packed, config: Config) -> tuple[Tensor, Tensor]:
    """(R,) advantages and (R,) returns. after: (S,) the value of what follows a response, 0 where nothing does."""
    if config.advantage == "bandit":
        return losses.bandit(rewards, values, packed.cu_rows)
    return gae(rewards, values, gamma=config.gamma, lam=config.lam, cu_seqlens=packed.cu_rows, bootstrap=after)


def update(
    policy: Policy,
    optimizer: Optimizer,
    batch: Batch,
    mix: Sequence[Example] | None,
    config: Config,
    rng: random.Random,
    charged: Penalty | None = None,
    warming: bool = False,
) -> dict[str, float]:
    """Epochs of minibatches: one optimizer step each, its loss a mean over all of the minibatch's tokens.

    warming: the critic learns alone.
    """
    sums, num_updates = Sums(), 0
    first: list[tuple[Tensor, Tensor]] = []  # log-probs of the trainer and of the sampler, before any update
    for _ in range(config.epochs):
        moved = torch.zeros((), device=policy.device)  # KL(old || new), summed over minibatches
        for minibatch in rng.sample(batch, len(batch)):
            num_tokens = ranks.total(sum(e.packed.num_targets for e in minibatch))
            for e in minibatch:
                stats, logprobs = learn(policy, e, num_tokens, config, charged, warming)
                sums.add(stats)
                moved += stats["approx_kl_k3"]
                if num_updates == 0:
                    sums.add({"first_ratio_gap": losses.ratio_gap(logprobs, e.logprobs)})
                    first.append((logprobs, e.sampled))
            if mix is not None and not warming:
                sums.add({"ptx_loss": mix_in(policy, mix, optimizer.num_steps, config)})
            sums.add(optimizer.step(), whole=True)
            num_updates += 1
        if config.kl_stop is not None and ranks.total(moved.item()) / len(batch) > config.kl_stop:
            break
    gaps = Sums()
    gaps.add(mismatch.measure(*(ranks.cat([pair[i] for pair in first]) for i in (0, 1))), whole=True)
    updated = sums.take(num_updates, prefix="policy/") | gaps.take(prefix="mismatch/")
    return updated | {"policy/num_updates": num_updates}


def learn(
    policy: Policy, e: Experience, num_tokens: int, config: Config, charged: Penalty | None, warming: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Add the gradient of one micro-batch's share of the loss; its statistics, and the log-probs (R,) of its tokens."""
    with torch.set_grad_enabled(not warming):
        rows = policy.hidden(e.packed)[e.packed.rows]  # (R, H): only these meet the vocabulary, and the critic
        policy_loss, stats, logprobs = linear_ppo_loss(
            targets=e.packed.targets, old_logprobs=e.logprobs, advantages=e.advantages,
            clip_low=config.clip_low, clip_high=config.clip_high, entropy_coef=config.entropy_coef,
            temperature=config.temperature, normalizer=num_tokens, return_logprobs=True,
            **policy.vocabulary(rows), **(charged.estimate(e) if charged is not None else {}),
        )  # fmt: skip
        if charged is not None and charged.exact:
            nats = charged.nats(policy, rows, e).sum() / num_tokens
            policy_loss, stats = policy_loss + charged.coef * nats, stats | {"ref_kl": nats.detach()}
    values = policy.values(rows) if policy.network is None else policy.appraise(e.packed)[e.packed.rows]
    assert values is not None, "PPO has a critic"
    errors, clipped = losses.value_loss(values, e.values, e.returns, config.value_clip)
    value_loss = errors.sum() / num_tokens
    loss = config.value_coef * value_loss
    (loss if warming else policy_loss + loss).backward()
    return stats | {"vf_loss": value_loss.detach(), "vf_clipfrac": clipped.sum() / num_tokens}, logprobs


def mix_in(policy: Policy, mix: Sequence[Example], number: int, config: Config) -> Tensor:
    """PPO-ptx (Ouyang et al. 2022, equation 2): add the gradient of ptx_coef * language-model loss on plain text."""
    blocks = [mix[i] for i in Order(len(mix), config.ptx_batch_size, config.seed).take(number)]
    own = ranks.share([len(block.response) for block in blocks])
    packed = pack([blocks[i] for i in own], policy.device)
    num_targets = ranks.total(packed.num_targets)
    if not own:  # there are more ranks than blocks
        return torch.zeros((), device=policy.device)
    loss = -policy(packed, entropy=False).logprobs.sum() / num_targets
    (config.ptx_coef * loss).backward()
    return loss.detach()
