"""The meter against passes that have data: what lives during an update of each stage is what was planned."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from tests.models import ids, model
from twinhead.engine import dpo, grpo, ppo
from twinhead.engine.batch import Example
from twinhead.engine.generate import Sampling, generate
from twinhead.engine.meter import Meter
from twinhead.engine.optim import Optimizer
from twinhead.engine.planning import Plan, plan
from twinhead.engine.policy import Policy
from twinhead.engine.reference import Reference, example_fingerprint
from twinhead.engine.trunk import checkpoint_gradients

PROMPT, RESPONSE, ROWS = 2, 52, 30


class Whole(Meter):
    """Looks into the operators of torch.library too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if ours := OPDEFS.get(func._schema.name):
            with self:
                return ours._init_fn(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def living(planned: Plan) -> int:
    found = {part.name: part.bytes for part in planned.parts}
    return sum(found[name] for name in ("gradients", "activations of a micro-batch", "logits of the fused head"))


def of_ppo(policy: Policy, asked: Policy, shared: dict[str, Any]) -> tuple[ppo.Config, Callable[[], object]]:
    lengths = {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE, "minibatches": 1, "epochs": 1}
    chosen = ppo.Config(**shared, **lengths, prompts="p", steps=1, rollouts_per_step=ROWS)
    rollouts = generate(policy, ids([PROMPT] * ROWS), Sampling(max_new_tokens=RESPONSE, stop=()))
    batch, _ = ppo.examine(policy, asked, rollouts, torch.linspace(-1, 1, ROWS), 0.1, chosen, 0)
    return chosen, partial(ppo.update, policy, Optimizer(policy, chosen, 2), batch, None, chosen, random.Random(0))


def of_grpo(policy: Policy, asked: Policy, shared: dict[str, Any]) -> tuple[grpo.Config, Callable[[], object]]:
    lengths = {"max_prompt_tokens": PROMPT, "max_new_tokens": RESPONSE}
    groups = {"group_size": 5, "prompts_per_step": ROWS // 5}
    chosen = grpo.Config(**shared, **lengths, **groups, prompts="p", steps=1, beta=0.1)
    rollouts = generate(policy, ids([PROMPT] * ROWS), Sampling(max_new_tokens=RESPONSE, stop=()))
    compared = grpo.compare(rollouts, torch.linspace(-1, 1, ROWS), None, chosen)
    batch, _ = grpo.examine(policy, asked, compared, chosen, 0)
    return chosen, partial(grpo.update, policy, Optimizer(policy, chosen, 2), batch, chosen, random.Random(0))


def of_dpo(
    policy: Policy, asked: Policy, shared: dict[str, Any], beforehand: bool = False
) -> tuple[dpo.Config, Callable[[], object]]:
    examples = [Example(tokens[:1], tokens[1:]) for tokens in ids([PROMPT + RESPONSE] * ROWS)]
    pairs = [dpo.Judged([*answers], [0, 1]) for answers in zip(examples[::2], examples[1::2], strict=True)]
    sizes = {"batch_size": len(pairs), "max_length": PROMPT + RESPONSE}
    chosen = dpo.Config(**shared, **sizes, data="d", precompute_reference=beforehand)
    reference = Reference(None, {example_fingerprint(e): -1.0 for e in examples}) if beforehand else Reference(asked)
    return chosen, partial(dpo.update, policy, reference, Optimizer(policy, chosen, 2), pairs, chosen)


STAGES = {"ppo": of_ppo, "grpo": of_grpo, "dpo": of_dpo, "dpo, asked before": partial(of_dpo, beforehand=True)}
LARGE = {"hidden_size": 256, "intermediate_size": 2048}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tokens_per_micro", [10_000, 540])
@pytest.mark.parametrize(
    ("stage", "architecture", "size", "reference"),
    [
        *(("ppo", architecture, {}, {}) for architecture in ("llama", "gpt2", "gemma2")),
        *(("grpo", "llama", size, {}) for size in ({}, {"vocab_size": 3000, "hidden_size": 512})),
        *(("dpo", "llama", {}, size) for size in ({}, LARGE)),
        ("dpo, asked before", "llama", {}, LARGE),
    ],
)
def test_an_update_holds_what_was_planned(
    stage: str,
    architecture: str,
    size: dict[str, int],
    reference: dict[str, int],
    tokens_per_micro: int,
    checkpointed: bool,
    tmp_path: Path,
) -> None:
    """Tensors counted as they come and go."""
    drawn, frozen = (model(architecture, **{"vocab_size": 1000} | size | other) for other in ({}, reference))
    drawn.save_pretrained(tmp_path / "policy")
    frozen.save_pretrained(tmp_path / "reference")
    shared = {"model": str(tmp_path / "policy"), "tokens_per_micro": tokens_per_micro}
    shared |= {"gradient_checkpointing": checkpointed} | (
        {"reference": str(tmp_path / "reference")} if reference else {}
    )
    policy, asked = Policy(drawn, "shared" if stage == "ppo" else "none"), Policy(frozen, "none").requires_grad_(False)
    chosen, learn = STAGES[stage](policy, asked, shared)
    if checkpointed:
        checkpoint_gradients(policy.model)
    learn()
    with Whole(policy, asked) as meter:
        learn()
    assert meter.peak == pytest.approx(living(plan(chosen)), rel=0.08)
