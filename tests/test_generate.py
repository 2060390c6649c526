"""Generation: transformers' greedy text, the trainer's log-probs and values, and rows that ignore their neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import ARCHITECTURES, MAX_LENGTH, PAD, VOCABULARY, ids, model
from twinhead.engine.batch import Example, Packed, Rollout, pack
from twinhead.engine.generate import generate, stream
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling, uniforms

PROMPTS = ids((3, 11, 1, 7, 2, 9, 5))
NEW = 12


def policy(architecture: str = "llama", critic: str = "shared", **changes: Any) -> Policy:
    """A policy whose head is its own matrix, so that greedy text varies, and whose critic has opinions."""
    made = Policy(model(architecture, tie_word_embeddings=False, **changes), critic)
    if made.value_head is not None:
        torch.nn.init.normal_(made.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        torch.nn.init.constant_(made.value_head.bias, 0.3)
    return made


@pytest.fixture(scope="module")
def llama() -> Policy:
    return policy()


def greedy_by_transformers(architecture: str) -> list[list[int]]:
    """One prompt at a time, without padding and without stop tokens."""
    stock = model(architecture, tie_word_embeddings=False, eos_token_id=None)
    rows = [torch.tensor([prompt]) for prompt in PROMPTS]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    return [stock.generate(row, **options)[0, row.shape[1] :].tolist() for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_that_of_transformers(architecture: str) -> None:
    expected = greedy_by_transformers(architecture)
    made = policy(architecture)
    greedy = Sampling(max_new_tokens=NEW, temperature=0, stop=())
    rollouts = generate(made, PROMPTS, greedy)
    assert [r.response for r in rollouts] == expected
    assert [r.prompt for r in rollouts] == PROMPTS

    stop = expected[0][4], expected[3][1]  # some rows stop early, these two for certain
    ends = [next((i for i, token in enumerate(row, 1) if token in stop), NEW) for row in expected]
    assert len(set(ends)) > 2, "refills are tested by rows of different lengths"
    rollouts = generate(made, PROMPTS, replace(greedy, stop=stop, num_slots=3))
    assert [r.response for r in rollouts] == [row[:end] for row, end in zip(expected, ends, strict=True)]
    assert [r.finished for r in rollouts] == [r.response[-1] in stop for r in rollouts]


def test_greedy_text_stops_where_that_of_transformers_does() -> None:
    eos = greedy_by_transformers("llama")[1][3]
    stock, made = (model(eos_token_id=[eos, VOCABULARY - 1]) for _ in range(2))
    row = torch.tensor([PROMPTS[1]])
    expected = stock.generate(row, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)[0, row.shape[1] :].tolist()
    assert expected[-1] in (eos, VOCABULARY - 1)
    assert len(expected) < NEW
    (rollout,) = generate(Policy(made), PROMPTS[1:2], Sampling(max_new_tokens=NEW, temperature=0))
    assert rollout.response == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_generation_is_scoring(architecture: str, temperature: float) -> None:
    made = policy(architecture)
    sampling = Sampling(max_new_tokens=NEW, temperature=temperature, stop=tuple(range(10, 16)), num_slots=3)
    rollouts = generate(made, PROMPTS, sampling)
    assert len({len(r.response) for r in rollouts}) > 1
    scored = made(pack(rollouts), temperature=temperature)
    torch.testing.assert_close(torch.cat([r.logprobs for r in rollouts]), scored.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([r.values for r in rollouts]), scored.values, atol=1e-5, rtol=1e-5)
    assert scored.values.abs().max() > 0.1
    for r in rollouts:
        assert r.logprobs.shape == r.values.shape == (len(r.response),)
        assert r.logprobs.dtype == r.values.dtype == torch.float32


def test_greedy_logprobs_are_those_of_the_untempered_distribution(llama: Policy) -> None:
    rollouts = generate(llama, PROMPTS, Sampling(max_new_tokens=NEW, temperature=0))
    scored = llama(pack(rollouts))
    torch.testing.assert_close(torch.cat([r.logprobs for r in rollouts]), scored.logprobs, atol=1e-5, rtol=1e-5)


def test_filtered_logprobs_are_those_of_the_filtered_distribution(llama: Policy) -> None:
    rollouts = generate(llama, PROMPTS, Sampling(max_new_tokens=NEW, temperature=1.5, top_k=4, stop=()))
    packed = pack(rollouts)
    with torch.no_grad():
        logits = llama.logits(llama.hidden(packed)[packed.rows]) / 1.5
    kept, words = logits.topk(4)
    at = (words == packed.targets[:, None]).nonzero()
    assert at[:, 0].tolist() == list(range(packed.num_targets)), "every token is among the four likeliest"
    expected = kept.log_softmax(-1).gather(1, at[:, 1:]).squeeze(1)
    torch.testing.assert_close(torch.cat([r.logprobs for r in rollouts]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("filters", [{"top_p": 0.3}, {"min_p": 0.5}, {"top_k": 1}], ids=str)
def test_filters_reach_the_sampler(llama: Policy, filters: dict[str, float]) -> None:
    sampling = Sampling(max_new_tokens=NEW, temperature=3.0, stop=())
    free, filtered = generate(llama, PROMPTS, sampling), generate(llama, PROMPTS, replace(sampling, **filters))
    words = [len({token for r in rollouts for token in r.response}) for rollouts in (free, filtered)]
    assert words[1] < words[0]


def same_text(some: list[Rollout], others: list[Rollout]) -> None:
    """The same tokens exactly; their log-probs and values as nearly as different products allow."""
    assert [r.response for r in some] == [r.response for r in others]
    assert [r.finished for r in some] == [r.finished for r in others]
    for name in ("logprobs", "values"):
        ours, theirs = (torch.cat([getattr(r, name) for r in rollouts]) for rollouts in (some, others))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


SAMPLED = Sampling(max_new_tokens=NEW, stop=(10, 11, 12, 13), seed=5)


@pytest.fixture(scope="module")
def sampled(llama: Policy) -> list[Rollout]:
    rollouts = generate(llama, PROMPTS, SAMPLED)
    assert len({len(r.response) for r in rollouts}) > 1, "refills need rows of different lengths"
    return rollouts


@pytest.mark.parametrize("num_slots", [1, 2, 3, 6, 7])
def test_the_number_of_slots_changes_no_token(llama: Policy, sampled: list[Rollout], num_slots: int) -> None:
    same_text(generate(llama, PROMPTS, replace(SAMPLED, num_slots=num_slots)), sampled)


def test_a_row_does_not_depend_on_its_neighbours(llama: Policy, sampled: list[Rollout]) -> None:
    same_text(generate(llama, PROMPTS[:3], SAMPLED), sampled[:3])
    others = ids((8, 4, 10, 3, 6), seed=1)
    mixed = [others[0], PROMPTS[1], *others[1:], PROMPTS[6]]
    rollouts = generate(llama, mixed, replace(SAMPLED, num_slots=2))
    same_text([rollouts[1], rollouts[6]], [sampled[1], sampled[6]])


def test_a_row_is_known_by_its_index(llama: Policy) -> None:
    repeated = generate(llama, [PROMPTS[1]] * 8, replace(SAMPLED, stop=()))
    assert len({tuple(r.response) for r in repeated}) == 8


def test_a_longer_limit_continues_the_same_text(llama: Policy, sampled: list[Rollout]) -> None:
    shorter = generate(llama, PROMPTS, replace(SAMPLED, max_new_tokens=5))
    assert [r.response for r in shorter] == [r.response[:5] for r in sampled]


def test_the_seed_decides(llama: Policy, sampled: list[Rollout]) -> None:
    assert [r.response for r in generate(llama, PROMPTS, SAMPLED)] == [r.response for r in sampled]
    reseeded = generate(llama, PROMPTS, replace(SAMPLED, seed=6))
    assert all(a.response != b.response for a, b in zip(reseeded, sampled, strict=True))
    greedy = [generate(llama, PROMPTS, replace(SAMPLED, temperature=0, seed=seed)) for seed in (1, 2)]
    same_text(*greedy)


def test_tokens_follow_the_distribution(llama: Policy) -> None:
    prompt, n = PROMPTS[1], 4000
    rollouts = generate(llama, [prompt] * n, Sampling(max_new_tokens=1, temperature=0.8, num_slots=n))
    with torch.no_grad():
        expected = (llama.logits(llama.hidden(pack([Example(prompt, [])]))[-1:])[0] / 0.8).softmax(-1)
    found = torch.bincount(torch.tensor([r.response[0] for r in rollouts]), minlength=VOCABULARY) / n
    deviations = (found - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviations[expected * n > 5].abs().max() < 4
    assert 0.5 * (found - expected).abs().sum() < 0.05


def test_responses_end_with_the_stop_token_or_at_the_limit(sampled: list[Rollout]) -> None:
    for r in sampled:
        assert not set(r.response[:-1]) & set(SAMPLED.stop)
        assert r.finished == (r.response[-1] in SAMPLED.stop)
        assert r.finished or len(r.response) == NEW
    assert {r.finished for r in sampled} == {True, False}


def test_the_checkpoint_names_the_stop_tokens_unless_told_otherwise() -> None:
    made = policy(eos_token_id=[10, 11, 12, 13])
    by_default = generate(made, PROMPTS, replace(SAMPLED, stop=None))
    assert [r.response for r in by_default] == [r.response for r in generate(made, PROMPTS, SAMPLED)]
    assert any(r.finished for r in by_default)
    unstoppable = generate(made, PROMPTS, replace(SAMPLED, stop=()))
    assert {len(r.response) for r in unstoppable} == {NEW}
    assert not any(r.finished for r in unstoppable)


def test_a_response_may_be_a_single_stop_token(llama: Policy) -> None:
    stop = tuple(range(VOCABULARY))
    rollouts = generate(llama, PROMPTS, Sampling(max_new_tokens=NEW, stop=stop, num_slots=2))
    assert [(len(r.response), r.finished) for r in rollouts] == [(1, True)] * len(PROMPTS)


def test_without_a_critic_there_are_no_values(llama: Policy, sampled: list[Rollout]) -> None:
    rollouts = generate(policy(critic="none"), PROMPTS, SAMPLED)
    assert [r.values for r in rollouts] == [None] * len(PROMPTS)
    assert [r.response for r in rollouts] == [r.response for r in sampled]


def test_on_finished_hears_how_many_rows_are_done(llama: Policy) -> None:
    heard: list[int] = []
    generate(llama, PROMPTS, replace(SAMPLED, num_slots=2), on_finished=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == len(PROMPTS)
    assert len(set(heard)) > 2
    assert max(b - a for a, b in zip([0, *heard[:-1]], heard, strict=True)) <= 2


def test_no_prompts_give_no_rollouts(llama: Policy) -> None:
    assert generate(llama, []) == []


def test_generation_leaves_the_policy_as_it_was(llama: Policy) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    llama.train()
    rollouts = generate(llama, PROMPTS, SAMPLED)
    assert llama.training
    assert llama.model.training
    assert not any(r.logprobs.requires_grad or r.values.requires_grad for r in rollouts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], []], "prompt 1: expected at least one token, got none"),
        ([[5, VOCABULARY]], rf"sequence 0: expected token ids in \[0, {VOCABULARY}\).* got 5..{VOCABULARY}"),
        ([[-1, 4]], rf"sequence 0: expected token ids in \[0, {VOCABULARY}\).* got -1..4"),
        (
            [[5], [5] * (MAX_LENGTH - NEW + 1)],
            f"sequence 1: expected at most the model's {MAX_LENGTH} tokens, got 85 and {NEW} new ones",
        ),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(llama: Policy, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llama, prompts, SAMPLED)


def test_a_prompt_may_fill_the_model_to_its_last_position(llama: Policy) -> None:
    longest = [5] * (MAX_LENGTH - NEW)
    assert len(generate(llama, [longest], replace(SAMPLED, stop=()))[0].response) == NEW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -0.1}, "temperature: expected at least 0"),
        ({"top_k": -1}, "top_k: expected at least 0"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected above 0 and at most 1, got 1.1"),
        ({"min_p": 1.0}, "min_p: expected at least 0 and below 1, got 1.0"),
        ({"min_p": -0.1}, "min_p: expected at least 0 and below 1"),
        ({"num_slots": 0}, "num_slots: expected at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature: expected at least 0"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def split_mix(x: int) -> int:
    """SplitMix64 of one number, in Python's unbounded integers."""
    x = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def numbers(seed: int, rows: Tensor, num: int) -> Tensor:
    return uniforms(torch.tensor(seed), rows, num)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**62])
