"""Outlines: models that have shapes and no data, as config.json describes them and with our attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from twinhead.engine import attention, trunk
from twinhead.engine.config import RunConfig


class Unplannable(ValueError):
    """An architecture whose passes do not run without data: experts do what they read."""


def outline(factory: Any, path: str, config: RunConfig, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint folder, to be made under FakeTensorMode. Raises ValueError for a folder without one."""
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise ValueError(f"expected a checkpoint folder, got {path!r}, which does not exist")
    try:
        return shaped(factory, AutoConfig.from_pretrained(path, **options), config)
    except Unplannable:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path!r} cannot be loaded as {factory.__name__}: {reason}") from error


def shaped(factory: Any, described: PreTrainedConfig, config: RunConfig) -> PreTrainedModel:
    """The model that is described, in the dtype of a run. Raises Unplannable."""
    model = factory.from_config(described, dtype=config.torch_dtype).eval()
    if experts := [type(m).__name__ for m in model.modules() if type(m).__name__.endswith("Experts")]:
        raise Unplannable(f"plan: expected a model without experts, which work on what they like, got {experts[0]}")
    model.set_attn_implementation(attention.NAME)
    trunk.set_precision(model, config.dtype)
    return model


def nbytes(model: nn.Module) -> int:
    """Of its weights, each counted once."""
    return sum(p.nbytes for p in model.parameters())
