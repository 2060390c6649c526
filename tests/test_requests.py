"""Requests of every kind, in any company and under any budget, against an oracle that answers one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import PAD, VOCABULARY, ids, model
from twinhead.engine import ppo
from twinhead.engine.batch import Example, Rollout, pack
from twinhead.engine.cache import SlotCache
from twinhead.engine.experience import deal
from twinhead.engine.generate import generate, stream
from twinhead.engine.optim import Optimizer
from twinhead.engine.options import SFT
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling, Stops, uniforms
from twinhead.kernels import sample

NEW = 10
PROMPTS = ids((3, 11, 1, 7, 2, 9, 5))


def policy(critic: str = "shared", **changes: Any) -> Policy:
    made = Policy(model(tie_word_embeddings=False, **changes), critic)
    if made.value_head is not None:
        torch.nn.init.normal_(made.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return made


LLAMA = policy()
TOKEN = LLAMA.bytes_per_token()


@dataclass
class Answer:
    """What the oracle says of one request."""

    response: list[int]
    logprobs: list[float]
    raw: list[float]
    values: list[float]
    finished: bool
    bootstrap: float


@torch.no_grad()
def answer(row: int, prompt: list[int], least: int, most: int, s: Sampling) -> Answer:
    """A full pass over the whole text for every token: no cache, no slots, no neighbours."""
    found = Answer([], [], [], [], False, 0.0)
    seed, place = (s.seed, row) if s.seeds is None else (s.seeds[row], 0)
    numbers = uniforms(torch.tensor(seed), torch.tensor([place]), most)[0]
    for i in range(most + 1):
        state = LLAMA.hidden(pack([Example(prompt + found.response, [])]))[-1:]
        value = LLAMA.values(state)
        assert value is not None
        if i == most:
            found.bootstrap = value.item() if s.bootstrap else 0.0
            break
        raw = LLAMA.logits(state)
        logits = raw.clone()
        if i < least and s.stop:
            logits[:, list(s.stop)] = float("-inf")
        filters = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
        token, logprob = sample(logits, numbers[i : i + 1], **filters, backend="torch")
        found.response.append(token.item())
        found.logprobs.append(logprob.item())
        found.raw.append(raw.log_softmax(-1)[0, token].item())
        found.values.append(value.item())
        ends = i >= least and any(tuple(found.response[-len(run) :]) == run for run in s.stop_sequences)
        if ends or found.response[-1] in (s.stop or ()):
            found.finished = True
            break
    return found


def same_as_alone(prompts: list[list[int]], s: Sampling, rollouts: list[Rollout]) -> None:
    for row, (rollout, (least, most)) in enumerate(zip(rollouts, s.limits(len(prompts)), strict=True)):
        expected = answer(row, prompts[row], least, most, s)
        assert rollout.prompt == prompts[row]
        assert (rollout.response, rollout.finished) == (expected.response, expected.finished)
        assert rollout.raw_logprobs is not None
        assert rollout.values is not None
        pairs = {
            "logprobs": (rollout.logprobs, expected.logprobs),
            "raw_logprobs": (rollout.raw_logprobs, expected.raw),
            "values": (rollout.values, expected.values),
            "bootstrap": (torch.tensor(rollout.bootstrap), expected.bootstrap),
        }
        for name, (ours, theirs) in pairs.items():
            torch.testing.assert_close(ours, torch.tensor(theirs), atol=2e-5, rtol=1e-5, msg=name)


words = st.integers(4, 12)  # few, so that stops are met
limits = st.tuples(st.integers(0, 4), st.integers(4, NEW))
requests = st.lists(st.tuples(st.lists(words, min_size=1, max_size=12), limits), min_size=1, max_size=7)


@st.composite
def samplings(draw: st.DrawFn, most: tuple[int, ...], least: tuple[int, ...]) -> Sampling:
    seeds = st.integers(0, 1000)
    return Sampling(
        max_new_tokens=most,
        min_new_tokens=draw(st.sampled_from([least, 0])),
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0])),
        top_k=draw(st.sampled_from([0, 0, 9])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.8])),
        seed=draw(seeds),
        seeds=draw(st.none() | st.tuples(*[seeds] * len(most))),
        stop=tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=12, unique=True))),
        stop_sequences=tuple(draw(st.lists(st.tuples(*[st.integers(0, VOCABULARY - 1)] * 1), max_size=6))),
        bootstrap=draw(st.booleans()),
        num_slots=draw(st.integers(1, 7)),
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_requests_are_answered_as_if_each_were_alone(data: st.DataObject) -> None:
    asked = data.draw(requests)
    prompts = [prompt for prompt, _ in asked]
    least, most = zip(*(limit for _, limit in asked), strict=True)
    s = data.draw(samplings(most=most, least=least))
    longest = max(len(prompt) + new for prompt, new in zip(prompts, most, strict=True))
    tokens = data.draw(st.none() | st.integers(longest, longest * len(prompts)), label="tokens of cache")
    s = replace(s, cache_bytes=None if tokens is None else tokens * TOKEN)
    same_as_alone(prompts, s, generate(LLAMA, prompts, s))


def test_requests_end_at_a_sequence_of_tokens() -> None:
    """Sequences of two and three that do occur, one that begins in the prompt and one that is longer than responses."""
    plain = Sampling(max_new_tokens=NEW, stop=(), seed=2)
    free = [r.response for r in generate(LLAMA, PROMPTS, plain)]
    runs = (tuple(free[1][3:5]), tuple(free[4][5:8]), (PROMPTS[0][-1], free[0][0]), tuple(free[5] + [5]))
    s = replace(plain, stop_sequences=runs, num_slots=3)
    rollouts = generate(LLAMA, PROMPTS, s)
    same_as_alone(PROMPTS, s, rollouts)
    assert [len(rollouts[i].response) for i in (1, 4)] == [5, 8]
    assert rollouts[0].response == free[0], "a run that begins in the prompt is none of the response's"
    assert [r.finished for r in rollouts] == [False, True, False, False, True, False, False]


def test_a_sequence_is_looked_for_among_the_rows_own_tokens() -> None:
    """Two rows of four tokens: the second has drawn one, and the first ends with what would complete the sequence."""
    stops = Stops((), ((8, 9), (7, 8, 9)), torch.device("cpu"))
    written = torch.tensor([5, 6, 7, 8, 9, 0, 0, 0])
    first, last = torch.tensor([0, 4]), torch.tensor([8, 9])
    for count, expected in (([4, 1], [False, False]), ([4, 2], [False, False])):
        assert stops(written, first, torch.tensor(count), last, torch.zeros(2)).tolist() == expected
    written[5] = 9
    written[4] = 8
    assert stops(written, first, torch.tensor([4, 2]), last, torch.zeros(2)).tolist() == [False, True]
    assert stops(written, first, torch.tensor([4, 2]), last, torch.tensor([0, 2])).tolist() == [False, False]


def test_what_is_drawn_after_the_limit_ends_nothing() -> None:
    """The token of the bootstrap step would have been a stop."""
    longer = Sampling(max_new_tokens=NEW + 1, stop=())
    after = tuple({r.response[-1] for r in generate(LLAMA, PROMPTS, longer)})
    s = replace(longer, max_new_tokens=NEW, stop=after, bootstrap=True)
    rollouts = generate(LLAMA, PROMPTS, s)
    same_as_alone(PROMPTS, s, rollouts)
    assert any(not r.finished and r.bootstrap for r in rollouts)


def test_a_minimum_of_new_tokens_is_that_of_transformers() -> None:
    stock = model(tie_word_embeddings=False)
    row = torch.tensor([PROMPTS[1]])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    free = stock.generate(row, **options, eos_token_id=None)[0, row.shape[1] :].tolist()
    stops = tuple(dict.fromkeys(free[:4]))
    expected = stock.generate(row, **options, min_new_tokens=3, eos_token_id=list(stops))[0, row.shape[1] :].tolist()
    s = Sampling(max_new_tokens=NEW, min_new_tokens=3, temperature=0, stop=stops)
    (rollout,) = generate(LLAMA, PROMPTS[1:2], s)
    assert rollout.response == expected != free
    assert len(expected) > 3


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """(slots, capacity, running rows) of the cache, as generation changes its shape."""
    shapes: list[tuple[int, int, int]] = []
    resize = SlotCache.resize

    def watched(self: SlotCache, num_slots: int, capacity: int, running: int, span: int) -> None:
        resize(self, num_slots, capacity, running, span)
        shapes.append((num_slots, capacity, running))

    monkeypatch.setattr(SlotCache, "resize", watched)
    return shapes


@pytest.mark.parametrize("tokens", [21, 30, 42, 63, 147])
def test_a_budget_changes_no_token(tokens: int, resized: list[tuple[int, int, int]]) -> None:
    """Half of what all rows need, and less: they wait, are put back, are read again."""
    unlimited = Sampling(max_new_tokens=NEW, stop=(10, 11, 12), seed=5)
    s = replace(unlimited, cache_bytes=tokens * TOKEN + TOKEN // 2)
    rollouts = generate(LLAMA, PROMPTS, s)
    same_as_alone(PROMPTS, s, rollouts)
    assert resized
    assert all(slots * capacity <= tokens for slots, capacity, _ in resized)
    if tokens == 42:
        assert len({capacity for _, capacity, _ in resized}) > 1, "short slots became long ones"


def test_rows_that_came_last_give_their_slots_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one length in a budget for half of them at full length: none is read more often than twice."""
    prompts, read = ids((8,) * 8), []
    prefill = LLAMA.prefill
    monkeypatch.setattr(LLAMA, "prefill", lambda packed, *o: read.extend(packed.lengths) or prefill(packed, *o))
    s = Sampling(max_new_tokens=24, stop=(), cache_bytes=4 * 32 * TOKEN)
    same_as_alone(prompts, s, generate(LLAMA, prompts, s))
    read.remove(1)  # bytes_per_token
    assert read[:8] == [8] * 8, "all begin side by side, in slots of half the length"
    assert read[8:] == [17] * 4, "then four wait, and go on from what they had drawn"
    first, second = stream(LLAMA, prompts, s)
    assert (sorted(first), sorted(second)) == ([0, 1, 2, 3], [4, 5, 6, 7])