def test_uniforms_are_a_hash_of_seed_row_and_position(seed: int) -> None:
    rows = [0, 1, 7, 100_000]
    found = numbers(seed, torch.tensor(rows), 5)
    key = split_mix(seed)
    expected = [[(split_mix(split_mix(key + row) + at) >> 40) / 2**24 for at in range(5)] for row in rows]
    assert found.tolist() == expected
    assert found.dtype == torch.float32


def test_uniforms_do_not_depend_on_who_else_asks() -> None:
    whole = numbers(3, torch.arange(10), 20)
    assert torch.equal(numbers(3, torch.tensor([7, 2]), 20), whole[[7, 2]])
    assert torch.equal(numbers(3, torch.arange(10), 5), whole[:, :5])
    assert (numbers(4, torch.arange(10), 20) != whole).all()


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_uniforms_are_uniform_and_independent() -> None:
    u = numbers(0, torch.arange(512), 512)
    assert u.min() >= 0
    assert u.max() < 1
    bins = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi_squared = ((bins - expected) ** 2 / expected).sum().item()
    assert 30 < chi_squared < 110  # 63 degrees of freedom: mean 63, standard deviation 11
    half = torch.histc(u[:, 0], 8, 0, 1)  # of first tokens alone too, which every row draws
    assert ((half - 64) ** 2 / 64).sum().item() < 25
    noise = 4 / u.numel() ** 0.5
    next_row, next_position, next_seed = (
        (u[:-1], u[1:]),
        (u[:, :-1], u[:, 1:]),
        (u, numbers(1, torch.arange(512), 512)),
    )
    for a, b in (next_row, next_position, next_seed):
        assert abs(correlation(a, b)) < noise
    assert len(u.unique()) > 0.98 * u.numel()


