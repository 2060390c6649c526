"""A process of its own that runs PPO iterations, by ours or by TRL's trainer: what `python -m benchmarks ppo` starts.

    python -m benchmarks.trainers {twinhead,trl} REPORT.json < work.json

Both load the same checkpoints and prompts, and take as many optimizer steps (torch itself counts them). An iteration
lasts from the end of one update to the end of the next: ours calls an evaluation function there, TRL its own method
`log`, which is wrapped. So neither loading nor the last checkpoint is in it. Its phases:

    generate   ours: from timings.jsonl. TRL: its function `batch_generation`, wrapped
    examine    reference, reward model, rewards and advantages, in TRL also old log-probs and values. Ours: score and
               examine in timings.jsonl. TRL: from the end of generate to the first pass of its policy-and-value
               module, which a hook on that module sees
    update     the rest: epochs and log

Memory is what the process holds at most beyond what it held after its imports, up to the end of the last update.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.peers import TRL_TRAINER, Missing, load
from benchmarks.timing import HighWater

POLICY, REWARD, PROMPTS = "policy", "reward", "prompts.jsonl"  # what the folder of a Work holds
PHASES = ("generate", "examine", "update")
OPTIONS: dict[str, Any] = {"learning_rate": 1e-5, "temperature": 1.0, "kl_coef": 0.05, "missing_eos_penalty": 1.0}


@dataclass(frozen=True)
class Work:
    """What a trainer is to do, `iterations` times, the first of which has no time."""

    folder: str
    device: str
    dtype: str  # of weights and activations
    batch: int  # prompts of an iteration
    prompt: int  # tokens
    response: int  # tokens at most
    micro: int  # sequences in one pass of training; ours takes as many tokens, which may be more sequences
    iterations: int
    threads: int
    epochs: int = 4
    minibatches: int = 2


@dataclass(frozen=True)
class Report:
    """How it went. One entry per iteration, without the first in `seconds` and `phases`."""

    seconds: list[float]
    phases: list[dict[str, float]]  # seconds by PHASES, of which an iteration is the sum
    tokens: list[int]  # of all responses, up to EOS
    optimizer_steps: list[int]
    losses: list[float]  # of the policy and of the values
    kl: float  # nats per sequence, policy against reference, before the first update
    entropy: float  # nats per token during the first iteration's updates
    peak_bytes: int | None


class Clock:
    """The moments at which iterations end, and the optimizer steps up to there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self.laps: list[tuple[float, int]] = []
        self.peak_bytes: int | None = None
        self._water = HighWater(device)
        self._hook = register_optimizer_step_post_hook(self._count)

    def now(self) -> float:
        """Seconds, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> None:
        """An iteration ends here."""
        self.laps.append((self.now(), self.steps))
        self.peak_bytes = self._water.growth()

    def report(self, phases: list[dict[str, float]], **rest: Any) -> Report:
        """phases: generate and examine of every iteration."""
        times, steps = zip(*self.laps, strict=True)
        seconds = [end - start for start, end in pairwise(times)]
        whole = [
            {**spent, "update": lasted - sum(spent.values())} for lasted, spent in zip(seconds, phases[1:], strict=True)
        ]
        taken = [after - before for before, after in pairwise([0, *steps])]
        return Report(seconds, whole, optimizer_steps=taken, peak_bytes=self.peak_bytes, **rest)

    def _count(self, *_: Any) -> None:
        self.steps += 1


def ours(work: Work) -> Report:
    """`ppo.train`, as anyone would call it."""
    from twinhead.engine import ppo

    folder, clock = Path(work.folder), Clock(torch.device(work.device))

    def evaluate(_: Any) -> dict[str, float]:
        clock.lap()
        return {}

    with tempfile.TemporaryDirectory() as output:
        run = ppo.train(
            ppo.Config(
                model=str(folder / POLICY), reward_model=str(folder / REWARD), prompts=str(folder / PROMPTS),
                output_dir=output, device=work.device, dtype=work.dtype, steps=work.iterations, epochs=work.epochs,
                rollouts_per_step=work.batch, minibatches=work.minibatches, max_prompt_tokens=work.prompt,
                max_new_tokens=work.response, tokens_per_micro=work.micro * (work.prompt + work.response), eval_every=1,
                **OPTIONS,
            ),
            evaluate=evaluate,
        )  # fmt: skip
        timings, metrics = list(run.timings), [line for line in run.metrics if "step" in line]
    phases = [
        {"generate": line["seconds/generate"], "examine": line["seconds/score"] + line["seconds/examine"]}
        for line in timings
    ]
    return clock.report(
        phases,
        tokens=[round(work.batch * line["rollout/length_mean"]) for line in metrics],
        losses=[line[f"policy/{name}"] for line in metrics for name in ("pg_loss", "vf_loss")],
        kl=metrics[0]["objective/kl"],
        entropy=metrics[0]["policy/entropy"],
    )


def theirs(work: Work) -> Report:
    """TRL's PPOTrainer. Raises Missing where it is not installed.

    As released, TRL 1.12 accumulates gradients over all minibatches and takes one optimizer step per epoch, unless the
    whole batch is one micro-batch. Here its accelerator is told how many micro-batches a minibatch has.
    """
    module: Any = load(TRL_TRAINER, "trl.experimental.ppo.ppo_trainer")
    clock = Clock(torch.device(work.device))
    trainer = _trainer(module, work)
    trainer.accelerator.gradient_accumulation_steps = work.batch // work.minibatches // work.micro
    phases: list[dict[str, float]] = []
    responses: list[Tensor] = []
    metrics: list[dict[str, float]] = []
    generated = 0.0

    def generate(*given: Any, **named: Any) -> Any:
        nonlocal generated
        began = clock.now()
        found = generation(*given, **named)
        generated = clock.now()
        phases.append({"generate": generated - began})
        responses.append(found[0][:, work.prompt :])
        return found

    def learn(*_: Any) -> None:
        if len(phases[-1]) == 1:
            phases[-1]["examine"] = clock.now() - generated

    def log(found: dict[str, float], *rest: Any) -> None:
        original(found, *rest)
        clock.lap()
        metrics.append(dict(found))

    original, trainer.log = trainer.log, log
    generation, module.batch_generation = module.batch_generation, generate
    trainer.accelerator.unwrap_model(trainer.model).register_forward_pre_hook(learn)
    trainer.train()
    return clock.report(
        phases,
        tokens=[lengths(some, trainer.processing_class.eos_token_id) for some in responses],
        losses=[line[f"loss/{name}_avg"] for line in metrics for name in ("policy", "value")],
        kl=metrics[0]["objective/kl"],
        entropy=work.minibatches * metrics[0]["policy/entropy_avg"],  # its mean counts minibatches twice over
    )


def _trainer(module: Any, work: Work) -> Any:
    """The trainer with four models: policy, reference, reward model, and a value model, which starts as the latter."""
    from datasets import Dataset

    folder = Path(work.folder)
    config: Any = module.PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=work.micro,
        gradient_accumulation_steps=work.batch // work.micro,
        num_mini_batches=work.minibatches, num_ppo_epochs=work.epochs, total_episodes=work.batch * work.iterations,
        response_length=work.response, local_rollout_forward_batch_size=work.batch, stop_token="eos",
        use_cpu=work.device == "cpu", bf16=False, gradient_checkpointing=False, lr_scheduler_type="constant",
        logging_steps=1, num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True, **OPTIONS,
    )  # fmt: skip
    policy, reference = (_loaded(LlamaForCausalLM, folder / POLICY, work) for _ in range(2))
    reward, value = (_loaded(LlamaForSequenceClassification, folder / REWARD, work) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder / POLICY)
    rows = [json.loads(line)["prompt"] for line in (folder / PROMPTS).read_text(encoding="utf-8").splitlines()]
    prompts = Dataset.from_dict({"input_ids": tokenizer(rows)["input_ids"]})
    return module.PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=prompts, eval_dataset=prompts.select(range(1)),
    )  # fmt: skip


def _loaded(kind: Any, folder: Path, work: Work) -> Any:
    return kind.from_pretrained(folder, dtype=getattr(torch, work.dtype))


def lengths(responses: Tensor, eos: int) -> int:
    """(B, T) -> the tokens of all rows, each up to its first `eos` with it."""
    ended = (responses == eos).cumsum(1)
    return int((ended - (responses == eos).long() == 0).sum())


TRAINERS: dict[str, Callable[[Work], Report]] = {"twinhead": ours, "trl": theirs}


def main() -> None:
    """Do the work that standard input describes; the report, or why there is none, goes into a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers")
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("report", type=Path)
    given = parser.parse_args()
    work = Work(**json.load(sys.stdin))
    torch.set_num_threads(work.threads)
    try:
        found = asdict(TRAINERS[given.trainer](work))
    except Missing as missing:
        found = {"missing": str(missing)}
    given.report.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
