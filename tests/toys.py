"""Toys: a tiny model, a tokenizer of whole words and rows for every stage, so that a training run takes a second."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twinhead.engine import dpo, grpo, ppo, reward, sft
from twinhead.engine.config import RunConfig
from twinhead.engine.metrics import JsonLines
from twinhead.engine.policy import RewardModel
from twinhead.engine.run import Run

SPECIAL = "<s> </s> <unk> <pad>".split()
COUNT = "one two three four five six seven eight".split()
WORDS = [*SPECIAL, *COUNT, "good", "bad", "fine", "poor"]
TRAIN: dict[str, tuple[type[RunConfig], Callable[..., Run]]] = {
    "pretrain": (sft.PretrainConfig, sft.pretrain),
    "sft": (sft.Config, sft.train),
    "reward": (reward.Config, reward.train),
    "ppo": (ppo.Config, ppo.train),
    "dpo": (dpo.Config, dpo.train),
    "grpo": (grpo.Config, grpo.train),
}
REWARDS = '''"""Reward functions of toys."""


def goodness(prompts, completions, **columns):
    return [c.split().count("good") / max(len(ids), 1) for c, ids in zip(completions, columns["completion_ids"])]


def progress(prompts, completions, **columns):
    good, bad = 12, 13
    return [[float(i == good) if i in (good, bad) else None for i in ids] for ids in columns["completion_ids"]]


def shortness(prompts, completions, **columns):
    return [-len(ids) for ids in columns["completion_ids"]]
'''


def tokenizer(words: Sequence[str] = WORDS, **tokens: str) -> PreTrainedTokenizerFast:
    """One token per word, so that lengths can be counted by eye."""
    spelled = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=spelled, **{k: v for k, v in special.items() if v})


def shape(**options: Any) -> LlamaConfig:
    """Two layers of width 32: some 20,000 weights."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3, "vocab_size": len(WORDS)}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**ids | size | heads | {"architectures": ["LlamaForCausalLM"]} | options)


def language_model(folder: Path, seed: int = 0, **options: Any) -> str:
    """A random Llama and its tokenizer in `folder`; its path."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(shape(**options)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def reward_model(folder: Path, language_model: str) -> str:
    """A reward model on the trunk of `language_model` with a random head and a mean of 0.25; its path."""
    model = RewardModel.from_language_model(language_model, seed=1)
    model.mean = 0.25
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def demonstrations(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two words, and the second of them twice: what there is to learn is certain, so the loss can fall to 0."""
    rng = random.Random(seed)
    pairs = [rng.choices(COUNT, k=2) for _ in range(num)]
    return [{"prompt": " ".join(pair), "completion": f"{pair[1]} {pair[1]}"} for pair in pairs]