@pytest.mark.parametrize("num_slots", [16, 5])
def test_equal_prompts_are_read_once(llama: Policy, num_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one prompt have its keys in common, and are what they are alone."""
    prompts = [PROMPTS[i] for i in (1, 0, 1, 1, 3, 0, 1)]
    read: list[int] = []
    prefill = llama.prefill

    def counted(packed: Packed, *others: Any) -> Tensor:
        read.extend(packed.lengths)
        return prefill(packed, *others)

    monkeypatch.setattr(llama, "prefill", counted)
    sampling = Sampling(max_new_tokens=NEW, num_slots=num_slots, seed=3, stop=(5, 6, 7, 8, 9, 10))
    rollouts = generate(llama, prompts, sampling)
    if num_slots == 16:
        assert read == [len(PROMPTS[i]) for i in (1, 0, 3)]
    alone = generate(llama, prompts, replace(sampling, num_slots=1))
    assert [r.response for r in rollouts] == [r.response for r in alone]
    assert len({tuple(r.response) for r in rollouts}) == len(prompts), "every sample has its own numbers"
    for together, single in zip(rollouts, alone, strict=True):
        torch.testing.assert_close(together.logprobs, single.logprobs, rtol=0, atol=1e-5)


def test_a_stream_yields_rollouts_as_they_finish(llama: Policy) -> None:
    sampling = replace(SAMPLED, num_slots=3)
    expected, found = generate(llama, PROMPTS, sampling), {}
    llama.train()
    for finished in stream(llama, PROMPTS, sampling):
        assert finished and not found.keys() & finished.keys()
        assert llama.training and llama.model.training and torch.is_grad_enabled()
        found |= finished
    assert [found[i].response for i in range(len(PROMPTS))] == [r.response for r in expected]
    order = [len(found[i].response) for i in found]
    assert order != [len(r.response) for r in expected], "short ones come before long ones"


def test_generating_gives_every_mode_back(llama: Policy) -> None:
    def interrupted() -> None:
        assert not llama.training and not llama.model.training and not torch.is_grad_enabled()
        raise KeyError

    for outer, inner in ((True, False), (False, True), (True, True), (False, False)):
        llama.train(outer)
        llama.model.train(inner)
        with pytest.raises(KeyError), llama.generating():
            interrupted()
        assert (llama.training, llama.model.training) == (outer, inner) and torch.is_grad_enabled()
