"""What a run is told: the options that every stage shares, and their way in from a YAML file and the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
import yaml

C = TypeVar("C")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}
ELSEWHERE = ("--config=", "--preset=")  # options that stand for others
SCHEDULES = ("constant", "linear", "cosine")

# A path or dataset name on the command line; in Python also the rows themselves.
Source = Annotated[str | list[dict[str, Any]], tyro.conf.arg(constructor=str, metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of every training stage."""

    output_dir: str
    """Folder of the run: the final checkpoint, checkpoint-N folders, metrics.jsonl. The same command resumes it."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dtype: str = "float32"
    """float32 or bfloat16: of weights and activations; mixed: weights that learn in float32, products in bfloat16.
    Log-probs, values and losses are float32 at least."""
    learning_rate: float = 1e-5
    schedule: str = "constant"
    """constant, linear (to 0) or cosine (to a tenth of the peak), after the warm-up."""
    warmup_ratio: float = 0.0
    """Share of all optimizer steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    adam_bits: int = 32
    """Of each number that AdamW remembers: 32, or 8 through torchao (the lowbit extra), a quarter of the memory."""
    shard_optimizer: bool = False
    """Of several processes each keeps AdamW's memory for its share of the weights (ZeRO-1); no number changes."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to; 0 switches clipping off."""
    tokens_per_micro: int = 16384
    """Tokens in one forward and backward pass. A memory knob: it cannot change the gradient."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the layer again for the gradient: less memory, a third more work."""
    lora_rank: int = 0
    """Of low-rank adapters on frozen weights, which alone learn (Hu et al. 2021), at some ten times the learning rate;
    0: all weights learn."""
    lora_alpha: int | None = None
    """What adapters add is scaled by lora_alpha / lora_rank; None: by 2."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get an adapter, such as q_proj; none: all-linear, those of the trunk. The vocabulary's head and the
    embedding, mostly lm_head and embed_tokens, have to be named: all-linear lm_head."""
    save_every: int = 0
    """Steps between checkpoints to resume from; 0: only at the end."""
    keep_checkpoints: int = 1
    """How many checkpoint-N folders stay."""
    tensorboard: bool = False
    """Also write TensorBoard events into output_dir/tensorboard (needs the tensorboard extra)."""

    def __post_init__(self) -> None:
        check(
            self,
            output_dir=(bool(self.output_dir), "a folder"),
            device=(self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
            dtype=(self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            learning_rate=(self.learning_rate >= 0, "at least 0"),
            schedule=(self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            warmup_ratio=(0 <= self.warmup_ratio <= 1, "a share between 0 and 1"),
            adam_bits=(self.adam_bits in (8, 32), "8 or 32"),
            max_grad_norm=(self.max_grad_norm >= 0, "at least 0 (0: no clipping)"),
            tokens_per_micro=(self.tokens_per_micro >= 1, "at least 1"),
            lora_rank=(self.lora_rank >= 0, "at least 0 (0: all weights learn)"),
            lora_alpha=(
                self.lora_alpha is None or (self.lora_rank > 0 and self.lora_alpha >= 1),
                "at least 1, with lora_rank",
            ),
            lora_targets=(self.lora_rank > 0 or not self.lora_targets, "none without lora_rank"),
            save_every=(self.save_every >= 0, "at least 0 (0: only at the end)"),
            keep_checkpoints=(self.keep_checkpoints >= 1, "at least 1"),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def device_type(self) -> str:
        """cpu or cuda, whether or not this machine has it."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    @property
    def torch_device(self) -> torch.device:
        if self.device_type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected cpu or auto on a machine without CUDA, got 'cuda'")
        return torch.device(self.device_type)


def check(config: object, **rules: tuple[bool, str]) -> None:
    """Raise ValueError for the first option that breaks its rule: option=(is it valid, what is expected)."""
    for name, (valid, expected) in rules.items():
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)!r}")


def parse(
    cls: type[C], args: Sequence[str], program: str, preset: Callable[[str], Mapping[str, Any]] | None = None
) -> C:
    """A config from `--config file.yaml` and `--key value` options, which win over the file.

    `--preset name` stands for the options that `preset` gives for it, over which both win. Raises ValueError for an
    unknown option (with the nearest right one), a missing file or a file that is no mapping.
    """
    given = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(ELSEWHERE) else [arg])]
    file, given = _taken(given, "--config", "the path of a YAML file")
    name, given = _taken(given, "--preset", "a name") if preset is not None else (None, given)
    if file is not None:
        given = read_yaml(cls, file) + given
    if name is not None and preset is not None:
        given = words(preset(name)) + given
    for arg in given:
        if arg.startswith("--"):
            _known(cls, arg.removeprefix("--").split("=")[0].replace("-", "_"))
    return tyro.cli(cls, args=given, prog=program, use_underscores=True)


def _taken(given: list[str], option: str, value: str) -> tuple[str | None, list[str]]:
    """What stands behind an option, and the words without both."""
    if option not in given:
        return None, given
    at = given.index(option)
    if at + 1 == len(given):
        raise ValueError(f"{option}: expected {value}, got nothing")
    return given[at + 1], given[:at] + given[at + 2 :]


def read_yaml(cls: type, path: str) -> list[str]:
    """The options of a YAML mapping, as they would stand on the command line."""
    if not Path(path).is_file():
        raise ValueError(f"--config: expected a YAML file, got {path!r}, which does not exist")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected a mapping of options, got {type(options).__name__}")
    for name in options:
        _known(cls, str(name))
    return words(options)


def words(options: Mapping[str, Any]) -> list[str]:
    """Options as they stand on the command line."""
    args: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            args.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, list) else [value]
            args += [f"--{name}", *map(str, values)]
    return args


def hidden(option: dataclasses.Field[Any]) -> bool:
    """Whether an option is for Python alone: neither files nor the command line can spell it."""
    return str(option.type).startswith("Suppress")


def _known(cls: type, name: str) -> None:
    options = [f.name for f in dataclasses.fields(cls) if not hidden(f)]
    if name in options or name.removeprefix("no_") in options or name == "help":
        return
    near = difflib.get_close_matches(name, options, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; the options are {', '.join(options)}"
    raise ValueError(f"unknown option {name!r}{hint}")
