"""The options of the stages that learn from their own rollouts: PPO and GRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twinhead.engine.config import RunConfig, Source, check

ENSEMBLES = ("mean", "min", "mean_std")
CLIPS = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "rloo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}
CRITICS = ("shared", "detached", "branch", "separate", "none")
VALUE_INITS = ("zero", "sft", "reward_model")
KL_KINDS = ("k1", "k2", "k3", "full")
ADVANTAGES = ("gae", "bandit")


@dataclass(frozen=True, kw_only=True)
class PPO(RunConfig):
    """PPO on prompts, against a reward model or, in Python, reward functions."""

    model: str  # checkpoint folder of the SFT model: the policy to start from
    reference: str = ""  # checkpoint folder of the frozen policy that it is held to; empty: model
    prompts: Source  # rows with a prompt; other columns go to the reward functions
    steps: int  # iterations of generate, score, examine, update
    reward_model: str = ""  # checkpoint folder of a reward model
    reward_models: tuple[str, ...] = ()  # instead of it an ensemble of several, each score over its model's spread
    ensemble: str = "mean"  # mean, min or mean_std (less ensemble_coef standard deviations) over the reward_models
    ensemble_coef: float = 1.0
    # file.py:function, each f(prompts, completions, **columns) -> list[float]; or group_diversity, batch_diversity
    reward_functions: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()  # of the reward model (if any) and then each function; empty: all 1
    process_function: str = ""  # file.py:function beside them: a list per completion, each token's own reward or None
    output_dir: str = "runs/ppo"
    learning_rate: float = 1e-6
    adam_eps: float = 1e-5
    rollouts_per_step: int = 256
    epochs: int = 4  # passes over one step's rollouts
    minibatches: int = 4  # optimizer steps of one pass
    max_prompt_tokens: int = 512
    max_new_tokens: int = 128
    temperature: float = 1.0
    num_slots: int = 256  # sequences that decode side by side
    cache_bytes: int | None = None  # of keys and values; rows that do not fit wait, or are read again (None: no limit)
    cuda_graphs: bool = False  # on a GPU: record the decode step and replay it; graphs and cache stay between steps
    old_logprobs: str = "rollout"  # rollout: as the sampler saw them; recompute: by one more forward of the trainer
    importance_cap: float | None = None  # truncates weights p_trainer / p_sampler of the advantages; needs recompute
    mismatch_alarm: float = 0.02  # nats per token between sampler and trainer, above which every step says so
    critic: str = "shared"  # shared; detached: the value loss does not reach the trunk; branch: its own copies of the
    # top layers, on the trunk's state as a constant; separate: a second network
    branch_layers: int = 2  # that a branch has of its own
    critic_model: str = ""  # checkpoint folder whose trunk a separate critic starts from; empty: model
    critic_learning_rate: float | None = None  # of a branch or separate critic (None: learning_rate)
    critic_warmup: int = 0  # steps in which the critic learns alone: the policy stays bit for bit what it was
    value_init: str = "zero"  # of the value head, where no critic lies beside the model; sft: drawn, as that of a new
    # reward model; reward_model: the reward head, with the trunk of the reward model if the critic is separate
    share: str = "none"  # all: the reward model too is an adapter on the policy's base; both trained with lora_rank
    value_lr_scale: float = 30.0  # learning rate of the value head, which starts from nothing, over learning_rate
    kl_coef: float = 0.05  # reward per nat of log pi - log pi_ref, at every token
    kl_kind: str = "k1"  # what counts as a nat: k1, k2 or k3 of the sampled token, or full, exactly over the vocabulary
    kl_in: str = "reward"  # reward, or loss (not k1)
    kl_target_nats: float | None = None  # per sequence; adapts kl_coef towards it (None: kl_coef is fixed)
    kl_horizon: int = 10_000  # sequences over which kl_coef adapts
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response that never stops
    normalise_scores: bool = False  # less the mean of all scores so far, over their deviation, before EOS and clip
    score_clip: float | None = None
    advantage: str = "gae"  # gae; bandit: all tokens have the response's rewards less the value of its prompt
    gamma: float = 1.0
    lam: float = 0.95
    bootstrap_truncated: bool = False  # GAE goes on after what was cut at max_new_tokens: at the critic's value
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    kl_stop: float | None = None  # ends a step's epochs once KL(old || new), nats per token, is above
    ptx_data: Source = ""  # plain text: PPO-ptx, its language-model loss joins every optimizer step
    ptx_coef: float = 1.0  # weight of that loss, a mean over tokens
    ptx_batch_size: int = 32  # blocks of text in one optimizer step
    ptx_max_length: int = 512
    ema_decay: float | None = None  # of an average of the policy's weights, saved in ema/ (0.992 in InstructGPT)
    stop_kl_nats: float | None = None  # per sequence; ends training once the policy is farther from the reference
    eval_every: int = 0  # steps between evaluations: the caller's, and that of eval_prompts; 0: never
    eval_prompts: Source = ""  # held-out prompts, whose answers' mean score is eval/score
    best_by: str = ""  # name of an evaluation's number, as eval/score: the best checkpoint stays in best/
    patience: int = 0  # evaluations without a new best after which training ends; 0: all steps are made
    offload: bool = False  # reference and reward model live on the host and come to the GPU only to be asked

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rewards()
        self._check_critic()
        whole = self.gamma == 1 and not self.bootstrap_truncated
        check(
            self,
            steps=(self.steps >= 1, "at least 1"),
            minibatches=(1 <= self.minibatches <= self.rollouts_per_step, "1 to rollouts_per_step"),
            epochs=(self.epochs >= 1, "at least 1"),
            temperature=(self.temperature > 0, "above 0 (a greedy policy explores nothing)"),
            old_logprobs=(self.old_logprobs in ("rollout", "recompute"), "rollout or recompute"),
            importance_cap=(
                self.importance_cap is None or (self.importance_cap > 0 and self.old_logprobs == "recompute"),
                "above 0, with old_logprobs=recompute",
            ),
            mismatch_alarm=(self.mismatch_alarm > 0, "above 0"),
            kl_kind=(self.kl_kind in KL_KINDS, f"one of {', '.join(KL_KINDS)}"),
            kl_in=(
                self.kl_in == "reward" or (self.kl_in == "loss" and self.kl_kind != "k1"),
                "reward, or loss with another kl_kind than k1, whose expected gradient there is zero",
            ),
            kl_coef=(self.kl_coef >= 0, "at least 0"),
            kl_target_nats=(not self.kl_target_nats or self.kl_coef > 0, "none with a kl_coef of 0, which never grows"),
            kl_horizon=(self.rollouts_per_step < 5 * self.kl_horizon, "more than a fifth of rollouts_per_step"),
            score_clip=(self.score_clip is None or self.score_clip > 0, "above 0"),
            lam=(0 <= self.lam <= 1, "0 to 1"),
            gamma=(0 <= self.gamma <= 1, "0 to 1"),
            advantage=(
                self.advantage == "gae" or (self.advantage == "bandit" and whole),
                f"one of {', '.join(ADVANTAGES)}, bandit with gamma=1 and without bootstrap_truncated",
            ),
            ema_decay=(self.ema_decay is None or 0 <= self.ema_decay < 1, "at least 0 and below 1"),
            stop_kl_nats=(self.stop_kl_nats is None or self.stop_kl_nats > 0, "above 0"),
            eval_prompts=(not self.eval_prompts or self.eval_every > 0, "none without eval_every"),
            best_by=(not self.best_by or self.eval_every > 0, "none without eval_every"),
            patience=(self.patience == 0 or (self.patience > 0 and bool(self.best_by)), "at least 0, with best_by"),
            ptx_batch_size=(self.ptx_batch_size >= 1, "at least 1"),
            offload=(
                not self.offload or self.device_type == "cuda",
                "False on the device cpu, which is the host itself",
            ),
        )

    def _check_rewards(self) -> None:
        check(
            self,
            reward_models=(not (self.reward_models and self.reward_model), "none beside a reward_model"),
            ensemble=(
                self.ensemble in ENSEMBLES and (bool(self.reward_models) or self.ensemble == "mean"),
                f"one of {', '.join(ENSEMBLES)}, with reward_models",
            ),
            ensemble_coef=(
                0 <= self.ensemble_coef < math.inf and (self.ensemble == "mean_std" or self.ensemble_coef == 1),
                "at least 0, with ensemble=mean_std",
            ),
            share=(self.share in ("none", "all"), "none or all"),
        )
        if self.share == "all":
            judged = bool(self.reward_model or self.reward_models)
            check(
                self,
                lora_rank=(self.lora_rank > 0, "above 0 with share=all, whose base is frozen"),
                reference=(not self.reference, "none with share=all, where it is the base"),
                reward_model=(judged, "a reward model trained with lora_rank, with share=all"),
                offload=(not self.offload, "False with share=all: there is nothing to send away"),
            )

    def _check_critic(self) -> None:
        own = self.critic in ("branch", "separate")
        check(
            self,
            critic=(self.critic in CRITICS[:-1], f"one of {', '.join(CRITICS[:-1])}"),
            branch_layers=(self.branch_layers >= 1, "at least 1"),
            critic_learning_rate=(
                self.critic_learning_rate is None or (own and self.critic_learning_rate >= 0 < self.learning_rate),
                "at least 0, with critic=branch or separate and a learning_rate above 0",
            ),
            critic_warmup=(self.critic_warmup >= 0, "at least 0"),
            value_init=(self.value_init in VALUE_INITS, f"one of {', '.join(VALUE_INITS)}"),
            critic_model=(
                not self.critic_model or (self.critic == "separate" and self.value_init != "reward_model"),
                "none but with critic=separate, and then none with value_init=reward_model, whose trunk it is",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class GRPO(RunConfig):
    """Group-relative policy optimisation on prompts: several answers to each, compared with each other; no critic."""

    model: str
    """Checkpoint folder of the policy to start from, and with beta the frozen reference."""
    prompts: Source
    """Rows with a prompt; other columns go to the reward functions."""
    steps: int
    """Iterations of generate, score, compare, examine, update."""
    reward_model: str = ""
    """Checkpoint folder of a reward model."""
    reward_functions: tuple[str, ...] = ()
    """file.py:function, each f(prompts, completions, **columns) -> list[float]; or group_diversity, batch_diversity."""
    reward_weights: tuple[float, ...] = ()
    """Of the reward model (if any) and then each function; empty: all 1."""
    process_function: str = ""
    """file.py:function beside them, which gives one list per completion: what the step that ends at each of its tokens
    is worth, or None. Steps are compared as responses are; a token gets the sum of what ends at it or later."""
    output_dir: str = "runs/grpo"
    learning_rate: float = 1e-6
    prompts_per_step: int = 32
    group_size: int = 8
    """Answers to each prompt."""
    epochs: int = 1
    """Passes over one step's answers."""
    minibatches: int = 1
    """Optimizer steps of one pass."""
    max_prompt_tokens: int = 512
    max_new_tokens: int = 128
    temperature: float = 1.0
    num_slots: int = 256
    """Sequences that decode side by side."""
    cache_bytes: int | None = None
    """Of keys and values; rows that do not fit wait, or are read again (None: no limit)."""
    cuda_graphs: bool = False
    """On a GPU: record the decode step and replay it; graphs and cache stay between steps."""
    old_logprobs: str = "rollout"
    """rollout: as the sampler saw them; recompute: by one more forward of the trainer."""
    importance_cap: float | None = None
    """Truncates weights p_trainer / p_sampler of the advantages; needs recompute."""
    mismatch_alarm: float = 0.02
    """Nats per token between sampler and trainer, above which every step says so."""
    loss: str = "grpo"
    """grpo, dr_grpo, dapo, rloo or gspo: how scores become advantages, and what the loss is a mean over."""
    clip_low: float | None = None
    """None: the loss's own, 0.2, and 0.0003 for gspo, whose ratio is that of a whole answer."""
    clip_high: float | None = None
    """None: the loss's own, 0.2, 0.28 for dapo (clip-higher) and 0.0004 for gspo."""
    beta: float = 0.0
    """Of the KL divergence from the reference (k3) in the loss; 0: no reference is loaded."""
    resample: int = 0
    """How often groups whose answers are all worth the same are replaced by those of other prompts (DAPO's dynamic
    sampling); above 0 those that are left in the end are dropped."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of an answer that never stops."""
    overlong_buffer: int = 0
    """Tokens before max_new_tokens over which overlong_penalty sets in; 0: none (DAPO's soft over-long punishment)."""
    overlong_penalty: float = 1.0
    """Subtracted from the score of an answer of max_new_tokens."""
    eval_every: int = 0
    """Steps between calls of the evaluation function; 0: never."""
    offload: bool = False
    """Reference and reward model live on the host and come to the GPU only to be asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            steps=(self.steps >= 1, "at least 1"),
            prompts_per_step=(self.prompts_per_step >= 1, "at least 1"),
            group_size=(self.group_size >= 2, "at least 2 (an answer is compared with the others)"),
            minibatches=(1 <= self.minibatches <= self.prompts_per_step * self.group_size, "1 to the step's answers"),
            epochs=(self.epochs >= 1, "at least 1"),
            temperature=(self.temperature > 0, "above 0 (greedy answers are all the same)"),
            old_logprobs=(self.old_logprobs in ("rollout", "recompute"), "rollout or recompute"),
            importance_cap=(
                self.importance_cap is None or (self.importance_cap > 0 and self.old_logprobs == "recompute"),
                "above 0, with old_logprobs=recompute",
            ),
            mismatch_alarm=(self.mismatch_alarm > 0, "above 0"),
            loss=(self.loss in CLIPS, f"one of {', '.join(CLIPS)}"),
            clip_low=(self.clip_low is None or 0 <= self.clip_low <= 1, "0 to 1"),
            clip_high=(self.clip_high is None or 0 <= self.clip_high < math.inf, "at least 0"),
            beta=(0 <= self.beta < math.inf, "at least 0 (0: no reference)"),
            resample=(self.resample >= 0, "at least 0 (0: groups stay as they are)"),
            overlong_buffer=(0 <= self.overlong_buffer <= self.max_new_tokens, "0 to max_new_tokens"),
            eval_every=(self.eval_every >= 0, "at least 0 (0: never)"),
            offload=(
                not self.offload or self.device_type == "cuda",
                "False on the device cpu, which is the host itself",
            ),
        )
        frozen = bool(self.reward_model) or (self.beta > 0 and not self.lora_rank)
        check(self, offload=(frozen or not self.offload, "False without a reward model or a reference to send away"))

    @property
    def clips(self) -> tuple[float, float]:
        """How far the ratio may fall below 1, and rise above it."""
        low, high = CLIPS[self.loss]
        return (low if self.clip_low is None else self.clip_low), (high if self.clip_high is None else self.clip_high)