def test_a_budget_below_the_longest_request_is_refused() -> None:
    message = rf"cache_bytes: expected at least {21 * TOKEN} bytes, for the longest request of 21 tokens, got 5000"
    with pytest.raises(ValueError, match=message):
        generate(LLAMA, PROMPTS, Sampling(max_new_tokens=NEW, cache_bytes=5000))


def test_rows_with_seeds_of_their_own_may_come_in_any_order() -> None:
    s = Sampling(max_new_tokens=NEW, stop=(10, 11, 12), seeds=tuple(range(7)), num_slots=3)
    rollouts = generate(LLAMA, PROMPTS, s)
    same_as_alone(PROMPTS, s, rollouts)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = generate(LLAMA, [PROMPTS[i] for i in order], replace(s, seeds=tuple(order), num_slots=7))
    assert [r.response for r in shuffled] == [rollouts[i].response for i in order]
    with pytest.raises(ValueError, match="seeds: expected one number, or one for each of 2 prompts, got 7"):
        generate(LLAMA, PROMPTS[:2], s)


def test_bytes_per_token_are_those_of_the_cache() -> None:
    config = LLAMA.model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert config.num_hidden_layers * 2 * heads * 4 == TOKEN


def learn(made: Policy) -> None:
    """One optimizer step on nothing in particular."""
    optimizer = Optimizer(made, SFT(model="", data="", learning_rate=1e-2), total_steps=1)
    made(pack([Example([5], [6, 7])])).logprobs.sum().backward()
    optimizer.step()


