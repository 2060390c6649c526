"""The options of every stage: what they are, their defaults, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass

from twinhead.engine.config import RunConfig, Source, check

CRITICS = ("shared", "detached", "none")


@dataclass(frozen=True, kw_only=True)
class SFT(RunConfig):
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
class Pretrain(SFT):
    """Language modelling on plain text (column text). A `model` folder without weights starts from random ones."""

    output_dir: str = "runs/pretrain"


@dataclass(frozen=True, kw_only=True)
class Reward(RunConfig):
    """Reward modelling on comparisons: columns prompt, completions and ranks, or prompt, chosen and rejected."""

    model: str
    """Checkpoint folder of the SFT model whose trunk the reward model starts from."""
    data: Source
    eval_data: Source = ""
    """Held-out comparisons: accuracy is measured on them at the end of every epoch."""
    demonstrations: Source = ""
    """Rows of prompt and completion whose mean score becomes 0; without them, the best answers of `data`."""
    output_dir: str = "runs/reward"
    epochs: int = 1
    """More than one overfits (Ouyang et al. 2022, section 3.5)."""
    batch_size: int = 16
    """Prompts of one optimizer step, each with all of its responses."""
    max_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            max_length=(self.max_length >= 2, "at least 2"),
        )


@dataclass(frozen=True, kw_only=True)
class PPO(RunConfig):
    """PPO on prompts, against a reward model or, in Python, reward functions."""

    model: str  # checkpoint folder of the SFT model: the policy to start from, and the frozen reference
    prompts: Source  # rows with a prompt; other columns go to the reward functions
    steps: int  # iterations of generate, score, examine, update
    reward_model: str = ""  # checkpoint folder of a reward model
    reward_functions: tuple[str, ...] = ()  # file.py:function, each f(prompts, completions, **columns) -> list[float]
    reward_weights: tuple[float, ...] = ()  # of the reward model (if any) and then each function; empty: all 1
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
    old_logprobs: str = "rollout"  # rollout: as the sampler saw them; recompute: by one more forward of the trainer
    importance_cap: float | None = None  # truncates weights p_trainer / p_sampler of the advantages; needs recompute
    mismatch_alarm: float = 0.02  # nats per token between sampler and trainer, above which every step says so
    critic: str = "shared"  # shared; detached: the value loss does not reach the trunk
    value_init: str = "zero"  # zero; reward_model: the reward head, where no value head lies beside the model
    value_lr_scale: float = 30.0  # learning rate of the value head, which starts from nothing, over learning_rate
    kl_coef: float = 0.05  # reward per nat of log pi - log pi_ref, at every token
    kl_target_nats: float | None = None  # per sequence; adapts kl_coef towards it (None: kl_coef is fixed)
    kl_horizon: int = 10_000  # sequences over which kl_coef adapts
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response that never stops
    score_clip: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
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
    eval_every: int = 0  # steps between calls of the evaluation function; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
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
            critic=(self.critic in CRITICS[:2], "shared or detached"),
            value_init=(self.value_init in ("zero", "reward_model"), "zero or reward_model"),
            kl_coef=(self.kl_coef >= 0, "at least 0"),
            kl_target_nats=(not self.kl_target_nats or self.kl_coef > 0, "none with a kl_coef of 0, which never grows"),
            kl_horizon=(self.rollouts_per_step < 5 * self.kl_horizon, "more than a fifth of rollouts_per_step"),
            score_clip=(self.score_clip is None or self.score_clip > 0, "above 0"),
            lam=(0 <= self.lam <= 1, "0 to 1"),
            gamma=(0 <= self.gamma <= 1, "0 to 1"),
            ptx_batch_size=(self.ptx_batch_size >= 1, "at least 1"),
        )
