"""One pass through an unchanged Hugging Face decoder, over packed sequences or over cache slots, and its self-check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from twinhead.engine import attention, linear
from twinhead.engine.attention import Ragged
from twinhead.engine.batch import Example, Packed, TokenSequence, pack
from twinhead.engine.cache import SlotCache

MIXED = "twinhead_mixed"  # an attribute of models whose products are taken in bfloat16


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What an architecture does to hidden @ weight.T besides adding a bias."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LogitTransform:
        config = model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
        return cls(scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale == 1.0 and self.softcap is None:
            return logits
        logits = logits.float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def adopt(model: PreTrainedModel) -> None:
    """Let `model` call our attention function and our matrix product, and switch its dropout off.

    Dropout stays off in training too: it would make the ratio of PPO random at the first step (spec 3.7). So does all
    other noise: some architectures skip layers or blur their router in training.
    """
    model.set_attn_implementation(attention.NAME)
    linear.adopt(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT and others keep a rate and call the function themselves
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
    self_check(model)


def version(model: nn.Module) -> int:
    """A number that grows whenever a weight is changed in place."""
    return sum(p._version for p in model.parameters())


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """From here on training passes keep each layer's input and compute the rest again (arXiv 1604.06174).

    Raises ValueError for an architecture that cannot.
    """
    # transformers 5.17 knows the old name alone, and its successors warn of it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode alone; nothing else depends on it, see adopt


def set_precision(model: PreTrainedModel, dtype: str) -> None:
    """For dtype "mixed": from here on passes take their products in bfloat16, of weights that stay in float32.

    Where the weight itself is bfloat16, updates below a 256th of it are lost (Micikevicius et al. 2018, section 3).
    """
    setattr(model, MIXED, dtype == "mixed")


def precision(model: PreTrainedModel) -> AbstractContextManager[object]:
    """The context of a pass. Around several, it casts each weight once."""
    return torch.autocast(model.device.type, torch.bfloat16) if getattr(model, MIXED, False) else nullcontext()


def exactly(model: PreTrainedModel) -> AbstractContextManager[object]:
    """The context of products in their own precision within a pass."""
    return torch.autocast(model.device.type, enabled=False) if getattr(model, MIXED, False) else nullcontext()


def packed_pass(
    model: PreTrainedModel, packed: Packed, cache: SlotCache | None = None, slots: list[int] | None = None
) -> Tensor:
    """(T, H) last hidden states of packed sequences; with a cache, their keys and values also go into `slots`."""
    if cache is None:
        layout = Ragged(packed.lengths, packed.cu_seqlens)
    else:
        assert slots is not None, "a prefill needs the slots that its sequences go into"
        layout = cache.prefill(slots, Ragged(packed.lengths, packed.cu_seqlens))
    return _forward(model, packed.tokens[None], packed.positions[None], cache, layout)[0]


def decode_pass(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, span: int, cache: SlotCache, even: bool = False
) -> Tensor:
    """(B, H) last hidden states of one new token (B,) in each of the slots 0..B-1, at `positions` (B,) below `span`.

    `even`: every position is span - 1, so that no key has to be masked.
    """
    layout = cache.decode(positions, span, even)
    return _forward(model, tokens[:, None], positions[:, None], cache, layout)[:, 0]


def _forward(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, cache: SlotCache | None, layout: object
) -> Tensor:
    with precision(model):
        output = model.base_model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=cache is not None, layout=layout
        )
    states: Tensor = output.last_hidden_state
    return states.bfloat16() if getattr(model, MIXED, False) else states


def num_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers, by the name that the architecture's configuration gives it."""
    return int(model.config.get_text_config().num_hidden_layers)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, by whatever name the architecture has for their list."""
    num = num_layers(model)
    return next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == num)


def check_fit(model: PreTrainedModel, sequences: Iterable[TokenSequence], new_tokens: int | Sequence[int] = 0) -> None:
    """Raise ValueError, before any work, for a sequence (and `new_tokens` after it) that `model` cannot read."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, sequence in enumerate(sequences):
        ids, new = [*sequence.prompt, *sequence.response], new_tokens if isinstance(new_tokens, int) else new_tokens[i]
        if limit is not None and len(ids) + new > limit:
            after = f" and {new} new ones" if new else ""
            raise ValueError(f"sequence {i}: expected at most the model's {limit} tokens, got {len(ids)}{after}")
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"sequence {i}: expected token ids in [0, {vocabulary}), the rows of the model's embedding, "
                f"got {min(ids)}..{max(ids)}: its tokenizer belongs to another model"
            )


