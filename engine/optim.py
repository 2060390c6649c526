"""One optimizer step: schedule, clipping, AdamW, and a guard that skips and counts non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from twinhead.engine import adam, ranks
from twinhead.engine.config import RunConfig


class Optimizer:
    """AdamW over every trainable parameter; matrices decay, vectors do not.

    scales: factors of the learning rate for parameters by the beginning of their name. apart: the beginning of those
    whose gradient is clipped by itself, and reported as `critic_grad_norm`. `followers` are called after every update.
    With config.shard_optimizer a rank remembers the moments of its share of the parameters alone, updates these and
    sends them to the others: the first stage of ZeRO (Rajbhandari et al. 2020, section 5.1).
    """

    def __init__(
        self,
        module: nn.Module,
        config: RunConfig,
        total_steps: int,
        scales: Mapping[str, float] | None = None,
        apart: str | None = None,
    ) -> None:
        self.config, self.total_steps = config, total_steps
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("expected at least one trainable parameter, got none")
        self.own, names = self.parameters, [*self.parameters]
        if config.shard_optimizer:
            share = ranks.share([p.numel() for p in self.parameters.values()])
            self.own = {names[i]: self.parameters[names[i]] for i in share}
        self.teams: dict[str, list[nn.Parameter]] = {"grad_norm": []}  # clipped together, by the name of their norm
        for name, p in self.parameters.items():
            team = "critic_grad_norm" if apart is not None and name.startswith(apart) else "grad_norm"
            self.teams.setdefault(team, []).append(p)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.own.items():
            scale = next((s for prefix, s in (scales or {}).items() if name.startswith(prefix)), 1.0)
            groups.setdefault((scale, config.weight_decay if p.ndim >= 2 else 0.0), []).append(p)
        described = [{"params": ps, "weight_decay": decay, "scale": scale} for (scale, decay), ps in groups.items()]
        self.adam = adam.adamw(described or [{"params": [], "scale": 1.0}], config)  # more ranks than parameters
        self.followers: list[Callable[[], None]] = []
        self.num_steps = 0
        self.skipped = 0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.config, self.num_steps, self.total_steps)

    def step(self) -> dict[str, float]:
        """Sum over ranks, clip, update, clear. A non-finite gradient updates nothing and is counted (its norm as 0)."""
        ranks.sum_gradients([*self.parameters.values()])
        limit = self.config.max_grad_norm or math.inf
        norms = {name: nn.utils.clip_grad_norm_(team, limit).item() for name, team in self.teams.items()}
        rate = self.learning_rate
        finite = all(map(math.isfinite, norms.values()))
        if finite:
            for group in self.adam.param_groups:
                scaled = rate * group["scale"]
                group["lr"] = torch.tensor(scaled) if isinstance(group["lr"], Tensor) else scaled  # torchao has tensors
            self.adam.step()
            if self.config.shard_optimizer:
                ranks.send_parameters([*self.parameters.values()])
            increment_version(self.parameters.values())  # fused AdamW does not: Policy.version lives on it
            for follow in self.followers:
                follow()
        else:
            self.skipped += 1
        self.num_steps += 1
        for p in self.parameters.values():  # also those that another rank updates
            p.grad = None
        norms = norms if finite else dict.fromkeys(norms, 0.0)
        return norms | {"learning_rate": rate, "skipped_updates": float(not finite)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the next step depends on: tensors by parameter name, and counters. The first rank's holds all
        that the ranks share; all call it together."""
        tensors = {
            f"{name}.{key}": value
            for name, p in self.own.items()
            for key, value in adam.plain(self.adam.state.get(p, {})).items()
        }
        if self.config.shard_optimizer:
            on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
            tensors = {name: tensor for part in ranks.collected(on_host) for name, tensor in part.items()}
        still = len(self.parameters) - len(
            {key.rpartition(".")[0] for key in tensors}
        )  # a warm-up has not touched them
        counters = {"num_steps": self.num_steps, "skipped": self.skipped}
        return tensors, counters | ({"still": still} if still and tensors else {})

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Put back what state() gave. Raises ValueError when it belongs to other parameters."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, part = key.rsplit(".", 1)
            states.setdefault(name, {})[part] = tensor
        missing = [name for name in self.parameters if name not in states]
        if len(missing) > counters.get("still", 0) and counters["num_steps"] > counters["skipped"]:
            raise ValueError(f"optimizer state: expected every parameter of this model, but {missing[0]!r} is missing")
        for name, parts in states.items():
            if name not in self.parameters:
                raise ValueError(f"optimizer state: expected one of this model's parameters, got {name!r}")
            if (parameter := self.own.get(name)) is not None:
                self.adam.state[parameter] = adam.whole(name, parameter, parts, self.config)
        self.num_steps, self.skipped = counters["num_steps"], counters["skipped"]


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, linear to 0, or cosine to a tenth of the peak; `step` counts from 0."""
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))
    return config.learning_rate
