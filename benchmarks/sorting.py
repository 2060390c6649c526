"""Task C, sorting: digits are to be put in order, and a rule sees whether they are, so GRPO needs no reward model.

Demonstrations are wrong 60% of the time (two neighbours swapped, and often the last digit left out), so a policy that
imitates them is wrong as often when it is sampled. With enough of them its greedy answer is right all the same, and
GRPO only sharpens it; after few, greedy answers gain too.
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twinhead.engine import data, grpo, ppo, sft
from twinhead.engine.checkpoint import write_file
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

PAD, BOS, EOS, SEP = "<pad>", "<bos>", "<eos>", "<sep>"  # token ids 0 to 3
VOCABULARY = [PAD, BOS, EOS, SEP, *map(str, range(10))]
NOISE = 0.6
CONTEST_PROMPTS = 512


@dataclass(frozen=True)
class Length:
    """How many digits, how long the policy imitates, and how long it practises."""

    digits: int
    sft_steps: int
    grpo_steps: int
    ppo_steps: int = 0  # of 256 answers too; 0: not measured


LENGTHS = {
    "sharpened": Length(digits=5, sft_steps=1500, grpo_steps=50, ppo_steps=50),
    "under-trained": Length(digits=8, sft_steps=70, grpo_steps=200),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit."""
    words = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS, extra_special_tokens=[SEP],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def prompts(n: int, digits: int, seed: int) -> list[dict[str, str]]:
    """n rows {"prompt"}: so many uniformly drawn digits."""
    rng = random.Random(seed)
    return [{"prompt": " ".join(str(rng.randrange(10)) for _ in range(digits)) + f" {SEP}"} for _ in range(n)]


def demonstrations(n: int, digits: int, seed: int) -> list[dict[str, str]]:
    """n rows {"prompt", "completion"}, of which NOISE have two neighbours swapped, and half of those no last digit."""
    rng = random.Random(seed)
    return [{**row, "completion": " ".join(imitated(row["prompt"], rng))} for row in prompts(n, digits, seed)]


def imitated(prompt: str, rng: random.Random) -> list[str]:
    """What a demonstrator answers. A swap of two equal digits changes nothing."""
    answer = in_order(prompt)
    if rng.random() < NOISE:
        i = rng.randrange(len(answer) - 1)
        answer[i], answer[i + 1] = answer[i + 1], answer[i]
        return answer if rng.random() < 0.5 else answer[:-1]
    return answer


def in_order(prompt: str) -> list[str]:
    """The right answer."""
    return sorted(prompt.removesuffix(SEP).split())


def right(
    prompts: Sequence[str], completions: Sequence[str], *, finished: Sequence[bool], **columns: object
) -> list[float]:
    """The rule as a reward function: 1 for the digits in order and nothing after them, else 0."""
    answers = zip(prompts, completions, finished, strict=True)
    return [float(ended and completion.split() == in_order(prompt)) for prompt, completion, ended in answers]


