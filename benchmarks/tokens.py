"""Who computes what has one number per token: advantages, and the PPO loss from log-probabilities and values."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.contender import (
    COMPILED,
    EAGER,
    Call,
    Maker,
    Outputs,
    absent,
    ours_on,
    with_compile,
)
from benchmarks.peers import TRL, TRL_PPO, VERL
from twinhead import kernels

GAMMA, LAM, CLIP, VALUE_COEF = 1.0, 0.95, 0.2, 0.5


def gae() -> dict[str, Maker]:
    """rewards, values (R,), cu_seqlens (S+1,) -> advantages and returns (R,)."""

    def loop(problem: Problem) -> Call:
        rewards, values, mask = _padded(problem)
        whiten = problem.settings["whiten"]
        return Call(lambda: _advantages(rewards, values, mask, whiten), lambda outputs: _unpadded(outputs, mask))

    def verl(problem: Problem) -> Call:
        function = VERL.function("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")
        rewards, values, mask = _padded(problem)
        mask = mask.to(values.dtype)
        return _whitened(problem, lambda: function(rewards, values, mask, GAMMA, LAM))

    def trl(problem: Problem) -> Call:
        method = TRL_PPO.function("trl.trainer.ppo_trainer", "PPOTrainer").compute_advantages
        rewards, values, mask = _padded(problem)
        mask = mask.to(values.dtype)
        return _whitened(problem, lambda: method(_TRAINER, values, rewards, mask)[1:])

    return {
        EAGER: loop,
        COMPILED: absent("unrolls the loop into thousands of operations"),
        **ours_on(_packed_advantages, settings=True),
        VERL.label: verl,
        TRL_PPO.label: trl,
        TRL.label: absent("has had no GAE since it dropped PPO"),
    }


def ppo_loss() -> dict[str, Maker]:
    """Six vectors (R,) -> a loss."""

    def definition(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor
    ) -> Outputs:
        near = old_values + (values - old_values).clamp(-CLIP, CLIP)
        squared = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        return ((clipped(logprobs, old_logprobs, advantages) + VALUE_COEF * 0.5 * squared).mean(),)

    def verl(problem: Problem) -> Call:
        policy_loss = VERL.function("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
        value_loss = VERL.function("verl.trainer.ppo.core_algos", "compute_value_loss")
        batch = {name: tensor.detach().unflatten(0, (8, -1)) for name, tensor in problem.tensors.items()}
        mask = torch.ones_like(batch["advantages"])

        def run() -> Outputs:
            logprobs, values = (problem[name].unflatten(0, (8, -1)) for name in ("logprobs", "values"))
            old_logprobs, advantages = batch["old_logprobs"], batch["advantages"]
            policy, _ = policy_loss(old_logprobs, logprobs, advantages, mask, config=_CONFIG)
            value, _ = value_loss(values, batch["returns"], batch["old_values"], mask, CLIP)
            return (policy + VALUE_COEF * value,)

        return Call(run)

    return {
        **with_compile(definition),
        **ours_on(lambda *tensors, backend: (kernels.ppo_loss(*tensors, backend=backend)[0],)),
        VERL.label: verl,
        TRL.label: absent("dropped PPO"),
    }


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The clipped policy loss of every token."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))


def _packed_advantages(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, whiten: bool, backend: str) -> Outputs:
    return kernels.gae(rewards, values, gamma=GAMMA, lam=LAM, cu_seqlens=cu_seqlens, whiten=whiten, backend=backend)


def _advantages(rewards: Tensor, values: Tensor, mask: Tensor, whiten: bool) -> Outputs:
    """The loop that every padded trainer has."""
    last = following = torch.zeros_like(rewards[:, 0])
    reversed_: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        following = values[:, t]
        reversed_.append(last)
    advantages = torch.stack(reversed_[::-1], 1)
    returns = advantages + values
    if whiten:
        count = mask.sum()
        mean = (advantages * mask).sum() / count
        variance = ((advantages - mean) ** 2 * mask).sum() / count
        advantages = (advantages - mean) * (variance + 1e-8).rsqrt()
    return advantages, returns


def _whitened(problem: Problem, run: Callable[[], tuple[Tensor, Tensor]]) -> Call:
    """A function that always whitens, by N - 1: without `whiten`, only its returns can be compared."""
    _, _, mask = _padded(problem)

    def read(outputs: Outputs) -> Outputs:
        advantages, returns = _unpadded(outputs, mask)
        if advantages is None or not problem.settings["whiten"]:
            return None, returns
        return advantages * (len(advantages) / (len(advantages) - 1)) ** 0.5, returns

    return Call(run, read)


def _padded(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values, mask [B, T], padded with 0 on the right."""
    lengths = problem["cu_seqlens"].diff()
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    padded = [torch.zeros_like(mask, dtype=x.dtype) for x in (problem["rewards"], problem["values"])]
    for target, name in zip(padded, ("rewards", "values"), strict=True):
        target[mask] = problem[name]
    return padded[0], padded[1], mask


def _unpadded(outputs: Outputs, mask: Tensor) -> Outputs:
    return tuple(None if x is None else x[mask] for x in outputs)


# What TRL's compute_advantages reads of its trainer, and verl's compute_policy_loss_vanilla of its configuration: its
# dual clip cannot be switched off, only moved out of reach.
_TRAINER = SimpleNamespace(config=SimpleNamespace(gamma=GAMMA, lam=LAM, whiten_rewards=False))
_CONFIG = SimpleNamespace(
    clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP, global_batch_info={},
    get=lambda name, default: 1e9 if name == "clip_ratio_c" else default,
)  # fmt: skip
