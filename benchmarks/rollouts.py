"""How fast are rollouts: `twinhead.engine.generate` beside transformers' three ways to decode, on the same weights.

Everybody answers greedily first. A full pass of the stock model in float32, one sequence at a time and without a cache,
says of every token how far it is from the best one, and what our log-probs and values ought to be. What is timed is
sampling at temperature 1, which is what rollouts are, or greedy where the case says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks import race, shapes
from benchmarks.race import Entrant, Maker, Race, Wrong
from benchmarks.shapes import EOS, PAD, Shape
from twinhead.engine import Rollout, Sampling, generate

OURS, UNFILLED = race.OURS, f"{race.OURS}, no refill"
DYNAMIC, STATIC, CONTINUOUS = "HF dynamic", "HF static", "HF continuous"
PAGE = 256  # tokens per page of transformers' paged cache, its default
PATIENCE = 60.0  # seconds for the next answer
EOS_SCALE = 1.75  # a mean length near 36 where 128 is the most
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}  # nats
HALF_BILLION = Shape(151936, hidden=896, inner=4864, layers=24, heads=14, groups=2)  # Qwen2.5-0.5B
BILLION = Shape(128256, hidden=2048, inner=8192, layers=16, heads=32, groups=8)  # Llama-3.2-1B

Answers = Sequence[Rollout | list[int]]
Decoder = Callable[[float], Answers]  # temperature -> a response to every prompt


def main(device: str, quick: bool, results: Path, minutes: float | None = None) -> None:
    """Measure every case on `device` and write generate_DEVICE.json into `results`; raises SystemExit as race.run."""
    found = Race("generate", cases(torch.device(device), quick), (OURS, DYNAMIC, STATIC, CONTINUOUS), DYNAMIC)
    race.run(found, device, quick, results, minutes)


@dataclass(frozen=True)
class Decoding:
    """Prompts of one length, `new` tokens each; with fewer slots than prompts, responses end at EOS by themselves."""

    shape: Shape
    dtype: torch.dtype
    batch: int
    prompt: int = 32
    new: int = 128
    temperature: float = 1.0
    slots: int | None = None

    @property
    def ragged(self) -> bool:
        return self.slots is not None

    @property
    def title(self) -> str:
        work = f"{self.batch} requests in {self.slots} slots, ragged" if self.ragged else f"batch {self.batch}"
        return f"{self.shape.title}, {work}, {shapes.name(self.dtype)}, {'sampled' if self.temperature else 'greedy'}"

    @property
    def steps(self) -> int | None:
        return None if self.ragged else self.new

    @property
    def stop(self) -> tuple[int, ...]:
        return (EOS,) if self.ragged else ()

    @cached_property
    def prompts(self) -> list[list[int]]:
        return self.shape.sequences([self.prompt] * self.batch)

    def entrants(self, device: torch.device) -> Mapping[str, Maker]:
        model = self.shape.model(self.dtype, device, EOS_SCALE if self.ragged else 1.0)
        judge = Judge(self, model)
        makers: dict[str, Callable[[Decoding, PreTrainedModel], Decoder]] = {
            OURS: partial(ours, judge.value_head),
            **({UNFILLED: partial(unfilled, judge.value_head)} if self.ragged else {}),
            DYNAMIC: partial(stock, "dynamic"),
            STATIC: partial(stock, "static"),
            CONTINUOUS: Server,
        }
        return {name: partial(self._entrant, make, judge, model) for name, make in makers.items()}

    def _entrant(
        self, make: Callable[[Decoding, PreTrainedModel], Decoder], judge: Judge, model: PreTrainedModel
    ) -> Entrant:
        decode = make(self, copy.deepcopy(model))
        close = decode.close if isinstance(decode, Server) else None
        return Entrant(partial(decode, self.temperature), lambda: judge.figures(decode(0.0)), close)


def cases(device: torch.device, quick: bool) -> list[Decoding]:
    """Ragged lengths, sampling at two vocabularies and three batch sizes, greedy; on a GPU two real shapes first.

    Where time runs out, the last ones are not measured.
    """
    if quick:
        tiny, found = Shape(64, hidden=32, inner=48, layers=2, heads=4, groups=2), torch.float32
        return [
            Decoding(tiny, found, 3, prompt=5, new=6),
            Decoding(tiny, torch.bfloat16, 2, prompt=5, new=6, temperature=0.0),
            Decoding(tiny, found, 8, prompt=5, new=12, temperature=0.0, slots=4),
        ]
    small, large = Shape(1024), Shape(32000)
    real = [Decoding(shape, torch.bfloat16, 64) for shape in (HALF_BILLION, BILLION)] if device.type == "cuda" else []
    sampled = [
        Decoding(shape, dtype, batch)
        for shape in (large, small)
        for batch in (16, 64, 1)
        for dtype in shapes.dtypes(device)
    ]
    greedy = [Decoding(shape, torch.float32, 16, temperature=0.0) for shape in (large, small)]
    return [*real, Decoding(small, torch.float32, 256, temperature=0.0, slots=64), *sampled, *greedy]


def ours(value_head: torch.nn.Linear, case: Decoding, model: PreTrainedModel) -> Decoder:
    """Our generate(), which returns log-probs and values too."""
    policy = shapes.policy(model, "shared")
    policy.value_head = copy.deepcopy(value_head)

    def decode(temperature: float, prompts: list[list[int]] = case.prompts) -> list[Rollout]:
        slots = case.slots or len(prompts)
        settings = Sampling(max_new_tokens=case.new, temperature=temperature, stop=case.stop, num_slots=slots)
        return generate(policy, prompts, settings)

    return decode


def unfilled(value_head: torch.nn.Linear, case: Decoding, model: PreTrainedModel) -> Decoder:
    """Ours, one batch after the other: what refilling the slots saves."""
    decode: Any = ours(value_head, case, model)
    return lambda temperature: [rollout for some in _batches(case) for rollout in decode(temperature, some)]


def stock(cache: str, case: Decoding, model: PreTrainedModel) -> Callable[[float], list[list[int]]]:
    """`model.generate` with a dynamic or static cache, batch after batch, each as long as its longest row."""
    batches = [torch.tensor(some, device=model.device) for some in _batches(case)]

    def decode(temperature: float) -> list[list[int]]:
        settings = _settings(case, temperature, list(case.stop) or None)
        settings.cache_implementation = cache
        found: list[list[int]] = []
        for ids in batches:
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            found += [_until(case.stop, row) for row in answer[:, case.prompt :].tolist()]
        return found

    return decode


class Server:
    """transformers' continuous batching, with as many pages as its slots can need.

    Starting it (on a GPU: capturing graphs) and its end, which collects garbage, cost more than some of the cases, and
    are not timed. While others are it does not run: its loop polls for requests, which took 1 to 2 ms of each of their
    steps on two cores.
    """

    def __init__(self, case: Decoding, model: PreTrainedModel) -> None:
        self.case, self.model = case, model
        self.running = ExitStack()
        self.temperature: float | None = None

    def __call__(self, temperature: float) -> list[list[int]]:
        if temperature != self.temperature:
            self.close()
            self.manager, self.temperature = self.running.enter_context(self._started(temperature)), temperature
        requests = self.manager.add_requests(inputs=self.case.prompts, max_new_tokens=self.case.new)
        found: dict[str, list[int]] = {}
        while len(found) < len(requests):
            answer = self.manager.get_result(timeout=PATIENCE)
            if answer is None:
                raise RuntimeError(f"continuous batching gave no answer in {PATIENCE} seconds")
            if answer.error is not None:
                raise RuntimeError(answer.error)
            if answer.is_finished():
                found[answer.request_id] = list(answer.generated_tokens)
        return [found[request] for request in requests]

    def close(self) -> None:
        """End it and free its cache; the next call starts it again."""
        self.running.close()
        self.manager = self.temperature = None

    def _started(self, temperature: float) -> Any:
        case = self.case
        slots = case.slots or case.batch
        given = ContinuousBatchingConfig(
            num_blocks=slots * math.ceil((case.prompt + case.new) / PAGE) + 1,
            max_batch_tokens=max(PAGE, slots * case.prompt),
            max_requests_per_batch=slots,
        )
        return self.model.continuous_batching_context_manager(
            generation_config=_settings(case, temperature, EOS if case.ragged else -1), continuous_batching_config=given
        )


def _settings(case: Decoding, temperature: float, eos: int | list[int] | None) -> GenerationConfig:
    drawn: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=case.new, do_sample=temperature > 0, eos_token_id=eos, pad_token_id=PAD, **drawn
    )


def _batches(case: Decoding) -> list[list[list[int]]]:
    slots = case.slots or case.batch
    return [case.prompts[at : at + slots] for at in range(0, case.batch, slots)]


def _until(stop: Sequence[int], tokens: list[int]) -> list[int]:
    """A response up to its stop token; what follows is padding."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))]


