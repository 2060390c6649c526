"""Does it learn? Task A: a synthetic language whose gold reward is known. Task C: a rule that can be checked.

healthy   PPO against a reward model of the policy's size, for every seed: win rate, gold gain, KL
weak      PPO against a small reward model from few noisy rankings, without a KL penalty: the proxy rises all
          the way and gold has an interior maximum (Gao et al. 2022); with the penalty it does not fall
sorting   task C: GRPO against a rule (sorting.py)
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import reviews, sorting
from twinhead.engine import data, labeler, pictures, ppo, reward, sft
from twinhead.engine.checkpoint import write_file
from twinhead.engine.evaluate import Contest
from twinhead.engine.metrics import JsonLines
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text

CONTEST_PROMPTS = 512
MEASURED = ("kl", "gold", "win_rate", "win_rate_low", "eos_rate", "distinct")


@dataclass(frozen=True)
class Labels:
    """What a reward model learns from."""

    prompts: int
    noise: float
    epochs: int


HEALTHY = Labels(prompts=6000, noise=0.5, epochs=1)
WEAK = Labels(prompts=300, noise=1.0, epochs=6)


class Reviews:
    """Task A for one seed, in its own folder; a stage that is finished is not run again."""

    def __init__(self, folder: Path, seed: int, num_demonstrations: int = 400 * 128) -> None:
        self.folder, self.seed = folder / f"seed{seed}", seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = Text(reviews.tokenizer())
        self.sampling = Sampling(max_new_tokens=reviews.COMPLETION_TOKENS, seed=seed)
        reviews.write(self.folder / "demonstrations.jsonl", reviews.demonstrations(num_demonstrations, seed))
        reviews.write(self.folder / "prompts.jsonl", reviews.prompts(4096, seed + 1))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def empty(self, name: str, width: int, layers: int, heads: int, draw: int = 0) -> str:
        """A checkpoint with random weights; another `draw` gives other ones."""
        shape = LlamaConfig(
            vocab_size=len(reviews.VOCABULARY), hidden_size=width, intermediate_size=8 * width // 3,
            num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=64, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=self.text.bos_id, eos_token_id=self.text.eos_id,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1000 * draw)
            LlamaForCausalLM(shape).save_pretrained(self.path(name))
        self.text.save_pretrained(self.path(name))
        return self.path(name)

    def sft(self) -> Run:
        """The policy that all of them start from."""
        return sft.train(
            sft.Config(
                model=self.empty("empty", width=64, layers=2, heads=4), data=self.path("demonstrations.jsonl"),
                output_dir=self.path("sft"), seed=self.seed, batch_size=128, max_length=32, learning_rate=3e-3,
                schedule="cosine", warmup_ratio=0.05, adam_beta2=0.95, weight_decay=0.01, save_every=100,
            )
        )  # fmt: skip

    def reward_model(
        self, name: str, labels: Labels, model: str, rankings: str = "", draw: int = 0, **changes: Any
    ) -> Run:
        """Rankings of four answers of the SFT model (those of the reward model `rankings`), and one that learns them.

        Another `draw` reads the rankings in another order; changes are options of its training.
        """
        rankings = rankings or name
        for part, num in (("", labels.prompts), ("_heldout", 256)):
            target = self.folder / f"{rankings}{part}.jsonl"
            if not target.exists():
                write_file(target, "".join(json.dumps(row) + "\n" for row in self._ranked(num, labels.noise, part)))
        given: dict[str, Any] = {"learning_rate": 1e-3} | changes
        return reward.train(
            reward.Config(
                model=model, data=self.path(f"{rankings}.jsonl"), eval_data=self.path(f"{rankings}_heldout.jsonl"),
                demonstrations=self.path("demonstrations.jsonl"), output_dir=self.path(name),
                seed=self.seed + 1000 * draw, epochs=labels.epochs, batch_size=16, max_length=32, schedule="cosine",
                save_every=100, **given,
            )
        )  # fmt: skip

    def _ranked(self, num: int, noise: float, part: str) -> list[dict[str, Any]]:
        asked = data.prompts(reviews.prompts(num, self.seed + len(part)), self.text, reviews.PROMPT_TOKENS)
        sampling = Sampling(max_new_tokens=reviews.COMPLETION_TOKENS, seed=self.seed + 100 + len(part))
        policy = Policy.from_pretrained(self.path("sft"), critic="none")
        return labeler.compare(policy, self.text, asked, reviews.judge, sampling, num_responses=4, noise=noise)

    def ppo(
        self,
        name: str,
        reward_model: str,
        *,
        steps: int,
        kl_coef: float,
        learning_rate: float,
        eval_every: int,
        **changes: Any,
    ) -> Run:
        """PPO against one of the reward models, with changed options."""
        sft_model = Policy.from_pretrained(self.path("sft"), critic="none")
        asked = data.prompts(reviews.prompts(CONTEST_PROMPTS, self.seed + 7), self.text, reviews.PROMPT_TOKENS)
        proxy = RewardModel.from_pretrained(self.path(reward_model))
        contest = Contest(sft_model, self.text, asked, reviews.judge, self.sampling, proxy)
        return ppo.train(
            ppo.Config(
                model=self.path("sft"), reward_model=self.path(reward_model), prompts=self.path("prompts.jsonl"),
                output_dir=self.path(name), seed=self.seed, steps=steps, learning_rate=learning_rate, kl_coef=kl_coef,
                max_prompt_tokens=reviews.PROMPT_TOKENS, max_new_tokens=reviews.COMPLETION_TOKENS,
                eval_every=eval_every, save_every=10, **changes,
            ),
            evaluate=contest,
        )  # fmt: skip


def main(seeds: Sequence[int], runs: Path, results: Path) -> None:
    """Run what has not run yet for every seed; write JSON and picture into `results` and print the table."""
    healthy: dict[int, Any] = {}
    weak: dict[int, Any] = {}
    for seed in seeds:
        task = Reviews(runs, seed)
        task.sft()
        task.reward_model("reward", HEALTHY, task.path("sft"))
        run = task.ppo("ppo", "reward", steps=20, kl_coef=0.05, learning_rate=3e-4, eval_every=5)
        healthy[seed] = {"reward_accuracy": accuracy(task, "reward"), "curve": curve(run)}
        task.reward_model("weak", WEAK, task.empty("empty_weak", width=32, layers=1, heads=2))
        free = task.ppo("ppo_weak_0", "weak", steps=70, kl_coef=0.0, learning_rate=5e-5, eval_every=2)
        held = task.ppo("ppo_weak_05", "weak", steps=40, kl_coef=0.05, learning_rate=3e-4, eval_every=5)
        weak[seed] = {"reward_accuracy": accuracy(task, "weak"), "curve": curve(free), "kl_0.05": curve(held)}
    found = {
        "task": "A, reviews",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "healthy": healthy,
        "weak": weak,
    }
    results.mkdir(parents=True, exist_ok=True)
    write_file(results / "quality.json", json.dumps(found, indent=1) + "\n")
    for seed in seeds:
        figure = pictures.over_optimisation(weak[seed]["curve"], f"Weak reward model, no KL penalty, seed {seed}")
        figure.savefig(results / f"quality_over_optimisation_{seed}.png", dpi=110)
    Console().print(table(healthy, weak))
    sorting.main(seeds, runs, results)


def accuracy(task: Reviews, name: str) -> float:
    """Held-out pairs that the reward model orders as the labeler did."""
    return list(JsonLines(task.folder / name / "metrics.jsonl"))[-1]["eval/micro"]


def curve(run: Run) -> list[dict[str, float]]:
    """What was measured along a PPO run, with the first minibatch's ratio gap at each point."""
    return [
        {
            "step": line["step"],
            "proxy": line["eval/reward"],
            **{name: line[f"eval/{name}"] for name in MEASURED},
            "explained_variance": line["value/explained_variance"],
            "max_ratio_gap": line["policy/first_ratio_gap"],
        }
        for line in run.metrics
        if "eval/gold" in line
    ]


