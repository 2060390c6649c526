"""Two heads on one backbone: the policy (language-model head, value head) and the reward model (scalar head)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from twinhead.engine import critic as critics
from twinhead.engine import lora as adapters
from twinhead.engine import trunk, weights
from twinhead.engine.batch import Example, Packed, pack
from twinhead.engine.cache import SlotCache
from twinhead.engine.critic import Branch, Separate
from twinhead.engine.graphs import Workspace
from twinhead.engine.lora import Lora
from twinhead.engine.rollout_options import CRITICS
from twinhead.kernels import linear_logprob
from twinhead.kernels.product import linear

REWARD_SPREAD = "twinhead_reward_spread"  # a key of config.json, beside weights.REWARD_NORMALISATION


@dataclass(frozen=True, slots=True)
class Scored:
    """What one pass says of every target token."""

    logprobs: Tensor  # (R,) float32
    entropy: Tensor | None  # (R,) float32, of the whole distribution; None when it was not asked for
    values: Tensor | None  # (R,) float32, of the state before the token; None without a critic on these states


class Policy(nn.Module):
    """A causal language model whose hidden states also feed a critic.

    critic: "shared" (the value loss trains the trunk too), "detached" (it does not reach the trunk), "branch" (its own
    copies of the top `branch_layers` layers), "separate" (a second network) or "none". Branch and separate critics are
    `network`, which appraise() asks: decoding and scoring know no values then.
    """

    def __init__(
        self, model: PreTrainedModel, critic: str = "shared", branch_layers: int = 2, network: Separate | None = None
    ) -> None:
        super().__init__()
        if critic not in CRITICS:
            raise ValueError(f"critic: expected one of {CRITICS}, got {critic!r}")
        trunk.adopt(model)
        self.model = model
        self.critic = critic
        self.logit_transform = trunk.LogitTransform.of(model)
        self.kept: Workspace | None = None  # of generation, between two calls that asked for it
        self.value_head: nn.Linear | None = None
        self.network: Branch | Separate | None = network
        if (critic == "separate") != (network is not None):
            raise ValueError(f"critic: expected a network beside the policy if it is separate alone, got {critic!r}")
        if critic == "branch":
            self.network = Branch(model, branch_layers)
            self.network.self_check(model)
        elif critic in ("shared", "detached"):
            self.value_head = critics.value_head(self.head.weight.shape[1], model.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        critic: str = "shared",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        lora: Lora | None = None,
        resume_from: str | Path | None = None,
        *,
        branch_layers: int = 2,
        critic_model: str | Path = "",
    ) -> Policy:
        """A checkpoint folder, or a model in memory (which is adopted as it is), plus the critic found beside it.

        dtype: float32 unless given. lora: freeze the weights and put adapters onto them. resume_from: a checkpoint of
        the same training, from which comes what has been learned: all of it, or beside `lora` adapters and critic.
        critic_model: the trunk of a new separate critic, for a folder `model` itself if empty. Raises ValueError for a
        folder that is no causal language model, for missing or left-over tensors, for an architecture that fails the
        self-check, and for adapters of another base.
        """
        if resume_from is not None and lora is None:
            model = resume_from
        beside = resume_from or model
        found = None if isinstance(beside, PreTrainedModel) else critics.found(beside, critic)
        network = None
        if critic == "separate":
            source = found or critic_model or model
            if isinstance(source, PreTrainedModel):
                raise ValueError("critic_model: expected a checkpoint beside a policy in memory, got none")
            network = Separate.from_pretrained(source, dtype)
        if isinstance(model, PreTrainedModel):
            policy = cls(model if dtype is None else model.to(dtype), critic, branch_layers, network)
        else:
            policy = cls(weights.load_causal_lm(model, dtype), critic, branch_layers, network)
        if lora is not None:
            adapters.start(policy.model, lora, resume_from)
        if found is not None and isinstance(policy.network, Branch):
            policy.network.load(found)
        head = weights.load_head(found.parent) if found is not None else None
        if policy.value_head is not None and head is not None:
            if head["weight"].shape != policy.value_head.weight.shape:
                ours, theirs = policy.value_head.weight.shape[1], head["weight"].shape[1]
                raise ValueError(f"{str(model)!r}: expected a value head of the model's width {ours}, got {theirs}")
            policy.value_head.load_state_dict(head)
        return policy if device is None else policy.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what AutoModelForCausalLM reads; the critic lies beside it in safetensors, adapters in a folder."""
        if adapters.attached(self.model):
            adapters.save(self.model, Path(folder), "CAUSAL_LM")
        else:
            self.model.save_pretrained(folder)
        if self.network is not None:
            self.network.save(Path(folder))
        if self.value_head is not None:
            weights.save_head(folder, self.value_head.state_dict())

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The stop tokens that the checkpoint names (generation_config first, then config)."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        found = self.model.config.eos_token_id if found is None else found
        return () if found is None else tuple(found) if isinstance(found, list | tuple) else (found,)

    def hidden(self, packed: Packed) -> Tensor:
        """(T, H): the one trunk pass under everything."""
        if isinstance(self.network, Branch):
            with self.network.listening(self.model, packed):
                return trunk.packed_pass(self.model, packed)
        return trunk.packed_pass(self.model, packed)

    def forward(self, packed: Packed, *, temperature: float = 1.0, entropy: bool = True) -> Scored:
        """The one scoring path: log-probability, entropy and value at each of the R rows that predict a target."""
        return self.score(self.hidden(packed)[packed.rows], packed, temperature=temperature, entropy=entropy)

    def score(self, rows: Tensor, packed: Packed, *, temperature: float = 1.0, entropy: bool = True) -> Scored:
        """The same from the states (R, H) of these rows."""
        scored: Any = linear_logprob(
            targets=packed.targets, temperature=temperature, return_entropy=entropy, **self.vocabulary(rows)
        )
        logprobs, entropies = scored if entropy else (scored, None)
        return Scored(logprobs, entropies, self.values(rows))

    def vocabulary(self, rows: Tensor) -> dict[str, Any]:
        """What the fused kernels must know to read states (R, H) by the language-model head, as keyword arguments.

        An adapter of the head makes both wider by its rank: W h + B A h is [W, B] [h, A h], where no small step is lost
        as it would be in W + B A rounded to half precision.
        """
        head, transform = self.head, self.logit_transform
        weight, bias = head.weight, getattr(head, "bias", None)
        if getattr(self.model, trunk.MIXED, False):  # as the sampler sees them
            weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        if (low := self.low_rank(rows)) is not None:
            rows, weight = torch.cat([rows, low[0]], dim=1), torch.cat([weight, low[1].to(weight.dtype)], dim=1)
        return {
            "hidden": rows,
            "weight": weight,
            "bias": bias,
            "softcap": transform.softcap,
            "logit_scale": transform.scale,
        }

    def values(self, rows: Tensor) -> Tensor | None:
        """(N, H) -> (N,) float32, or None without a critic."""
        if self.value_head is None:
            return None
        rows = rows.detach() if self.critic == "detached" else rows
        with trunk.exactly(self.model):
            return self.value_head(rows.float()).squeeze(-1)

    def appraise(self, packed: Packed) -> Tensor:
        """(T,) float32: the critic's value of the state after every token; after a response's last one GAE bootstraps.

        A branch goes on from the pass that hidden() has just made of the same `packed`, if it has.
        """
        if isinstance(self.network, Branch) and not self.network.knows(self.model, packed):
            self.hidden(packed)
        values = self.values(self.hidden(packed)) if self.network is None else self.network(packed)
        assert values is not None, "a policy without a critic has no values"
        return values

    @torch.no_grad()
    def value_from(self, reward_model: RewardModel | None) -> None:
        """Start the value head as the normalised reward head. Raises ValueError where their widths differ."""
        ours = self.value_head if self.network is None else self.network.value_head
        if reward_model is None or ours is None:
            raise ValueError("value_init: expected a reward_model to take the value head from, got none")
        head = reward_model.head.weight
        if head.shape != ours.weight.shape:
            widths = f"{ours.weight.shape[1]}, got {head.shape[1]}"
            raise ValueError(f"value_init: expected a reward model of the policy's width {widths}")
        ours.weight.copy_(head)
        ours.bias.fill_(-reward_model.mean)

    def draw_values(self, seed: int) -> None:
        """Start the value head as a new reward model's, with standard deviation 1/sqrt(H+1)."""
        head = self.value_head if self.network is None else self.network.value_head
        assert head is not None, "a policy without a critic has no value head"
        draw(head.weight, seed)

    def logits(self, rows: Tensor) -> Tensor:
        """(B, H) -> (B, V), for the sampler alone: training never builds them."""
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        low = self.low_rank(rows)
        if weight.is_cuda and weight.dtype == rows.dtype and weight.itemsize == 2:  # the trainer does not round either
            logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
            logits = logits if low is None else logits + torch.mm(low[0], low[1].t(), out_dtype=torch.float32)
            return self.logit_transform(logits if bias is None else logits + bias)
        with trunk.precision(self.model):
            logits = linear(rows, weight, bias)
            return self.logit_transform(logits if low is None else logits + F.linear(*low))

    def prefill(self, packed: Packed, cache: SlotCache, slots: list[int]) -> Tensor:
        """(S, H): run prompts into cache slots; the hidden state of each one's last token."""
        return trunk.packed_pass(self.model, packed, cache, slots)[packed.last]

    def decode(self, tokens: Tensor, positions: Tensor, span: int, cache: SlotCache, even: bool = False) -> Tensor:
        """(B, H): one new token in each running slot. `even`: all slots are as long as the longest, `span`."""
        return trunk.decode_pass(self.model, tokens, positions, span, cache, even)

    def new_cache(self, num_slots: int, capacity: int) -> SlotCache:
        return SlotCache(trunk.num_layers(self.model), num_slots, capacity)

    @torch.no_grad()
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the cache: measured, as every architecture has its own keys and values."""
        cache = self.new_cache(num_slots=1, capacity=1)
        self.prefill(pack([Example([0], [])], self.device), cache, [0])
        return cache.nbytes

    @property
    def version(self) -> int:
        """A number that grows whenever a weight is changed in place, as our optimizer does.

        torch's fused optimizers keep it from autograd: beside one, call torch.autograd.graph.increment_version.
        """
        return trunk.version(self)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Evaluation mode without gradients; the modes of before are restored on exit, also after an exception."""
        modes = self.training, self.model.training
        if any(modes):  # to change it takes a walk over all modules
            self.eval()
        try:
            with torch.no_grad(), trunk.precision(self.model):
                yield
        finally:
            if any(modes):
                self.train(modes[0])
                self.model.train(modes[1])

    def state(self) -> dict[str, Tensor]:
        """The tensors that log-probs depend on, by name."""
        return self.model.state_dict()

    def frozen_copy(self) -> Policy:
        """The reference policy: the same weights as of now, without a critic, never trained. Frozen ones are shared."""
        reference = Policy.__new__(Policy)
        nn.Module.__init__(reference)
        still: dict[int, Any] = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        reference.model = copy.deepcopy(self.model, still).requires_grad_(False).eval()
        reference.critic, reference.value_head, reference.kept, reference.network = "none", None, None, None
        reference.logit_transform = self.logit_transform
        return reference

    def low_rank(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """What an adapter of the head makes of states (N, H): (N, rank), and (V, rank) that it then goes through."""
        return adapters.through(self.head, rows)

    @property
    def head(self) -> nn.Linear:
        """The language-model head, whose matrix is (V, H)."""
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has output embeddings"
        return head


@torch.no_grad()
def draw(head: Tensor, seed: int) -> None:
    """Fill a head (1, H) from N(0, 1/(H+1))."""
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
    head.copy_(noise / (head.shape[1] + 1) ** 0.5)


class RewardModel(nn.Module):
    """The same kind of trunk under one scalar head, read at each sequence's last real token.

    Calling it gives normalised scores: raw score minus `mean`, the mean raw score of the demonstrations, so that
    they average 0 (InstructGPT, section 3.5). `raw` is what AutoModelForSequenceClassification computes. `spread` is by
    how much answers to one prompt differ: rankings fix no scale, so members of an ensemble are divided by theirs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        trunk.adopt(model)
        self.model = model
        self.mean, self.spread = normalisation(model.config)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> RewardModel:
        """A trained reward model. Raises ValueError for any other checkpoint."""
        reward = cls(weights.load_classifier(path, dtype))
        return reward if device is None else reward.to(device)

    @classmethod
    def from_language_model(
        cls,
        path: str | Path,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        lora: Lora | None = None,
        resume_from: str | Path | None = None,
    ) -> RewardModel:
        """A language model's whole trunk under a new head, drawn with standard deviation 1/sqrt(H+1).

        With `lora` the trunk is frozen under adapters, and the head float32. resume_from: a checkpoint of the same
        training with adapters, from which they, the head and the normalisation come.
        """
        reward = cls(weights.load_classifier(path, dtype, new_head=True))
        draw(reward.head.weight, seed)
        if lora is not None:
            reward._adapt(lora, resume_from)
        return reward if device is None else reward.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what AutoModelForSequenceClassification reads; the normalisation is two keys of its config.json."""
        setattr(self.model.config, weights.REWARD_NORMALISATION, self.mean)
        setattr(self.model.config, REWARD_SPREAD, self.spread)
        if adapters.attached(self.model):
            adapters.save(self.model, Path(folder), "SEQ_CLS", heads=("score",))
        else:
            self.model.save_pretrained(folder)

    @torch.no_grad()
    def _adapt(self, lora: Lora, resume_from: str | Path | None) -> None:
        heads = adapters.start(self.model, lora, resume_from)
        self.head.float().requires_grad_(True)
        if resume_from is not None:
            self.head.weight.copy_(heads["score.weight"])
            self.mean, self.spread = normalisation(AutoConfig.from_pretrained(resume_from))

    @property
    def head(self) -> nn.Linear:
        """(H) -> (1), without a bias."""
        return self.model.score

    @property
    def device(self) -> torch.device:
        return self.model.device

    def raw(self, packed: Packed) -> Tensor:
        """(S,) float32 scores before normalisation; the product with the head is taken in float32 (spec 3.2)."""
        last = trunk.packed_pass(self.model, packed)[packed.last]
        return F.linear(last.float(), self.head.weight.float()).squeeze(-1)

    def forward(self, packed: Packed) -> Tensor:
        """(S,) float32 normalised scores."""
        return self.raw(packed) - self.mean


def normalisation(config: PreTrainedConfig) -> tuple[float, float]:
    """The mean and the spread that a reward model keeps in its config.json."""
    return float(getattr(config, weights.REWARD_NORMALISATION, 0.0)), float(getattr(config, REWARD_SPREAD, 1.0))
