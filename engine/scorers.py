"""Where rewards come from: a reward model or an ensemble, Python functions, or a weighted sum of several."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from twinhead.engine import diversity, ranks
from twinhead.engine.batch import Rollout, TokenSequence, micro_batches, pack
from twinhead.engine.policy import RewardModel
from twinhead.engine.text import Text

# f(prompts, completions, **columns) -> one number per completion. The columns are those of the data row, and
# `finished` (did the response stop by itself) and `completion_ids`.
RewardFunction = Callable[..., Sequence[float]]
# The same, but one list per completion: for each of its tokens what the step that ends there is worth, or None.
ProcessFunction = Callable[..., Sequence[Sequence[float | None]]]


class Asked(Protocol):
    """A prompt as the data gave it (twinhead.engine.data.Prompt)."""

    @property
    def text(self) -> Any: ...

    @property
    def columns(self) -> dict[str, Any]: ...


class Ensemble(nn.Module):
    """Reward models that were trained apart, and agree on what is good more than on what only looks good.

    Coste et al. 2023; Eisenstein et al. 2023. Rankings fix neither where scores lie nor their scale, so every member's
    are taken less its mean over its spread. Raises ValueError for no members, or one whose answers all scored the same.
    """

    def __init__(self, members: Sequence[RewardModel], combine: str = "mean", coef: float = 1.0) -> None:
        super().__init__()
        if not members:
            raise ValueError("reward_models: expected at least one reward model, got none")
        for i, member in enumerate(members, 1):
            if not 0 < member.spread < math.inf:
                raise ValueError(f"reward_models: expected a spread above 0, got {member.spread} of member {i}")
        self.members, self.combine, self.coef = [*members], combine, coef
        self.modules_held = nn.ModuleList(members)  # a list alone would hide them from those who move modules

    def opinions(self, sequences: Sequence[TokenSequence], tokens_per_micro: int) -> Tensor:
        """(M, S) float32 on the CPU: every member's normalised scores, in units of its spread."""
        return torch.stack([model_scores(m, sequences, tokens_per_micro) / m.spread for m in self.members])

    def combined(self, opinions: Tensor) -> Tensor:
        """(M, S) -> (S,): their mean; their minimum ("min"); or their mean less coef times their deviation."""
        if self.combine == "min":
            return opinions.amin(0)
        mean = opinions.mean(0)
        return mean if self.combine == "mean" else mean - self.coef * opinions.std(0, correction=0)


class RunningScale:
    """Mean and standard deviation of all scores so far, in units of which rewards stay alike as the policy moves.

    Welford 1962, a batch at a time (Chan et al. 1979): no sum of large squares that would cancel.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # the last: sum of squared deviations from the mean

    @property
    def std(self) -> float:
        """The population's; 0 before the first batch."""
        return math.sqrt(self.squares / max(self.count, 1))

    def normalised(self, scores: Tensor) -> Tensor:
        """(S,) finite scores less the mean, over the deviation, of this batch and all before it; 0 if none varied."""
        batch = scores.double()
        shift, num = batch.mean().item() - self.mean, len(scores)
        self.squares += (batch - batch.mean()).square().sum().item() + shift**2 * self.count * num / (self.count + num)
        self.count += num
        self.mean += shift * num / self.count
        return ((batch - self.mean) / max(self.std, 1e-8)).to(scores.dtype)