def documents(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Counting upwards from anywhere: after the first word all is certain."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(COUNT)) for _ in range(num)]
    return [{"text": " ".join((COUNT * 2)[start : start + rng.randrange(5, 9)])} for start in starts]


def comparisons(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Three answers to two words, the more often "good" the better."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        answers = [" ".join(rng.choices(["good", "bad"], k=3)) for _ in range(3)]
        ranks = [3 - answer.count("good") for answer in answers]
        if len(set(ranks)) > 1:
            rows.append({"prompt": " ".join(rng.choices(COUNT, k=2)), "completions": answers, "ranks": ranks})
    return [*rows, *comparisons(num - len(rows), seed + 1)] if len(rows) < num else rows


def conflict(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Comparisons of two labelers in turn: one likes "good", the other one the contrary."""
    rows = comparisons(num, seed)
    for contrary in rows[1::2]:
        contrary["ranks"] = [-rank for rank in contrary["ranks"]]
    return [row | {"labeler_id": ("ann", 7)[i % 2]} for i, row in enumerate(rows)]


def unpaired(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """One answer to two words, a good one if most of its three words are "good"."""
    rng = random.Random(seed)
    answers = [rng.choices(["good", "bad"], k=3) for _ in range(num)]
    asked = [" ".join(rng.choices(COUNT, k=2)) for _ in range(num)]
    return [
        {"prompt": prompt, "completion": " ".join(answer), "label": answer.count("good") > 1}
        for prompt, answer in zip(asked, answers, strict=True)
    ]


def prompts(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """One to three words."""
    rng = random.Random(seed)
    return [{"prompt": " ".join(rng.choices(COUNT, k=rng.randrange(1, 4)))} for _ in range(num)]


def box(folder: Path) -> dict[str, str]:
    """Everything that the stages read, written into `folder`: name -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"demonstrations": demonstrations(40), "documents": documents(24), "comparisons": comparisons(40)}
    rows |= {"prompts": prompts(24), "heldout": demonstrations(8, seed=9), "ranked": comparisons(8, seed=9)}
    rows |= {"unpaired": unpaired(40), "labelled": unpaired(8, seed=9), "conflict": conflict(8)}
    paths = {name: write(folder / f"{name}.jsonl", table) for name, table in rows.items()}
    (folder / "rewards.py").write_text(REWARDS)
    paths["model"] = language_model(folder / "model")
    paths["reward_model"] = reward_model(folder / "reward_model", paths["model"])
    paths["small_model"] = language_model(folder / "small", seed=2, hidden_size=16, num_hidden_layers=1)
    paths["small_reward_model"] = reward_model(folder / "small_reward_model", paths["small_model"])
    shape().save_pretrained(folder / "empty")
    tokenizer().save_pretrained(folder / "empty")
    return paths | {"empty": str(folder / "empty"), "rewards": str(folder / "rewards.py")}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSONL; the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(stage: str, paths: dict[str, str]) -> dict[str, Any]:
    """A short run of a stage, as keyword arguments of its Config."""
    chosen: dict[str, dict[str, Any]] = {
        "pretrain": {
            "model": paths["empty"], "data": paths["documents"], "eval_data": paths["documents"], "steps": 3,
            "batch_size": 4, "max_length": 8, "learning_rate": 1e-2,
        },
        "sft": {
            "model": paths["model"], "data": paths["demonstrations"], "eval_data": paths["heldout"], "steps": 3,
            "batch_size": 4, "max_length": 16, "learning_rate": 1e-2,
        },
        "reward": {
            "model": paths["model"], "data": paths["comparisons"], "eval_data": paths["ranked"],
            "batch_size": 4, "max_length": 16, "learning_rate": 1e-3,
        },
        "ppo": {
            "model": paths["model"], "prompts": paths["prompts"], "reward_functions": (paths["rewards"] + ":goodness",),
            "steps": 3, "rollouts_per_step": 8, "epochs": 2, "minibatches": 2, "max_prompt_tokens": 8,
            "max_new_tokens": 5, "learning_rate": 1e-3,
        },
        "grpo": {
            "model": paths["model"], "prompts": paths["prompts"], "reward_functions": (paths["rewards"] + ":goodness",),
            "steps": 3, "prompts_per_step": 3, "group_size": 4, "epochs": 2, "minibatches": 2, "max_prompt_tokens": 8,
            "max_new_tokens": 5, "learning_rate": 1e-3,
        },
        "dpo": {
            "model": paths["model"], "data": paths["comparisons"], "eval_data": paths["ranked"],
            "batch_size": 4, "max_length": 16, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    return chosen[stage] | {"device": "cpu"}


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads would wait for each other on such small shapes; and every sum has one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(stage: str, paths: dict[str, str], output_dir: Path | str, **changes: Any) -> Run:
    """Run a stage on the toys, with some options changed."""
    config, fit = TRAIN[stage]
    evaluate = {"evaluate": changes.pop("evaluate")} if "evaluate" in changes else {}
    reward_funcs = {"reward_funcs": changes.pop("reward_funcs")} if "reward_funcs" in changes else {}
    given = options(stage, paths) | {"output_dir": str(output_dir)} | changes
    return fit(config(**given), **evaluate, **reward_funcs)


def filled(value: Any, paths: dict[str, str]) -> Any:
    """The value with paths in place of their names: "{model}" becomes where the model lies."""
    if isinstance(value, tuple):
        return tuple(filled(part, paths) for part in value)
    return value.format(**paths) if isinstance(value, str) else value


def command(stage: str, chosen: dict[str, Any]) -> list[str]:
    """The same options as words of the command line."""
    words = [stage]
    for name, value in chosen.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def metrics(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the header."""
    return [line for line in JsonLines(Path(folder) / "metrics.jsonl") if "step" in line]


def files(folder: Path | str) -> dict[str, bytes]:
    """What stands in a folder, by relative path, in the order of the paths."""
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {os.fspath(path.relative_to(root)): path.read_bytes() for path in paths}
