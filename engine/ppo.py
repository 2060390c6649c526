"""PPO with one trunk: the actor and the critic are two heads on the same hidden states.

    generate   prompts -> responses, whose log-probs and values the decode step yields
    score      one number per response, from a reward model or from functions
    examine    reward -kl_coef * (log pi - log pi_ref) on every token, the score on the last; GAE; whitening
    update     clipped policy loss + clipped value loss - entropy bonus, one backward through the shared trunk

Ouyang et al. 2022 (InstructGPT), Ziegler et al. 2019, Schulman et al. 2017. Every per-token tensor is (R,), ragged
over response tokens: there is no padding, hence no mask.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twinhead.engine import backbone, data, losses, mismatch, options, planning, scorers, weights
from twinhead.engine.batch import Example, Rollout, pack
from twinhead.engine.data import Order
from twinhead.engine.evaluate import describe, objective
from twinhead.engine.experience import Batch, Experience, behaviour, corrected, deal, whitened
from twinhead.engine.generate import generate
from twinhead.engine.lora import Lora
from twinhead.engine.metrics import Sums
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy
from twinhead.engine.residence import pinned, resident
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.scorers import Ensemble, RewardFunction, RunningScale, Scorer
from twinhead.engine.text import Text
from twinhead.engine.trunk import check_fit, checkpoint_gradients, set_precision
from twinhead.kernels import gae, linear_ppo_loss

Config = options.PPO
plan = planning.plan
Evaluation = Callable[[Policy], dict[str, float]]


def train(config: Config, reward_funcs: Sequence[RewardFunction] = (), evaluate: Evaluation | None = None) -> Run:
    """Train the policy of config.model; the final checkpoint, value head included, stands in config.output_dir."""
    run = Run(config, "ppo")
    if run.finished:
        return run
    text = Text.from_pretrained(config.model)
    prompts = data.prompts(config.prompts, text, config.max_prompt_tokens)
    mix = data.documents(config.ptx_data, text, config.ptx_max_length) if config.ptx_data else None
    run.say(prompts.summary())
    functions = [*map(scorers.load_function, config.reward_functions), *reward_funcs]
    foresee(config, run)
    with run.timed("load"):
        policy, reference, scorer = load(config, run, text, functions)
    check_fit(policy.model, mix or [])
    for model in (policy, *scorer.reward_models):
        check_fit(model.model, [Example(p.tokens, []) for p in prompts], config.max_new_tokens)
    scales = {"value_head.": config.value_lr_scale}
    optimizer = Optimizer(policy, config, config.steps * config.epochs * config.minibatches, scales)
    kl = losses.AdaptiveKL(config.kl_coef, config.kl_target_nats, config.kl_horizon)
    scale = RunningScale()
    run.track(policy, text, optimizer=optimizer, kl=kl, scale=scale)
    sampling = Sampling(  # the policy's own distribution: no filter that its log-probs would miss
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        num_slots=config.num_slots, cache_bytes=config.cache_bytes, bootstrap=config.bootstrap_truncated,
        cuda_graphs=config.cuda_graphs, keep_cache=config.cuda_graphs, stop=tuple(text.stop_ids),
    )  # fmt: skip
    order = Order(len(prompts), config.rollouts_per_step, config.seed)

    for step in run.steps(config.steps):
        asked = [prompts[i] for i in order.take(step - 1)]
        with run.timed("generate"):
            rollouts = generate(policy, [p.tokens for p in asked], replace(sampling, seed=run.seed("rollout", step)))
        with run.timed("score"), resident(scorer.reward_model, policy.device):
            scores, sources = scorer(rollouts, asked)
        stats = {"objective/kl_coef": kl.coef, **describe(rollouts, sources)}
        if bad := scorers.nonfinite_rows(scores):
            run.skip(step, stats, f"non-finite scores in rows {bad[:5]}")
            continue
        if config.normalise_scores:
            scores = scale.normalised(scores)
            stats |= {"score/running_mean": scale.mean, "score/running_std": scale.std}
        with run.timed("examine"), resident(reference, policy.device):
            batch, examined = examine(policy, reference, rollouts, scores, kl.coef, config, run.seed("deal", step))
        with run.timed("update"):
            updated = update(policy, optimizer, batch, mix, config, random.Random(run.seed("shuffle", step)))
        kl.update(examined["objective/kl"], len(rollouts))
        if updated["mismatch/mean"] > config.mismatch_alarm:
            stats["guard/mismatch"] = updated["mismatch/mean"]
            run.say(f"step {step}: {mismatch.warning(updated['mismatch/mean'], config.mismatch_alarm)}")
        if evaluate is not None and config.eval_every and step % config.eval_every == 0:
            with run.timed("evaluate"):
                stats |= {f"eval/{name}": value for name, value in evaluate(policy).items()}
        run.log(step, stats | examined | updated, note=f"score {examined['objective/score']:.2f}")
    return run.finish()


def foresee(config: Config, run: Run) -> None:
    """What memory every phase should take; the run reports what it took. A few architectures have no plan."""
    try:
        run.expect(plan(config).peaks)
    except planning.Unplannable as error:
        run.say(str(error))


def load(config: Config, run: Run, text: Text, functions: Sequence[RewardFunction]) -> tuple[Policy, Policy, Scorer]:
    """The policy to train, the reference it is held to, and the source of its rewards."""
    dtype, device = config.torch_dtype, config.torch_device
    policy = Policy.from_pretrained(config.model, config.critic, dtype, device, Lora.of(config), run.resume_from)
    if config.gradient_checkpointing:
        checkpoint_gradients(policy.model)
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
    for model in (policy, reference, *judges):
        set_precision(model.model, config.dtype)
    judge = judges[0] if config.reward_model else None
    ensemble = Ensemble(judges, config.ensemble, config.ensemble_coef) if config.reward_models else None
    if config.value_init == "reward_model" and weights.load_head(run.resume_from or config.model) is None:
        policy.value_from(judge)
    return policy, reference, Scorer(text, judge or ensemble, functions, config.reward_weights, config.tokens_per_micro)


@torch.no_grad()
def examine(
    policy: Policy,
    reference: Policy,
    rollouts: list[Rollout],
    scores: Tensor,
    kl_coef: float,
    config: Config,
    seed: int,
) -> tuple[Batch, dict[str, float]]:
    """Token rewards, advantages and returns of every rollout, dealt into minibatches; and what they look like."""
    finished = torch.tensor([r.finished for r in rollouts])
    scores = losses.eos_rule(scores, finished, subtract=config.missing_eos_penalty)
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    batch: Batch = []
    kls: list[Tensor] = []
    for minibatch in deal(rollouts, config.minibatches, config.tokens_per_micro, seed):
        batch.append([])
        for micro in minibatch:
            sampled = [rollouts[i] for i in micro]
            packed = pack(sampled, policy.device)
            seen, logprobs, values = behaviour(policy, packed, sampled, config.temperature, config.old_logprobs)
            ref_logprobs = reference(packed, temperature=config.temperature, entropy=False).logprobs
            score = scores[micro].to(packed.tokens.device)
            rewards = losses.token_rewards(logprobs, ref_logprobs, score, packed.cu_rows, kl_coef)
            after = torch.tensor([r.bootstrap for r in sampled], device=values.device)  # 0: nothing follows
            advantages, returns = gae(
                rewards, values, gamma=config.gamma, lam=config.lam, cu_seqlens=packed.cu_rows, bootstrap=after
            )
            batch[-1].append(Experience(packed, seen, logprobs, values, advantages, returns))
            kls.append(losses.sequence_kl(logprobs, ref_logprobs, packed.cu_rows))
    measured = objective(batch, torch.cat(kls), scores, kl_coef)
    batch = whitened(batch)
    return batch if config.importance_cap is None else corrected(batch, config.importance_cap), measured


def update(
    policy: Policy,
    optimizer: Optimizer,
    batch: Batch,
    mix: Sequence[Example] | None,
    config: Config,
    rng: random.Random,
) -> dict[str, float]:
    """Epochs of minibatches: one optimizer step each, its loss a mean over all of the minibatch's tokens."""
    sums, num_updates = Sums(), 0
    first: list[tuple[Tensor, Tensor]] = []  # log-probs of the trainer and of the sampler, before any update
    for _ in range(config.epochs):
        moved = torch.zeros((), device=policy.device)  # KL(old || new), summed over minibatches
        for minibatch in rng.sample(batch, len(batch)):
            num_tokens = sum(e.packed.num_targets for e in minibatch)
            for e in minibatch:
                stats, logprobs = learn(policy, e, num_tokens, config)
                sums.add(stats)
                moved += stats["approx_kl_k3"]
                if num_updates == 0:
                    sums.add({"first_ratio_gap": losses.ratio_gap(logprobs, e.logprobs)})
                    first.append((logprobs, e.sampled))
            if mix is not None:
                sums.add({"ptx_loss": mix_in(policy, mix, optimizer.num_steps, config)})
            sums.add(optimizer.step())
            num_updates += 1
        if config.kl_stop is not None and moved.item() / len(batch) > config.kl_stop:
            break
    gaps = Sums()
    gaps.add(mismatch.measure(*map(torch.cat, zip(*first, strict=True))))
    updated = sums.take(num_updates, prefix="policy/") | gaps.take(prefix="mismatch/")
    return updated | {"policy/num_updates": num_updates}