class Sorting:
    """The task for one length and seed, in its own folder; a stage that is finished is not run again."""

    def __init__(self, folder: Path, length: Length, seed: int) -> None:
        self.folder, self.length, self.seed = folder / f"sort{length.digits}_seed{seed}", length, seed
        self.text = Text(tokenizer())
        asked = prompts(CONTEST_PROMPTS, length.digits, seed + 7)
        self.asked = data.prompts(asked, self.text, length.digits + 2)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def sft(self) -> Run:
        """The policy that practises: two layers of width 64."""
        shape = LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=170, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=self.text.bos_id, eos_token_id=self.text.eos_id,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            LlamaForCausalLM(shape).save_pretrained(self.path("empty"))
        self.text.save_pretrained(self.path("empty"))
        shown = demonstrations(128 * min(self.length.sft_steps, 300), self.length.digits, self.seed)
        return sft.train(
            sft.Config(
                model=self.path("empty"), data=shown,
                output_dir=self.path("sft"), seed=self.seed, steps=self.length.sft_steps, batch_size=128, max_length=32,
                learning_rate=3e-3, schedule="cosine", warmup_ratio=0.05, adam_beta2=0.95, weight_decay=0.01,
                save_every=300,
            )
        )  # fmt: skip

    def grpo(self, name: str = "grpo", loss: str = "grpo", eval_every: int = 10) -> Run:
        """Practice against the rule."""
        steps = self.length.grpo_steps
        return grpo.train(
            grpo.Config(
                model=self.path("sft"), prompts=prompts(32 * steps, self.length.digits, self.seed + 1),
                output_dir=self.path(name), seed=self.seed, steps=steps, loss=loss, beta=0.02,
                prompts_per_step=32, group_size=8, learning_rate=3e-4, adam_eps=1e-5,
                max_prompt_tokens=self.length.digits + 2, max_new_tokens=self.length.digits + 2,
                eval_every=eval_every, save_every=10,
            ),
            reward_funcs=[right], evaluate=self.accuracy,
        )  # fmt: skip

    def ppo(self, name: str = "ppo", eval_every: int = 10) -> Run:
        """The same with a critic, from as many answers in as many optimizer steps."""
        return ppo.train(
            ppo.Config(
                model=self.path("sft"), prompts=prompts(32 * self.length.ppo_steps, self.length.digits, self.seed + 1),
                output_dir=self.path(name), seed=self.seed, steps=self.length.ppo_steps, rollouts_per_step=256,
                epochs=1, minibatches=1, learning_rate=3e-4, kl_coef=0.02, missing_eos_penalty=0.0,
                max_prompt_tokens=self.length.digits + 2, max_new_tokens=self.length.digits + 2,
                eval_every=eval_every, save_every=10,
            ),
            reward_funcs=[right], evaluate=self.accuracy,
        )  # fmt: skip

    def accuracy(self, policy: Policy) -> dict[str, float]:
        """The share of held-out prompts that are answered right: by a sample, and by the greedy answer."""
        return {"sampled": self._accuracy(policy, 1.0), "greedy": self._accuracy(policy, 0.0)}

    def _accuracy(self, policy: Policy, temperature: float) -> float:
        sampling = Sampling(max_new_tokens=self.length.digits + 2, temperature=temperature, seed=self.seed)
        rollouts = generate(policy, [p.tokens for p in self.asked], sampling)
        completions = [self.text.decode(r.response) for r in rollouts]
        scores = right([str(p.text) for p in self.asked], completions, finished=[r.finished for r in rollouts])
        return sum(scores) / len(scores)


def main(seeds: Sequence[int], runs: Path, results: Path) -> None:
    """Run what has not run yet for every seed; write JSON into `results` and print the table."""
    found: dict[str, dict[int, Any]] = {name: {} for name in LENGTHS}
    for name, length in LENGTHS.items():
        for seed in seeds:
            task = Sorting(runs, length, seed)
            imitates = task.accuracy(Policy.from_pretrained(task.sft().dir, critic="none"))
            found[name][seed] = {"digits": length.digits, "sft": imitates, "curve": curve(task.grpo())}
            if length.ppo_steps:
                found[name][seed]["ppo"] = curve(task.ppo())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    results.mkdir(parents=True, exist_ok=True)
    said = {"task": "C, sorting", "versions": versions, **found}
    write_file(results / "quality_sorting.json", json.dumps(said, indent=1) + "\n")
    Console().print(table(found))


def curve(run: Run) -> list[dict[str, float]]:
    """What was measured along a run."""
    names = {"sampled": "eval/sampled", "greedy": "eval/greedy", "kl": "objective/kl", "flat": "rollout/flat_groups"}
    return [
        {"step": line["step"], **{name: line[key] for name, key in names.items() if key in line}}
        for line in run.metrics
        if "eval/sampled" in line
    ]


def table(found: dict[str, dict[int, Any]]) -> Table:
    """One row per run: accuracy before and after practice."""
    columns = ("start", "digits", "seed", "steps", "sampled", "greedy", "KL")
    rows = Table(*columns, title="Task C: share of right answers, nats per answer")
    for name, seeds in found.items():
        for seed, run in seeds.items():
            first, last = run["sft"], run["curve"][-1]
            both = (f"{first[key]:.3f} to {last[key]:.3f}" for key in ("sampled", "greedy"))
            rows.add_row(name, str(run["digits"]), str(seed), str(last["step"]), *both, f"{last['kl']:.2f}")
    return rows