@dataclass(frozen=True)
class Judgement:
    """A full pass over a prompt and its response: what each of the response's n tokens should have been given."""

    regret: Tensor  # (n,) nats: the best token's log-prob less the chosen one's; 0 where greedy was greedy
    logprobs: Tensor  # (n,)
    values: Tensor  # (n,)


class Judge:
    """The stock model in float32, one sequence at a time, without a cache; it remembers what it has seen."""

    def __init__(self, case: Decoding, model: PreTrainedModel) -> None:
        self.case = case
        self.model = copy.deepcopy(model).float()
        self.value_head = torch.nn.Linear(case.shape.hidden, 1).to(model.device)
        self.known: dict[tuple[int, ...], Judgement] = {}
        self.reference = stock("dynamic", case, model)(0.0)

    @torch.no_grad()
    def judge(self, prompt: list[int], response: list[int]) -> Judgement:
        """The judgement of one response."""
        key = (*prompt, *response)
        if key not in self.known:
            ids = torch.tensor([key], device=self.model.device)
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
            logprobs = self.model.lm_head(hidden).log_softmax(-1)
            chosen = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            regret = logprobs.max(-1).values - chosen
            self.known[key] = Judgement(regret, chosen, self.value_head(hidden).squeeze(-1))
        return self.known[key]

    def figures(self, answers: Answers) -> dict[str, float]:
        """Greedy answers: `tokens` in them, `equal`: the share that DynamicCache chose too, `error` in nats.

        error is the largest regret and the largest error of a log-prob or value that came with the answers. Raises
        Wrong for a response that is missing or ends where it should not, and for an error that rounding does not
        explain. Two tokens that nearly tie may be chosen either way: `equal` may be below 1.
        """
        responses = [answer.response if isinstance(answer, Rollout) else answer for answer in answers]
        if len(responses) != self.case.batch:
            raise Wrong(f"{len(responses)} responses to {self.case.batch} prompts")
        for response in responses:
            if _until(self.case.stop, response) != response or not self._complete(response):
                raise Wrong(f"a response of {len(response)} tokens that goes on after a stop token or ends without one")
        error = max(self._error(prompt, answer) for prompt, answer in zip(self.case.prompts, answers, strict=True))
        if not error <= TOLERANCES[self.case.dtype]:
            raise Wrong(f"error {error:.1e} nats, expected at most {TOLERANCES[self.case.dtype]:.0e}")
        tokens = sum(map(len, responses))
        pairs = zip(responses, self.reference, strict=True)
        equal = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=False))
        return {"tokens": tokens, "equal": equal / tokens, "error": error}

    def _complete(self, response: list[int]) -> bool:
        return len(response) == self.case.new or (0 < len(response) < self.case.new and response[-1] in self.case.stop)

    def _error(self, prompt: list[int], answer: Rollout | list[int]) -> float:
        if not isinstance(answer, Rollout):
            return float(self.judge(prompt, answer).regret.max())
        truth = self.judge(prompt, answer.response)
        assert answer.values is not None, "our policy has a critic here"
        gaps = (truth.regret, answer.logprobs - truth.logprobs, answer.values - truth.values)
        return max(float(gap.abs().nan_to_num(math.inf).max()) for gap in gaps)
