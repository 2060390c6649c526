"""Hugging Face checkpoints in and out: nothing missing, nothing silently left over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

VALUE_HEAD = "value_head.safetensors"
REWARD_NORMALISATION = "twinhead_reward_mean"  # a key of config.json: the mean score of the demonstrations


def load_causal_lm(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A decoder with its language-model head. Raises ValueError where tensors are missing or the kind is wrong."""
    model, info = _load(AutoModelForCausalLM, path, dtype)
    _refuse(path, "a causal language model", missing=info["missing_keys"], unexpected=info["unexpected_keys"])
    return model


def load_trunk(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The decoder without a head, of a language model, of a reward model or by itself. Raises ValueError."""
    model, info = _load(AutoModel, path, dtype)
    heads = ("lm_head.", "embed_out.", "score.")
    _refuse(path, "a decoder", info["missing_keys"], {k for k in info["unexpected_keys"] if not k.startswith(heads)})
    return model


def initialise(path: str | Path, seed: int) -> PreTrainedModel:
    """The architecture of a config.json with random weights, the same for the same seed."""
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{str(path)!r} holds no configuration of a causal language model: {reason}") from error


def load_classifier(path: str | Path, dtype: torch.dtype | None = None, *, new_head: bool = False) -> PreTrainedModel:
    """The decoder with one scalar `score` head on top.

    `new_head` starts from a language model: every trunk tensor must be there, only the head is new (and the
    language-model head is left behind). Without it the checkpoint must be a reward model. Raises ValueError.
    """
    model, info = _load(AutoModelForSequenceClassification, path, dtype, num_labels=1)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing -= {"score.weight"}
        unexpected = {key for key in unexpected if not key.startswith(("lm_head.", "embed_out."))}
    _refuse(path, "a language model" if new_head else "a reward model with one label", missing, unexpected)
    return model


def _load(factory: Any, path: str | Path, dtype: torch.dtype | None, **options: object) -> tuple[PreTrainedModel, dict]:
    if not (Path(path) / "config.json").is_file() and (Path(path).exists() or str(path).startswith((".", "/"))):
        raise ValueError(f"expected a Hugging Face checkpoint folder with a config.json, got {str(path)!r}")
    options |= {"dtype": dtype or torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = factory.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{str(path)!r} cannot be loaded as {factory.__name__}: {reason}") from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, theirs, ours = mismatched[0]
        raise ValueError(f"{str(path)!r}: expected {name} of shape {tuple(ours)}, got {tuple(theirs)}")
    return model, info


def _refuse(path: str | Path, kind: str, missing: set[str], unexpected: set[str]) -> None:
    for what, keys in (("lacks", sorted(missing)), ("has no place for", sorted(unexpected))):
        if keys:
            some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            found = f"it {what} {len(keys)} tensors ({some})"
            raise ValueError(f"{str(path)!r}: expected the weights of {kind}, but {found}")


def save_head(folder: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write the value head beside the weights."""
    save_tensors(Path(folder) / VALUE_HEAD, tensors)


def load_head(folder: str | Path) -> dict[str, Tensor] | None:
    """The value head that lies beside the weights, if there is one."""
    path = Path(folder) / VALUE_HEAD
    return load_file(path) if path.is_file() else None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What save_tensors wrote."""
    return load_file(path)


def has_weights(path: str | Path) -> bool:
    """Whether a local folder holds tensors beside its config.json; anything that is no folder is left to the loader."""
    folder = Path(path)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
