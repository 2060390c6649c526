"""The options of the stages that learn from data: what they are, their defaults, and what they must be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twinhead.engine.config import RunConfig, Source, check

RANKING_LOSSES = ("pairwise", "listwise")
REDUCTIONS = ("token_mean", "seq_mean", "sum")
NORMALISATIONS = ("mean", "mean_std")
LOSSES = ("sigmoid", "robust", "hinge", "ipo", "ipo_mean", "kto")


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
    reduction: str = "token_mean"
    """The loss of an optimizer step: token_mean over its targets, seq_mean over its sequences of their own means, or
    the sum."""
    template: str = ""
    """How conversations are written, here and wherever the checkpoint goes: plain, alpaca, short, roles, tags, dialogue
    or a .jinja file; empty: the tokenizer's own chat template, or plain if it has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            steps=(self.steps >= 0, "at least 0 (0: as many as the epochs have)"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            max_length=(self.max_length >= 2, "at least 2"),
            reduction=(self.reduction in REDUCTIONS, f"one of {', '.join(REDUCTIONS)}"),
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
    """Column labeler_id, where there is one, says who compared."""
    eval_data: Source = ""
    """Held-out comparisons: accuracy, also of every labeler, is measured on them at the end of every epoch."""
    demonstrations: Source = ""
    """Rows of prompt and completion whose mean score becomes 0; without them, the best answers of `data`."""
    output_dir: str = "runs/reward"
    epochs: int = 1
    """More than one overfits (Ouyang et al. 2022, section 3.5)."""
    batch_size: int = 16
    """Prompts of one optimizer step, each with all of its responses."""
    max_length: int = 1024
    min_score_ratio: float = 1.0
    """Pairs whose column score_ratio (SHP: the votes of the one over those of the other) is below are dropped."""
    loss: str = "pairwise"
    """pairwise (all pairs of a ranking, Bradley-Terry) or listwise (the ranking as a whole, Plackett-Luce)."""
    centring_coef: float = 0.0
    """Weight of the mean square of a pair's sum of scores, which keeps scores near 0."""
    normalisation: str = "mean"
    """mean: the demonstrations score 0 on average; mean_std: and their scores deviate by 1 (Ziegler et al. 2019)."""
    flatten_pairs: bool = False
    """An ablation: the pairs of a ranking are shuffled apart, and batch_size counts pairs. It overfits (Ouyang et al.
    2022, section 3.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            max_length=(self.max_length >= 2, "at least 2"),
            loss=(self.loss in RANKING_LOSSES, f"one of {', '.join(RANKING_LOSSES)}"),
            centring_coef=(0 <= self.centring_coef < math.inf, "at least 0"),
            normalisation=(self.normalisation in NORMALISATIONS, f"one of {', '.join(NORMALISATIONS)}"),
        )


@dataclass(frozen=True, kw_only=True)
class DPO(RunConfig):
    """Direct preference optimisation on comparisons, or on single answers labelled good or bad (kto)."""

    model: str
    """Checkpoint folder of the SFT model: the policy to start from."""
    data: Source
    """Columns prompt, chosen and rejected, or prompt, completions and ranks; for kto prompt, completion and label."""
    eval_data: Source = ""
    """Held-out rows: loss, accuracy and rewards are measured on them at the end of every epoch."""
    reference: str = ""
    """Checkpoint folder of the frozen policy that the log-ratios are taken to; empty: `model`."""
    precompute_reference: bool = False
    """Ask the reference once, before training, and then let it go; what it said is kept in output_dir."""
    output_dir: str = "runs/dpo"
    learning_rate: float = 1e-6
    epochs: int = 1
    batch_size: int = 32
    """Prompts of one optimizer step, each with all of its answers; for kto answers."""
    max_length: int = 1024
    loss: str = "sigmoid"
    """sigmoid (DPO), robust, hinge (SLiC), ipo (sums over tokens), ipo_mean (means over tokens) or kto (unpaired)."""
    beta: float = 0.1
    """How dear it is to leave the reference: the reward is beta * (log pi - log pi_ref). For ipo its tau."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be swapped, for sigmoid (conservative DPO) and robust."""
    desirable_weight: float = 1.0
    """Weight of a good answer (kto), best such that the good ones of `data` weigh 1 to 4/3 of what the bad ones do."""
    undesirable_weight: float = 1.0
    """Weight of a bad answer (kto)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothed, weighted = self.loss in ("sigmoid", "robust"), self.loss == "kto"
        check(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            max_length=(self.max_length >= 2, "at least 2"),
            loss=(self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            beta=(0 < self.beta < math.inf, "above 0"),
            label_smoothing=(0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5"),
            desirable_weight=(0 <= self.desirable_weight < math.inf, "at least 0"),
            undesirable_weight=(0 <= self.undesirable_weight < math.inf, "at least 0"),
        )
        check(
            self,
            label_smoothing=(smoothed or self.label_smoothing == 0, f"0 with loss={self.loss}, which has none"),
            desirable_weight=(weighted or self.desirable_weight == 1, f"1 with loss={self.loss}, which has none"),
            undesirable_weight=(weighted or self.undesirable_weight == 1, f"1 with loss={self.loss}, which has none"),
        )