def test_an_optimizer_step_changes_the_version() -> None:
    made = policy()
    versions = [made.version]
    generate(made, PROMPTS, Sampling(max_new_tokens=2))
    assert made.version == versions[0], "generation changes nothing"
    learn(made)
    assert made.version > versions[0]


STREAMED = Sampling(max_new_tokens=NEW, stop=tuple(range(4, 14)), seed=1, num_slots=4)


def test_rows_that_are_stale_begin_anew() -> None:
    """After the first rollouts the weights change: all the others are what the new weights alone would have drawn."""
    made = policy()
    rollouts = stream(made, PROMPTS, STREAMED)
    first = next(rollouts)
    learn(made)
    rest = {row: rollout for finished in rollouts for row, rollout in finished.items()}
    expected = generate(made, PROMPTS, STREAMED)
    assert rest.keys() | first.keys() == set(range(len(PROMPTS)))
    for row, rollout in rest.items():
        assert rollout.response == expected[row].response
        assert rollout.staleness == 0


def test_staleness_is_counted_and_bounded() -> None:
    """Every row is longer than the one before, and the weights change whenever one has ended."""
    made, found = policy(), {}
    for finished in stream(made, PROMPTS[:5], Sampling(max_new_tokens=(2, 4, 6, 8, 10), stop=()), max_staleness=2):
        found |= finished
        learn(made)
    assert [found[row].staleness for row in range(5)] == [0, 1, 2, 0, 1], "at the third change two rows begin anew"


