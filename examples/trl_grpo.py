"""TRL's GRPO trainer with our fused head in it: one assignment, and the trainer's own code is unchanged.

    pip install trl==1.16.0
    python examples/trl_grpo.py            # with ours
    python examples/trl_grpo.py --own      # with TRL's: the same losses

The model is tiny and random and the reward is a toy, so that it runs anywhere in seconds; in your own script only the
class and the assignment in `use_ours` matter.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from twinhead.kernels import linear_logprob

TRLS = trl.trainer.utils._ChunkedLogProbFunction
WORDS = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


class FusedHead:
    """trl.trainer.utils._ChunkedLogProbFunction by linear_logprob: GRPO, RLOO and every reference model go through it.

    Where a trainer also asks for metrics of the logits (SFT and DPO do), TRL's own function answers. DeepSpeed's ZeRO-3
    is not supported: it takes the head away between forward and backward.
    """

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """log_probs and entropy (N,), and None for the three metrics."""
        if not {"log_probs", "entropy"}.issuperset(outputs):
            return TRLS.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        logprobs, entropy = linear_logprob(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            None if bias is None else bias.to(dtype),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            return_entropy=True,
        )
        return logprobs, entropy if "entropy" in outputs else None, None, None, None


def use_ours() -> None:
    """From here on every trainer of TRL scores with our kernels."""
    trl.trainer.utils._ChunkedLogProbFunction = FusedHead


def write_tiny(folder: str) -> None:
    """A random model that reads and writes single letters."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def train() -> list[dict[str, float]]:
    """What TRL logs of two steps over the same completions: the second is off-policy, so its ratios are not 1."""
    set_seed(0)
    prompts = Dataset.from_dict({"prompt": [" ".join(WORDS[i + 2 : i + 6]) for i in range(16)]})
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(folder)
        config = GRPOConfig(
            folder, max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=12,
            learning_rate=1e-3, beta=0.1, temperature=0.9, num_iterations=2, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(folder, vowels, config, prompts)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in ("loss", "entropy", "kl", "grad_norm")} for entry in logged]


def main() -> None:
    """Train, and print what was logged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--own", action="store_true", help="leave TRL's function in place")
    if not parser.parse_args().own:
        use_ours()
    for step, logged in enumerate(train(), 1):
        print(f"step {step}", *(f"{name} {value:.6f}" for name, value in logged.items()), sep="  ")


if __name__ == "__main__":
    main()
