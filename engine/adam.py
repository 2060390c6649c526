"""AdamW (Loshchilov and Hutter 2019) whose two moments take 32 bits a number, or 8 through torchao."""

from __future__ import annotations

import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from twinhead.engine.config import RunConfig

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # a code of 8 bits spends one of them on the sign
BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # a tensor of fewer numbers keeps its moments in 32 bits


def adamw(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of `config.adam_bits` over groups of parameters.

    8: one byte a number and a scale for each 256 (Dettmers et al. 2022, arXiv 2110.02861), in float32 arithmetic; what
    is small (or no multiple of 256) keeps 32 bits. torchao compiles the step once for every shape, which takes seconds,
    and on a CPU a C++ compiler. Raises ValueError where torchao or that compiler is missing.
    """
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    if config.adam_bits == 32:
        return torch.optim.AdamW(groups, fused=True, **options)
    on_cpu = any(not p.is_cuda for group in groups for p in group["params"])
    if on_cpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("adam_bits: expected a C++ compiler (g++, or what CXX names) for 8 bits on a CPU, got none")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("adam_bits: 8 expects torchao, got none (pip install 'twinhead[lowbit]')") from error
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    return AdamW8bit(groups, block_size=BLOCK, **options)


def in_8_bits(p: nn.Parameter, config: RunConfig) -> bool:
    """Whether the moments of `p` take 8 bits a number."""
    return config.adam_bits == 8 and p.numel() >= SMALLEST and p.numel() % BLOCK == 0


def plain(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state of one parameter as tensors that a file can hold: moments in 8 bits as their codes and scales."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if hasattr(tensor, "codes"):
            parts |= {f"{name}:codes": tensor.codes, f"{name}:scale": tensor.scale}
        else:
            parts[name] = tensor
    return parts


def whole(name: str, p: nn.Parameter, parts: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The state of `p` from what plain() made of it, on its device. Raises ValueError for the parts of another one."""
    moments = (
        [f"{name}:{part}" for name in SIGNED for part in ("codes", "scale")] if in_8_bits(p, config) else [*SIGNED]
    )
    if parts.keys() != {"step", *moments}:
        expected = ", ".join(["step", *moments])
        raise ValueError(f"optimizer state: expected of {name} {expected}, got {', '.join(parts)}")
    shapes = {"step": torch.Size(), **dict.fromkeys(moments, p.shape)}
    shapes |= {name: torch.Size([p.numel() // BLOCK]) for name in moments if name.endswith(":scale")}
    for part, tensor in parts.items():
        if tensor.shape != shapes[part]:
            shape = f"{tuple(shapes[part])}, got {tuple(tensor.shape)}"
            raise ValueError(f"optimizer state: expected {name} of shape {shape}")
    if not in_8_bits(p, config):
        return {part: tensor.to(p.device) for part, tensor in parts.items()}
    from torchao.optim.subclass_8bit import OptimState8bit

    state: dict[str, Any] = {"step": parts["step"]}
    for moment, signed in SIGNED.items():
        state[moment] = OptimState8bit.zeros(p.shape, signed, BLOCK, p.device, p.dtype)
        state[moment].codes.copy_(parts[f"{moment}:codes"])
        state[moment].scale.copy_(parts[f"{moment}:scale"])
    return state