def learn(policy: Policy, e: Experience, num_tokens: int, config: Config) -> tuple[dict[str, Tensor], Tensor]:
    """Add the gradient of one micro-batch's share of the loss; its statistics, and the log-probs (R,) of its tokens."""
    rows = policy.hidden(e.packed)[e.packed.rows]  # (R, H): only these meet the vocabulary, and the critic
    policy_loss, stats, logprobs = linear_ppo_loss(
        rows, targets=e.packed.targets, old_logprobs=e.logprobs, advantages=e.advantages,
        clip_low=config.clip_low, clip_high=config.clip_high, entropy_coef=config.entropy_coef,
        temperature=config.temperature, normalizer=num_tokens, return_logprobs=True, **policy.vocabulary,
    )  # fmt: skip
    values = policy.values(rows)
    assert values is not None, "PPO has a critic"
    errors, clipped = losses.value_loss(values, e.values, e.returns, config.value_clip)
    value_loss = errors.sum() / num_tokens
    (policy_loss + config.value_coef * value_loss).backward()
    return stats | {"vf_loss": value_loss.detach(), "vf_clipfrac": clipped.sum() / num_tokens}, logprobs


def mix_in(policy: Policy, mix: Sequence[Example], number: int, config: Config) -> Tensor:
    """PPO-ptx (Ouyang et al. 2022, equation 2): add the gradient of ptx_coef * language-model loss on plain text."""
    blocks = [mix[i] for i in Order(len(mix), config.ptx_batch_size, config.seed).take(number)]
    packed = pack(blocks, policy.device)
    loss = -policy(packed, entropy=False).logprobs.sum() / packed.num_targets
    (config.ptx_coef * loss).backward()
    return loss.detach()
