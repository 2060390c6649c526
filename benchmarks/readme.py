"""The README's tables, generated from the JSON files in benchmarks/results: no figure is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import fall


def main(readme: Path, results: Path) -> None:
    """Replace the text between `<!-- NAME table -->` and `<!-- /NAME table -->` for every result that exists."""
    text = readme.read_text(encoding="utf-8")
    for name, table in (("demo", demo), ("quality", quality)):
        path = results / f"{name}.json"
        if path.is_file():
            lines = table(json.loads(path.read_text(encoding="utf-8")))
            start, end = f"<!-- {name} table -->", f"<!-- /{name} table -->"
            before, _, rest = text.partition(start)
            _, _, after = rest.partition(end)
            text = "\n".join([before + start, *lines, end]) + after
    readme.write_text(text, encoding="utf-8")


def demo(results: dict[str, Any]) -> list[str]:
    """One row per stage of the demo."""
    names = {"pretrain": "pre-trained", "sft": "SFT"}
    lines = [
        "| stage | win rate against SFT (95% from) | gold | reward | KL (nats) | distinct | held-out LM loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, found in results["stages"].items():
        kind, _, step = stage.rpartition("_")
        name = names.get(stage) or f"{'PPO-ptx' if kind == 'ppo_ptx' else 'PPO'}, iteration {step}"
        numbers = (f"{found[key]:.2f}" for key in ("gold", "reward", "kl", "distinct", "lm_loss"))
        lines.append(f"| {name} | {found['win_rate']:.2f} ({found['win_rate_low']:.2f}) | {' | '.join(numbers)} |")
    human, accuracy, rows = results["human_gold"], results["reward_accuracy"], results["rows"]
    return [
        *lines,
        "",
        f"Seed {results['seed']}, Python {results['python']}, {rows['demonstrations.jsonl']} demonstrations. "
        f"Docstrings written by people score {human:.2f}; the reward model orders {accuracy:.0%} of held-out pairs as "
        "the labeler did.",
    ]


def quality(results: dict[str, Any]) -> list[str]:
    """One row per seed and reward model of task A."""
    lines = [
        "| reward model | seed | accuracy | iteration | win rate | gold | proxy | KL (nats) | EOS |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, found in results["healthy"].items():
        lines.append(_row("healthy, kl_coef 0.05", seed, found["reward_accuracy"], found["curve"][-1]))
    for seed, found in results["weak"].items():
        best, _, _ = fall(found["curve"])
        lines.append(_row("weak, kl_coef 0: highest gold", seed, found["reward_accuracy"], best))
        lines.append(_row("weak, kl_coef 0: end", seed, found["reward_accuracy"], found["curve"][-1]))
        lines.append(_row("weak, kl_coef 0.05", seed, found["reward_accuracy"], found["kl_0.05"][-1]))
    return lines


def _row(name: str, seed: str, accuracy: float, point: dict[str, float]) -> str:
    numbers = " | ".join(f"{point[key]:.2f}" for key in ("win_rate", "gold", "proxy", "kl", "eos_rate"))
    return f"| {name} | {seed} | {accuracy:.2f} | {point['step']} | {numbers} |"
