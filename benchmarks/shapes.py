"""The models that generate and train in the benchmarks: Llamas of a given shape with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from twinhead.engine import Policy

MAX_LENGTH = 2048
PAD, EOS = 0, 1
FIRST_WORD = 2  # of a prompt


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `vocabulary` is in the name because it decides what a step costs."""

    vocabulary: int
    hidden: int = 256
    inner: int = 688
    layers: int = 4
    heads: int = 8
    groups: int = 4  # heads of keys and values
    tied: bool = False  # one matrix for the embedding and the head
    spread: float = 1.6  # of random weights: their standard deviation times the square root of `hidden`

    @property
    def title(self) -> str:
        return f"{self.layers} × {self.hidden}, V={self.vocabulary}"

    def model(self, dtype: torch.dtype, device: torch.device, eos_scale: float = 1.0) -> PreTrainedModel:
        """The same weights for every call, without a stop token.

        They are wide enough for attention to choose: at the usual 0.02 greedy answers repeat one token, and any two
        decoders agree. `eos_scale` stretches EOS's row of the head, so that it wins about as often at every step and
        the lengths are geometric.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model = LlamaForCausalLM(self._config()).eval()
        with torch.no_grad():
            model.lm_head.weight[EOS] *= eos_scale
        return model.to(device, dtype)

    def judge(self, dtype: torch.dtype) -> PreTrainedModel:
        """A reward model of this shape: other weights, the same for every call, under one scalar head."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(1)
            return LlamaForSequenceClassification(self._config(num_labels=1)).eval().to(dtype)

    def _config(self, **more: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=self.spread * self.hidden**-0.5,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=PAD,
            **more,
        )

    def sequences(self, lengths: list[int]) -> list[list[int]]:
        """Random tokens, the same for every call, none of them PAD or EOS."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(FIRST_WORD, self.vocabulary, (n,), generator=generator).tolist() for n in lengths]


def policy(model: PreTrainedModel, critic: str) -> Policy:
    """Our policy on `model`, in its dtype. Its self-check runs in float32: in bfloat16 random weights this wide round
    two equal passes apart."""
    dtype = model.dtype
    found = Policy(model.float(), critic)
    model.to(dtype)
    return found


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the machine multiplies bfloat16 in hardware: every GPU of today, few CPUs."""
    if device.type == "cuda":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """float32, and bfloat16 where it is fast."""
    return (torch.float32, torch.bfloat16) if fast_bfloat16(device) else (torch.float32,)


def name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