def fall(points: Sequence[dict[str, float]]) -> tuple[dict[str, float], float, float]:
    """The point of highest gold, by how much gold falls after it, and by how much the proxy still rises."""
    best = max(points, key=lambda p: p["gold"])
    return best, best["gold"] - points[-1]["gold"], points[-1]["proxy"] - best["proxy"]


def table(healthy: dict[int, Any], weak: dict[int, Any]) -> Table:
    """One row per run, and two for the runs that over-optimise: where gold is highest, and where they end."""
    columns = ("reward model", "seed", "step", "win", "gold", "proxy", "KL", "EOS")
    rows = Table(*columns, title="Task A: win rate against SFT, scores, nats per answer")
    for seed, found in healthy.items():
        _row(rows, "healthy", seed, found["curve"][-1])
    for seed, found in weak.items():
        best, _, _ = fall(found["curve"])
        _row(rows, "weak, kl 0: best gold", seed, best)
        _row(rows, "weak, kl 0: end", seed, found["curve"][-1])
        _row(rows, "weak, kl 0.05: end", seed, found["kl_0.05"][-1])
    return rows


def _row(rows: Table, name: str, seed: int, point: dict[str, float]) -> None:
    numbers = (f"{point[key]:.2f}" for key in ("win_rate", "gold", "proxy", "kl", "eos_rate"))
    rows.add_row(name, str(seed), str(point["step"]), *numbers)