@torch.no_grad()
def self_check(model: PreTrainedModel) -> None:
    """Run 20 tokens through `model` three ways and refuse it, with the reason, where our passes would be wrong.

    Packed must equal the stock attention one sequence at a time, one decoding step must equal the full pass, and every
    layer must call our attention function exactly once per pass. Raises ValueError.
    """
    name = type(model).__name__
    device, vocabulary = model.device, model.get_input_embeddings().weight.shape[0]
    ids = [[(7 * i + 3 * n + 1) % vocabulary for i in range(n)] for n in (5, 9, 6)]
    was_training = model.training
    model.eval()
    try:
        expected = _separately(model, ids)
        packed = pack([Example(prompt=[], response=sequence) for sequence in ids], device)
        with _CountedCalls() as calls:
            whole = packed_pass(model, packed)
        if calls.count != num_layers(model):
            raise ValueError(
                f"expected {num_layers(model)} calls of the attention function in one pass (one per layer), "
                f"got {calls.count}: this architecture bypasses transformers' attention interface"
            )
        compare("packed sequences differ from separate ones", whole, torch.cat(expected))
        compare("training mode differs from evaluation mode", packed_pass(model.train(), packed), whole)
        model.eval()
        last = torch.stack([e[-1] for e in expected])
        _check_logits(model, ids[1], expected[1])
        compare("decoding from the cache differs from the full pass", _one_step(model, ids), last)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    finally:
        model.train(was_training)


def _separately(model: PreTrainedModel, ids: list[list[int]]) -> list[Tensor]:
    """The truth: stock eager attention, one sequence at a time."""
    model.set_attn_implementation("eager")
    try:
        rows = [torch.tensor([sequence], device=model.device) for sequence in ids]
        return [model.base_model(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]
    finally:
        model.set_attn_implementation(attention.NAME)


def _one_step(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """(S, H) hidden states of the last tokens, decoded after a prefill of the others."""
    cache = SlotCache(num_layers(model), len(ids), max(map(len, ids)))
    prompts = pack([Example(prompt=[], response=sequence[:-1]) for sequence in ids], model.device)
    packed_pass(model, prompts, cache, list(range(len(ids))))
    last = torch.tensor([sequence[-1] for sequence in ids], device=model.device)
    return decode_pass(model, last, torch.tensor(prompts.lengths, device=model.device), max(map(len, ids)), cache)


def _check_logits(model: PreTrainedModel, ids: list[int], hidden: Tensor) -> None:
    """The head that the fused kernels compute must be the head of the architecture."""
    head = model.get_output_embeddings()
    if head is None:  # a reward model has none
        return
    logits = LogitTransform.of(model)(head(hidden))
    model.set_attn_implementation("eager")
    try:
        expected = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(attention.NAME)
    compare("the logits are not hidden @ weight.T with a scale and a softcap: they differ", logits, expected)


def compare(what: str, actual: Tensor, expected: Tensor) -> None:
    """Raise ValueError, saying `what`, where two tensors differ by more than the rounding of their precision."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    error = (actual.float() - expected.float()).abs().max().item()
    bound = tolerance * max(1.0, expected.float().abs().max().item())
    if not error <= bound:
        raise ValueError(f"{what} by {error:.1e} (at most {bound:.0e} is expected)")


class _CountedCalls:
    """Counts calls of our attention function while a pass runs."""

    def __enter__(self) -> _CountedCalls:
        self.count = 0
        AttentionInterface.register(attention.NAME, self._call)
        return self

    def _call(self, *args: object, **kwargs: object) -> object:
        self.count += 1
        return attention.attend(*args, **kwargs)  # type: ignore[arg-type]

    def __exit__(self, *exc: object) -> None:
        AttentionInterface.register(attention.NAME, attention.attend)
