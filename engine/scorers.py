"""Where rewards come from: a reward model, Python functions, or a weighted sum of several."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from twinhead.engine.batch import Rollout, TokenSequence, micro_batches, pack
from twinhead.engine.policy import RewardModel
from twinhead.engine.text import Text

# f(prompts, completions, **columns) -> one number per completion. The columns are those of the data row, and
# `finished` (did the response stop by itself) and `completion_ids`.
RewardFunction = Callable[..., Sequence[float]]


class Asked(Protocol):
    """A prompt as the data gave it (twinhead.engine.data.Prompt)."""

    @property
    def text(self) -> Any: ...

    @property
    def columns(self) -> dict[str, Any]: ...


class Scorer:
    """rollouts -> (S,) float32 scores: the weighted sum of a reward model and of reward functions."""

    def __init__(
        self,
        text: Text,
        reward_model: RewardModel | None,
        functions: Sequence[RewardFunction] = (),
        weights: Sequence[float] = (),
        tokens_per_micro: int = 16384,
    ) -> None:
        self.text, self.reward_model = text, reward_model
        self.tokens_per_micro = tokens_per_micro
        names = _distinct([*(["reward_model"] if reward_model is not None else []), *map(_name, functions)])
        self.functions = dict(zip(names[len(names) - len(functions) :], functions, strict=True))
        if not names:
            raise ValueError("expected a reward_model or at least one reward function, got neither")
        if weights and len(weights) != len(names):
            raise ValueError(f"reward_weights: expected one per source ({', '.join(names)}), got {list(weights)}")
        self.weights = list(weights) or [1.0] * len(names)

    def __call__(self, rollouts: Sequence[Rollout], asked: Sequence[Asked]) -> tuple[Tensor, dict[str, Tensor]]:
        """(S,) total scores, and the (S,) scores of every source by name. Raises ValueError as score_with() does."""
        parts: dict[str, Tensor] = {}
        if self.reward_model is not None:
            parts["reward_model"] = model_scores(self.reward_model, rollouts, self.tokens_per_micro)
        if self.functions:
            completions = [self.text.decode(r.response) for r in rollouts]
            for name, function in self.functions.items():
                parts[name] = score_with(function, rollouts, completions, asked)
        total = torch.stack([w * part for w, part in zip(self.weights, parts.values(), strict=True)]).sum(0)
        return total, parts


@torch.no_grad()
def model_scores(reward_model: RewardModel, sequences: Sequence[TokenSequence], tokens_per_micro: int) -> Tensor:
    """(S,) float32 on the CPU: the normalised score of every prompt with its response."""
    lengths = [len(s.prompt) + len(s.response) for s in sequences]
    scores = [
        reward_model(pack(micro, reward_model.device)).cpu()
        for micro in micro_batches(sequences, lengths, tokens_per_micro)
    ]
    return torch.cat(scores) if scores else torch.zeros(0)


def score_with(
    function: RewardFunction, rollouts: Sequence[Rollout], completions: list[str], asked: Sequence[Asked]
) -> Tensor:
    """(S,) float32: what one reward function says.

    Raises ValueError when it returns the wrong number of scores or something that is no number, with the row. NaN and
    infinity pass: the stage skips such a batch and counts it.
    """
    names = sorted({name for a in asked for name in a.columns})
    if taken := {"prompts", "completions", "finished", "completion_ids"}.intersection(names):
        raise ValueError(f"prompts: the column {min(taken)!r} is an argument of reward functions itself; rename it")
    columns: dict[str, Any] = {name: [a.columns.get(name) for a in asked] for name in names}
    columns["finished"] = [r.finished for r in rollouts]
    columns["completion_ids"] = [r.response for r in rollouts]
    prompts = [a.text for a in asked]
    scores = function(prompts=prompts, completions=completions, **columns)
    name = _name(function)
    try:
        num_scores: int | str = len(scores)
    except TypeError:  # a bare number, a generator, a tensor without dimensions
        num_scores = type(scores).__name__
    if num_scores != len(rollouts):
        raise ValueError(f"reward function {name}: expected {len(rollouts)} scores, got {num_scores}")
    return torch.tensor([_number(name, i, score) for i, score in enumerate(scores)], dtype=torch.float32)


def load_function(spec: str) -> RewardFunction:
    """The function that `path/to/file.py:name` spells. Raises ValueError where there is none."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"reward_functions: expected file.py:function with an existing file, got {spec!r}")
    module_spec = importlib.util.spec_from_file_location(f"reward_functions_{Path(path).stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"reward_functions: {path} cannot be imported ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward_functions: expected a function {name!r} in {path}, found none")
    return function


def load_reward_model(
    path: str, text: Text, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> RewardModel:
    """A frozen reward model that reads the policy's token ids. Raises ValueError when its tokenizer is another one."""
    check_tokenizer(path, text)
    return RewardModel.from_pretrained(path, dtype, device).requires_grad_(False).eval()


def check_tokenizer(reward_model: str, text: Text) -> None:
    """The reward model reads the policy's token ids: raise ValueError when its own tokenizer spells differently."""
    theirs = Text.from_pretrained(reward_model).tokenizer.get_vocab()
    ours = text.tokenizer.get_vocab()
    if theirs != ours:
        raise ValueError(
            f"reward_model: expected the policy's tokenizer ({len(ours)} tokens), "
            f"got another one ({len(theirs)} tokens) in {reward_model!r}"
        )


def _number(name: str, row: int, score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward function {name}: expected a number for row {row}, got {score!r}") from error


def nonfinite_rows(scores: Tensor) -> list[int]:
    """Rows whose score is NaN or infinite."""
    return [i for i, score in enumerate(scores.tolist()) if not math.isfinite(score)]


def _distinct(names: Sequence[str]) -> list[str]:
    """[f, g, f] -> [f, g, f_2]: every source has a name, and a metric, of its own."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
