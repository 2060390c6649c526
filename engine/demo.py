"""`twinhead demo`: the whole pipeline on real text, from an empty model to PPO with and without the pretraining mix.

The text is the running interpreter's own: signatures and docstrings of its standard library. A program plays the
labeler (docstrings.Judge), so every stage can be measured against the truth that the reward model only approximates.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import LlamaConfig

from twinhead.engine import data, docstrings, labeler, ppo, report, reward, sft
from twinhead.engine.batch import Example
from twinhead.engine.checkpoint import write_file
from twinhead.engine.data import Prompt
from twinhead.engine.evaluate import Contest, perplexity
from twinhead.engine.metrics import JsonLines
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.rows import rows
from twinhead.engine.run import Run
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn to write docstrings from preferences, in minutes on two cores. Interrupt it: the same command goes on."""

    output_dir: str = "runs/demo"
    seed: int = 0
    quick: bool = False  # every stage shortened: shows that all of it works, not what it learns


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long each stage is."""

    pretrain_steps: int = 500
    sft_steps: int = 140  # where the held-out loss is lowest
    rankings: int = 3000
    ppo_steps: int = 25
    eval_every: int = 5
    shown: tuple[int, ...] = (10, 25)  # PPO iterations that the table shows
    rollouts: int = 256
    eval_prompts: int = 400


QUICK = Size(
    pretrain_steps=60,
    sft_steps=40,
    rankings=96,
    ppo_steps=4,
    eval_every=2,
    shown=(2, 4),
    rollouts=48,
    eval_prompts=64,
)
RESPONSES = 4  # to every prompt that is ranked
NOISE = 0.3  # of the labeler, in points of the judge
HELDOUT_RANKINGS = 192
SAMPLES = 8  # held-out prompts whose answers the report shows


def run(config: Config, console: Console) -> Path:
    """Run what has not run yet, print the table of stages, and return the path of the report."""
    demo = Demo(config)
    demo.pretrain()
    demo.sft()
    demo.rank()
    demo.reward()
    demo.ppo("ppo")
    demo.ppo("ppo_ptx", ptx_data=demo.source("corpus"))
    results = demo.results()
    console.print(report.table(results))
    return report.write_demo(demo.folder)


class Demo:
    """The stages of the demo. Each leaves its own folder, and one that is finished is not run again."""

    def __init__(self, config: Config) -> None:
        self.config, self.size = config, QUICK if config.quick else Size()
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        docstrings.write(self.folder / "data")
        self.text = Text.from_pretrained(self.folder / "data" / "tokenizer")
        self.sampling = Sampling(max_new_tokens=docstrings.COMPLETION_TOKENS, seed=config.seed)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def source(self, name: str) -> str:
        return str(self.folder / "data" / f"{name}.jsonl")

    def pretrain(self) -> Run:
        """A language model of docstrings, from random weights."""
        empty = LlamaConfig(
            vocab_size=len(self.text.tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
            pad_token_id=self.text.tokenizer.pad_token_id, bos_token_id=self.text.bos_id, eos_token_id=self.text.eos_id,
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        empty.save_pretrained(self.path("empty"))
        self.text.save_pretrained(self.path("empty"))
        return sft.pretrain(
            sft.PretrainConfig(
                model=self.path("empty"), data=self.source("corpus"), eval_data=self.source("corpus_heldout"),
                output_dir=self.path("pretrain"), steps=self.size.pretrain_steps, max_length=48, learning_rate=3e-3,
                **self._training,
            )
        )  # fmt: skip

    def sft(self) -> Run:
        """Signature -> docstring, on what people wrote."""
        return sft.train(
            sft.Config(
                model=self.path("pretrain"), data=self.source("demonstrations"), eval_data=self.source("heldout"),
                output_dir=self.path("sft"), steps=self.size.sft_steps, max_length=64, learning_rate=1e-3,
                **self._training,
            )
        )  # fmt: skip

    @property
    def _training(self) -> dict[str, Any]:
        shape = {"schedule": "cosine", "warmup_ratio": 0.05, "adam_beta2": 0.95, "weight_decay": 0.01}
        return {"seed": self.config.seed, "batch_size": 64, "save_every": 100, **shape}

    def rank(self) -> None:
        """Answers of the SFT model to training prompts, and to held-out ones, ranked by the noisy judge."""
        for name, source, num in (
            ("rankings", "prompts", self.size.rankings),
            ("rankings_heldout", "prompts_heldout", HELDOUT_RANKINGS),
        ):
            target = self.folder / f"{name}.jsonl"
            if target.exists():
                continue
            rng = random.Random(f"{name} {self.config.seed}")
            asked = rng.choices(self._prompts(source), k=num)
            sampling = Sampling(max_new_tokens=docstrings.COMPLETION_TOKENS, seed=rng.randrange(2**31))
            policy = Policy.from_pretrained(self.path("sft"), critic="none")
            rows = labeler.compare(policy, self.text, asked, self.judge, sampling, num_responses=RESPONSES, noise=NOISE)
            write_file(target, "".join(json.dumps(row) + "\n" for row in rows))

    def reward(self) -> Run:
        """What the labeler likes, as a scalar head on the SFT trunk."""
        return reward.train(
            reward.Config(
                model=self.path("sft"), data=self.path("rankings.jsonl"), eval_data=self.path("rankings_heldout.jsonl"),
                demonstrations=self.source("demonstrations"), output_dir=self.path("reward"), seed=self.config.seed,
                batch_size=16, max_length=64, learning_rate=5e-4, schedule="cosine", save_every=50,
            )
        )  # fmt: skip

    def ppo(self, name: str, ptx_data: str = "") -> Run:
        """PPO against the reward model; with ptx_data, its text joins every optimizer step."""
        return ppo.train(
            ppo.Config(
                model=self.path("sft"), reward_model=self.path("reward"), prompts=self.source("prompts"),
                output_dir=self.path(name), seed=self.config.seed, steps=self.size.ppo_steps,
                rollouts_per_step=self.size.rollouts, epochs=2, minibatches=4, learning_rate=3e-4, value_lr_scale=100,
                max_prompt_tokens=docstrings.PROMPT_TOKENS, max_new_tokens=docstrings.COMPLETION_TOKENS,
                ptx_data=ptx_data, ptx_batch_size=64, ptx_max_length=48, eval_every=self.size.eval_every,
                save_every=self.size.eval_every, keep_checkpoints=self.size.ppo_steps,
            ),
            evaluate=self.measure,
        )  # fmt: skip

    def measure(self, policy: Policy) -> dict[str, float]:
        """Everything the table shows of a checkpoint, on held-out prompts and text."""
        return {
            **self.contest(policy),
            "lm_loss": perplexity(policy, self._heldout_text).loss,
            "ppl": perplexity(policy, self._heldout_pairs).ppl,
        }

    def results(self) -> dict[str, Any]:
        """Measure every stage on the same prompts; write results.json and samples.json."""
        checkpoints = {"pretrain": self.path("pretrain"), "sft": self.path("sft")} | {
            f"{name}_{step}": self.path(f"{name}/checkpoint-{step}")
            for name in ("ppo", "ppo_ptx")
            for step in self.size.shown
        }
        stages, answers = {}, {}
        for stage, path in checkpoints.items():
            policy = Policy.from_pretrained(path, critic="none")
            gap = self._ratio_gap(*stage.rsplit("_", 1)) if stage.startswith("ppo") else None
            stages[stage] = {**self.measure(policy), "max_ratio_gap": gap}
            answers[stage] = [self.text.decode(r.response) for r in self.contest.answers(policy)[:SAMPLES]]
        provenance = json.loads((self.folder / "data" / "provenance.json").read_text(encoding="utf-8"))
        people = rows(self.source("heldout"))
        results = {
            "seed": self.config.seed,
            "quick": self.config.quick,
            "python": provenance["python"],
            "rows": provenance["rows"],
            "human_gold": sum(self._judge_people(people)) / len(people),
            "reward_accuracy": list(JsonLines(self.folder / "reward" / "metrics.jsonl"))[-1]["eval/micro"],
            "minutes": {name: self._minutes(name) for name in ("pretrain", "sft", "reward", "ppo", "ppo_ptx")},
            "stages": stages,
        }
        shown = [str(p.text).removesuffix(docstrings.SEP) for p in self._asked[:SAMPLES]]
        human = {row["prompt"]: row["completion"] for row in people}
        samples = {"prompts": shown, "human": [human[str(p.text)] for p in self._asked[:SAMPLES]], "answers": answers}
        write_file(self.folder / "samples.json", json.dumps(samples, indent=1))
        write_file(self.folder / "results.json", json.dumps(results, indent=1))
        return results

    @cached_property
    def judge(self) -> docstrings.Judge:
        return docstrings.Judge(
            [row["text"] for name in ("corpus", "corpus_heldout") for row in rows(self.source(name))]
        )

    @cached_property
    def contest(self) -> Contest:
        sft_model = Policy.from_pretrained(self.path("sft"), critic="none")
        reward_model = RewardModel.from_pretrained(self.path("reward"))
        return Contest(sft_model, self.text, self._asked, self.judge, self.sampling, reward_model)

    @cached_property
    def _asked(self) -> Sequence[Prompt]:
        return self._prompts("prompts_heldout")[: self.size.eval_prompts]

    @cached_property
    def _heldout_text(self) -> Sequence[Example]:
        return data.documents(self.source("corpus_heldout"), self.text, 48)

    @cached_property
    def _heldout_pairs(self) -> Sequence[Example]:
        return data.demonstrations(self.source("heldout"), self.text, 64)

    def _prompts(self, name: str) -> Sequence[Prompt]:
        return data.prompts(self.source(name), self.text, docstrings.PROMPT_TOKENS)

    def _judge_people(self, people: list[dict[str, str]]) -> list[float]:
        prompts, completions = [row["prompt"] for row in people], [row["completion"] for row in people]
        return self.judge(prompts, completions, finished=[True] * len(people))

    def _ratio_gap(self, name: str, step: str) -> float:
        """The largest |pi / pi_old - 1| in the first minibatch of the first `step` iterations."""
        lines = JsonLines(self.folder / name / "metrics.jsonl")
        return max(line["policy/first_ratio_gap"] for line in lines if 0 < line.get("step", 0) <= int(step))

    def _minutes(self, name: str) -> float:
        lines = JsonLines(self.folder / name / "timings.jsonl")
        return round(sum(v for line in lines for k, v in line.items() if k.startswith("seconds/")) / 60, 2)
