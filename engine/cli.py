"""The `twinhead` command: each training stage, and what one does with their checkpoints."""

from __future__ import annotations

import difflib
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Suppress

from twinhead.engine import arrangements, data, demo, dpo, grpo, ppo, presets, ranks, report, reward, scorers, sft
from twinhead.engine.config import Source, check, parse
from twinhead.engine.evaluate import accuracies, perplexity, win_rate
from twinhead.engine.generate import generate
from twinhead.engine.planning import plan
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.sampling import Sampling
from twinhead.engine.text import Text, spoken


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Answer prompts: one given on the command line, or the rows of a file."""

    first_row: Suppress[int] = 0
    seeds: Suppress[tuple[int, ...] | None] = None
    stop_sequences: Suppress[tuple[tuple[int, ...], ...]] = ()
    bootstrap: Suppress[bool] = False  # there is no critic
    model: str
    prompt: str = ""  # one prompt as plain text
    instruction: str = ""  # one instruction, spelled by the template that the checkpoint was taught with
    input: str = ""  # what the instruction is about
    prompts: Source = ""  # rows with a prompt
    output: str = ""  # JSONL file to write instead of the terminal
    max_prompt_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        given = sum(map(bool, (self.prompt, self.instruction, self.prompts)))
        check(
            self,
            prompts=(given == 1, "one of --prompt, --instruction and --prompts"),
            input=(bool(self.instruction) or not self.input, "nothing without --instruction"),
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a command that can be planned adds to the options of its stage."""

    plan: bool = False  # print the memory that every part will take in every phase, and load nothing


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Planned, ppo.Config):
    """PPO on prompts, against a reward model or, in Python, reward functions."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Planned, grpo.Config):
    """Group-relative policy optimisation on prompts: several answers to each, compared with each other; no critic."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Planned, dpo.Config):
    """Direct preference optimisation on comparisons, or on single answers labelled good or bad (kto)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a checkpoint: perplexity on demonstrations, a reward model's accuracy, a win rate against a baseline."""

    model: str = ""  # policy to measure
    data: Source = ""  # demonstrations: held-out loss and perplexity of `model`
    text: Source = ""  # plain text: the same
    reward_model: str = ""  # judge of the win rate, or the reward model to measure
    comparisons: Source = ""  # rankings: accuracy of `reward_model`
    baseline: str = ""  # policy to win against
    prompts: Source = ""  # prompts of the contest
    max_length: int = 1024
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        measured = (self.model and (self.data or self.text)) or (self.reward_model and self.comparisons)
        if self.comparisons and not self.reward_model:
            raise ValueError("comparisons: expected a --reward_model whose accuracy they measure, got none")
        if bool(self.prompts) != bool(self.baseline):
            raise ValueError("a contest needs both --baseline and --prompts (with --model and --reward_model), got one")
        contest = self.model and self.baseline and self.prompts and self.reward_model
        if not (measured or contest):
            raise ValueError(
                "nothing to measure: expected --model with --data or --text, --reward_model with --comparisons, "
                "or --model, --baseline, --prompts and --reward_model"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the learning curves of a run into its folder, as report.html."""

    run: str  # a run's output_dir


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 after an error in one sentence, 130 after an interrupt."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help", "help"):
        Console().print(usage(), highlight=False)
        return 0 if given else 1
    name, rest = given[0], given[1:]
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise ValueError(f"unknown command{f', did you mean {near[0]}?' if near else ''} (see twinhead --help)")
        if ranks.asked() > 1 and name not in TRAINING:
            raise ValueError(f"expected one process for what is no training, got {ranks.asked()}")
        config_type, command = COMMANDS[name]
        preset = partial(presets.options, stage=name) if name in presets.STAGES else None
        command(parse(config_type, rest, f"twinhead {name}", preset))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"twinhead {name}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\ntwinhead {name}: interrupted; the same command goes on from the last checkpoint\n")
        return 130
    ranks.leave()
    return 0


def usage() -> str:
    """The commands, one line each."""
    purpose = {name: re.split(r"[:.(]|, ", config.__doc__ or "")[0].strip() for name, (config, _) in COMMANDS.items()}
    lines = [f"  {name:<10}{what}" for name, what in purpose.items()]
    first = "usage: twinhead COMMAND [--config file.yaml] [--key value ...]"
    known = [f"  {name:<13}{', '.join(stages)}" for name, stages in presets.stages().items()]
    last = ["twinhead COMMAND --help lists the options.", "--preset name stands for several of them:", "", *known]
    return "\n".join([first, "", *lines, "", *last])


def run_demo(config: demo.Config) -> None:
    """The whole pipeline on real text."""
    console = Console()
    console.print(f"report: {demo.run(config, console)}", highlight=False, soft_wrap=True)


def run_planned(stage: Any, config: Any) -> None:
    """Train, or print what memory that would take: for PPO in other arrangements of its models as well."""
    chosen = stage.Config(**{field.name: getattr(config, field.name) for field in fields(stage.Config)})
    if config.plan:
        others = [arrangements.table(chosen)] if stage is ppo else []
        Console().print(plan(chosen).table(), *others)
    else:
        stage.train(chosen)


def run_generate(config: GenerateConfig) -> None:
    """Answer prompts, on the terminal or into a file."""
    if not Path(config.output).parent.is_dir():
        raise ValueError(f"output: expected a file in a folder that exists, got {config.output!r}")
    text = Text.from_pretrained(config.model)
    asked = data.prompts(requests(config), text, config.max_prompt_tokens)
    policy = Policy.from_pretrained(config.model, critic="none")
    sampling = Sampling(**{name: getattr(config, name) for name in Sampling.__dataclass_fields__})
    rollouts = generate(policy, [p.tokens for p in asked], sampling)
    answers = [
        {"prompt": p.text, "completion": text.decode(r.response), "finished": r.finished}
        for p, r in zip(asked, rollouts, strict=True)
    ]
    if config.output:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        Path(config.output).write_text("".join(lines), encoding="utf-8")
        return
    console = Console()
    for prompt, answer in zip(asked, answers, strict=True):
        asked_and_answered = escape(f"{spoken(prompt.text)}\n{answer['completion']}\n")
        console.print(f"[bold]>[/] {asked_and_answered}", highlight=False, soft_wrap=True)


def requests(config: GenerateConfig) -> Source:
    """The rows to answer."""
    if config.instruction:
        return [{"instruction": config.instruction, "input": config.input}]
    return [{"prompt": config.prompt}] if config.prompt else config.prompts


def run_evaluate(config: EvaluateConfig) -> None:
    """Measure what the options give the data for, and print it as a table."""
    results: dict[str, float] = {}
    policy = Policy.from_pretrained(config.model, critic="none") if config.model else None
    text = Text.from_pretrained(config.model or config.reward_model)
    judge = RewardModel.from_pretrained(config.reward_model) if config.reward_model else None
    if config.reward_model:
        scorers.check_tokenizer(config.reward_model, text)
    for name, source, read in (("data", config.data, data.demonstrations), ("text", config.text, data.documents)):
        if policy is not None and source:
            found = perplexity(policy, read(source, text, config.max_length))
            results |= {f"{name}/loss": found.loss, f"{name}/ppl": found.ppl}
    if judge is not None and config.comparisons:
        accuracy = accuracies(judge, data.comparisons(config.comparisons, text, config.max_length))
        results |= {f"reward/{name}": value for name, value in accuracy.items()}
    if policy is not None and judge is not None and config.baseline:
        asked = data.prompts(config.prompts, text, config.max_length)
        tokens = [p.tokens for p in asked]
        sampling = Sampling(max_new_tokens=config.max_new_tokens, seed=config.seed, stop=tuple(text.stop_ids))
        ours, theirs = (
            scorers.model_scores(judge, generate(p, tokens, sampling), 16384)
            for p in (policy, Policy.from_pretrained(config.baseline, critic="none"))
        )
        results |= {f"win_rate/{name}": value for name, value in asdict(win_rate(ours, theirs)).items()}
    table = Table("measure", "value")
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def run_report(config: ReportConfig) -> None:
    """Write report.html into the folder of a run or of the demo."""
    folder = Path(config.run)
    written = report.write_demo(folder) if (folder / "results.json").is_file() else report.write_run(folder)
    Console().print(f"report: {written}", highlight=False, soft_wrap=True)


COMMANDS: dict[str, tuple[type, Callable[..., object]]] = {
    "demo": (demo.Config, run_demo),
    "pretrain": (sft.PretrainConfig, sft.pretrain),
    "sft": (sft.Config, sft.train),
    "reward": (reward.Config, reward.train),
    "ppo": (PPOConfig, partial(run_planned, ppo)),
    "dpo": (DPOConfig, partial(run_planned, dpo)),
    "grpo": (GRPOConfig, partial(run_planned, grpo)),
    "generate": (GenerateConfig, run_generate),
    "evaluate": (EvaluateConfig, run_evaluate),
    "report": (ReportConfig, run_report),
}
TRAINING = ("pretrain", "sft", "reward", "ppo", "dpo", "grpo")  # what several processes can do together

if __name__ == "__main__":  # torchrun -m twinhead.engine.cli
    sys.exit(main())