class Scorer:
    """rollouts -> (S,) float32 scores: the weighted sum of a reward model (or an ensemble) and of reward functions."""

    def __init__(
        self,
        text: Text,
        reward_model: RewardModel | Ensemble | None,
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

    @property
    def reward_models(self) -> list[RewardModel]:
        """All that are asked: the members of an ensemble, a single one, or none."""
        if isinstance(self.reward_model, Ensemble):
            return self.reward_model.members
        return [] if self.reward_model is None else [self.reward_model]

    def __call__(self, rollouts: Sequence[Rollout], asked: Sequence[Asked]) -> tuple[Tensor, dict[str, Tensor]]:
        """(S,) total scores, and the (S,) scores of every source by name. Raises ValueError as score_with() does.

        Beside the sources stands `reward_model/std`, how much the members of an ensemble disagree.
        """
        parts: dict[str, Tensor] = {}
        beside: dict[str, Tensor] = {}
        if isinstance(self.reward_model, Ensemble):
            opinions = shared_scores(self.reward_model.opinions, rollouts, self.tokens_per_micro)
            parts["reward_model"] = self.reward_model.combined(opinions)
            beside["reward_model/std"] = opinions.std(0, correction=0)
        elif self.reward_model is not None:
            ask = partial(model_scores, self.reward_model)
            parts["reward_model"] = shared_scores(ask, rollouts, self.tokens_per_micro)
        if self.functions:
            completions = [self.text.decode(r.response) for r in rollouts]
            for name, function in self.functions.items():
                parts[name] = ranks.first(partial(score_with, function, rollouts, completions, asked))
        total = torch.stack([w * part for w, part in zip(self.weights, parts.values(), strict=True)]).sum(0)
        return total, parts | beside


@torch.no_grad()
def model_scores(reward_model: RewardModel, sequences: Sequence[TokenSequence], tokens_per_micro: int) -> Tensor:
    """(S,) float32 on the CPU: the normalised score of every prompt with its response."""
    lengths = [len(s.prompt) + len(s.response) for s in sequences]
    scores = [
        reward_model(pack(micro, reward_model.device)).cpu()
        for micro in micro_batches(sequences, lengths, tokens_per_micro)
    ]
    return torch.cat(scores) if scores else torch.zeros(0)


def shared_scores(
    ask: Callable[[Sequence[TokenSequence], int], Tensor], sequences: Sequence[TokenSequence], tokens_per_micro: int
) -> Tensor:
    """(..., S): what a reward model says, of which every rank asks for a part; all call it together."""
    parts = ranks.spread(lambda rows: ask(sequences[rows.start : rows.stop], tokens_per_micro), len(sequences))
    return torch.cat(parts, -1)


def score_with(
    function: RewardFunction, rollouts: Sequence[Rollout], completions: list[str], asked: Sequence[Asked]
) -> Tensor:
    """(S,) float32: what one reward function says.

    Raises ValueError when it returns the wrong number of scores or something that is no number, with the row. NaN and
    infinity pass: the stage skips such a batch and counts it.
    """
    scores = _ask(function, rollouts, completions, asked)
    return torch.tensor([_number(function, f"row {i}", score) for i, score in enumerate(scores)], dtype=torch.float32)


def score_steps(function: ProcessFunction, text: Text, rollouts: Sequence[Rollout], asked: Sequence[Asked]) -> Tensor:
    """(R,) float32 over all response tokens: what the step that ends at each is worth, NaN where none ends.

    The first rank asks, as it does for all functions. Raises ValueError for anything but one list per response that has
    a finite number or None for each of its tokens.
    """
    return ranks.first(partial(_steps, function, text, rollouts, asked))


def _steps(function: ProcessFunction, text: Text, rollouts: Sequence[Rollout], asked: Sequence[Asked]) -> Tensor:
    rows = _ask(function, rollouts, [text.decode(r.response) for r in rollouts], asked)
    rewards: list[float] = []
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        num = len(rollout.response)
        if not isinstance(row, list | tuple) or len(row) != num:
            got = f"{len(row)}" if isinstance(row, list | tuple) else type(row).__name__
            expected = f"a list of {num} step rewards for row {i}, one per token"
            raise ValueError(f"reward function {_name(function)}: expected {expected}, got {got}")
        found = [_number(function, f"token {j} of row {i}", 0.0 if x is None else x) for j, x in enumerate(row)]
        if not all(map(math.isfinite, found)):
            raise ValueError(f"reward function {_name(function)}: expected finite step rewards for row {i}, got {row}")
        rewards += [math.nan if x is None else number for x, number in zip(row, found, strict=True)]
    return torch.tensor(rewards, dtype=torch.float32)


def _ask(
    function: RewardFunction | ProcessFunction,
    rollouts: Sequence[Rollout],
    completions: list[str],
    asked: Sequence[Asked],
) -> Sequence[Any]:
    """What a function answers, one entry per response."""
    names = sorted({name for a in asked for name in a.columns})
    if taken := {"prompts", "completions", "finished", "completion_ids"}.intersection(names):
        raise ValueError(f"prompts: the column {min(taken)!r} is an argument of reward functions itself; rename it")
    columns: dict[str, Any] = {name: [a.columns.get(name) for a in asked] for name in names}
    columns["finished"] = [r.finished for r in rollouts]
    columns["completion_ids"] = [r.response for r in rollouts]
    prompts = [a.text for a in asked]
    scores: Sequence[Any] = function(prompts=prompts, completions=completions, **columns)
    try:
        num_scores: int | str = len(scores)
    except TypeError:  # a bare number, a generator, a tensor without dimensions
        num_scores = type(scores).__name__
    if num_scores != len(rollouts):
        raise ValueError(f"reward function {_name(function)}: expected {len(rollouts)} scores, got {num_scores}")
    return scores


def load_function(spec: str, option: str = "reward_functions") -> Callable[..., Any]:
    """The function that `path/to/file.py:name` spells, or the name of one in diversity.SHIPPED.

    Raises ValueError, naming the option, where there is none.
    """
    shipped = diversity.SHIPPED if option == "reward_functions" else {}
    if spec in shipped:
        return shipped[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        expected = " or ".join(["file.py:function with an existing file", *shipped])
        raise ValueError(f"{option}: expected {expected}, got {spec!r}")
    module_spec = importlib.util.spec_from_file_location(f"reward_functions_{Path(path).stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"{option}: {path} cannot be imported ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{option}: expected a function {name!r} in {path}, found none")
    return function


def load_reward_model(
    path: str, text: Text, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> RewardModel:
    """A frozen reward model that reads the policy's token ids. Raises ValueError when its tokenizer is another one."""
    check_tokenizer(path, text)
    return RewardModel.from_pretrained(path, dtype, device).requires_grad_(False).eval()


def check_tokenizer(path: str, text: Text, option: str = "reward_model") -> None:
    """A model beside the policy reads its token ids: raise ValueError when its own tokenizer spells differently."""
    theirs = Text.from_pretrained(path).tokenizer.get_vocab()
    ours = text.tokenizer.get_vocab()
    if theirs != ours:
        raise ValueError(
            f"{option}: expected the policy's tokenizer ({len(ours)} tokens), "
            f"got another one ({len(theirs)} tokens) in {path!r}"
        )


def _number(function: RewardFunction | ProcessFunction, place: str, score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        name = _name(function)
        raise ValueError(f"reward function {name}: expected a number for {place}, got {score!r}") from error


def nonfinite_rows(scores: Tensor) -> list[int]:
    """Rows whose score is NaN or infinite."""
    return [i for i, score in enumerate(scores.tolist()) if not math.isfinite(score)]


def _distinct(names: Sequence[str]) -> list[str]:
    """[f, g, f] -> [f, g, f_2]: every source has a name, and a metric, of its own."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def _name(function: RewardFunction | ProcessFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