def test_rows_that_wait_grow_stale_too() -> None:
    """What a row had drawn before it gave its slot up goes with the weights that it was drawn under."""
    made, prompts = policy(), ids((8,) * 8)
    s = Sampling(max_new_tokens=24, stop=(), cache_bytes=4 * 32 * TOKEN)
    rollouts = stream(made, prompts, s)
    next(rollouts)
    learn(made)
    (rest,) = rollouts
    expected = generate(made, prompts, s)
    assert rest.keys() == {4, 5, 6, 7}
    assert all(rollout.response == expected[row].response for row, rollout in rest.items())


def test_a_stream_refuses_what_it_cannot_bound() -> None:
    made = policy()
    with pytest.raises(ValueError, match="max_staleness: expected at least 0, got -1"):
        next(stream(made, PROMPTS, STREAMED, max_staleness=-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": (5, 5)}, "max_new_tokens: expected one number, or one for each of 7 prompts, got 2"),
        ({"min_new_tokens": (1,) * 8}, "min_new_tokens: expected one number, or one for each of 7 prompts, got 8"),
        ({"min_new_tokens": 11}, "prompt 0: expected min_new_tokens of at most max_new_tokens 10, got 11"),
    ],
)
def test_limits_that_do_not_fit_the_prompts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(LLAMA, PROMPTS, Sampling(**{"max_new_tokens": NEW, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": (3, 0)}, r"max_new_tokens: expected at least 1, got \(3, 0\)"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected at least 0, got -1"),
        ({"stop_sequences": ((),)}, r"stop_sequences: expected at least one token in each, got \(\(\),\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_bootstrap_value_needs_a_critic() -> None:
    with pytest.raises(ValueError, match="bootstrap: expected a policy with a critic, got one without"):
        generate(policy(critic="none"), PROMPTS, Sampling(bootstrap=True))


def test_ppo_goes_on_at_the_value_of_what_was_cut() -> None:
    """At gamma and lambda 1 every return is the score, and after it the critic's value where a response was cut."""
    config = ppo.Config(
        model="", prompts="", steps=1, kl_coef=0.0, lam=1.0, minibatches=1, bootstrap_truncated=True,
        missing_eos_penalty=0.5,
    )  # fmt: skip
    s = Sampling(max_new_tokens=NEW, stop=tuple(range(4, 12)), bootstrap=True)
    rollouts = generate(LLAMA, PROMPTS, s)
    assert {r.finished for r in rollouts} == {True, False}
    scores = torch.arange(len(PROMPTS)).float()
    [[e]], _ = ppo.examine(LLAMA, LLAMA.frozen_copy(), rollouts, scores, 0.0, config, seed=0)
    (order,) = deal(rollouts, 1, config.tokens_per_micro, 0)[0]
    for row, returns in zip(order, e.returns.split(e.packed.cu_rows.diff().tolist()), strict=True):
        after = 0.0 if rollouts[row].finished else rollouts[row].bootstrap - 0.5
        torch.testing.assert_close(returns, torch.full_like(returns, row + after))
