"""Tiny random checkpoints: every architecture that we support, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY, MAX_LENGTH, WINDOW = 61, 96, 5
BOS, EOS, PAD = 0, 1, 2
WORDS = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]

MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
CLASSIC = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
SCALED = {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 3.0}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# What each architecture adds to the options of its family. Windows are shorter than the prompts of the tests.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": MODERN,
    "qwen2": MODERN,
    "qwen3": MODERN | {"head_dim": 8},
    "mistral": MODERN | {"sliding_window": WINDOW},
    "gpt2": CLASSIC,
    "gemma": MODERN | {"head_dim": 8},
    "gemma2": MODERN | ALTERNATING | {"head_dim": 8, "query_pre_attn_scalar": 6, "final_logit_softcapping": 2.0},
    "gemma3_text": MODERN | ALTERNATING | {"head_dim": 8, "query_pre_attn_scalar": 6},
    "granite": MODERN | SCALED,
    "cohere2": MODERN | ALTERNATING | {"logit_scale": 0.25},
    "opt": MODERN | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": MODERN | {"num_key_value_heads": 4},
    "phi": MODERN,
    "phi3": MODERN,
    "glm4": MODERN | {"head_dim": 8},
    "olmo2": MODERN,
    "smollm3": MODERN,
    "starcoder2": MODERN,
    "mixtral": MODERN | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": MODERN | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": MODERN,
    "gptj": CLASSIC | {"rotary_dim": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "stablelm": MODERN,
    "gpt_oss": MODERN | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
}


def model(architecture: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal language model whose matrices are N(0, 0.3²), large enough for its text to vary; vectors move too.

    Attention is transformers' own eager one, the one implementation that obeys every option.
    """
    return _drawn(AutoModelForCausalLM, architecture, seed, changes)


def classifier(architecture: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The same under one scalar head."""
    return _drawn(AutoModelForSequenceClassification, architecture, seed, changes | {"num_labels": 1})


def _drawn(factory: type, architecture: str, seed: int, changes: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES | REFUSED)[architecture] | changes)
    made = factory.from_config(config, attn_implementation="eager").eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            parameter.copy_(0.3 * drawn if parameter.ndim > 1 else parameter + 0.1 * drawn)
    return made


def tiny(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The folder of a checkpoint: a random model and the tokenizer of WORDS beside it."""
    model(architecture, seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: w4 is 4, w5 is 5, ..."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def ids(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Random token sequences of these lengths, without special tokens."""
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (n,), generator=drawn).tolist() for n in lengths]
