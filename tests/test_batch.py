"""pack() shifts by one exactly once, segments are summed right, and micro-batches keep their order and budget."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinhead.engine.batch import Example, Rollout, cumulative, micro_batches, pack, segment_ids, segment_sum

TOKEN = st.integers(0, 99)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    prompt, response = draw(st.lists(TOKEN, max_size=4)), draw(st.lists(TOKEN, max_size=4))
    if not prompt and not response:
        prompt = [draw(TOKEN)]
    marks = st.lists(st.booleans(), min_size=len(response), max_size=len(response))
    return Example(prompt, response, draw(st.none() | marks))


def test_a_target_is_predicted_by_the_token_before_it() -> None:
    packed = pack([Example([5, 6], [7, 8, 9]), Example([4], [3])])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 5, 7]
    assert packed.rows.tolist() == [1, 2, 3, 5]
    assert packed.targets.tolist() == [7, 8, 9, 3]
    assert packed.cu_rows.tolist() == [0, 3, 4]
    assert packed.lengths == (5, 2)
    assert packed.last.tolist() == [4, 6]
    assert (packed.num_targets, packed.num_sequences) == (4, 2)
    whole = (packed.tokens, packed.positions, packed.rows, packed.targets, packed.last)
    assert {x.dtype for x in whole} == {torch.int64}
    assert packed.cu_seqlens.dtype == packed.cu_rows.dtype == torch.int32


def test_learn_marks_make_holes_in_the_targets_but_not_in_the_context() -> None:
    packed = pack([Example([5], [6, 7, 8, 9], [True, False, False, True]), Example([4], [3, 2], [False, False])])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 4, 3, 2]
    assert packed.rows.tolist() == [0, 3]
    assert packed.targets.tolist() == [6, 9]
    assert packed.cu_rows.tolist() == [0, 2, 2]


def test_the_first_token_of_a_sequence_is_never_a_target() -> None:
    packed = pack(
        [Example([1], [2]), Example([], [5, 6, 7]), Example([], [8]), Example([], [5, 6, 7], [True, True, False])]
    )
    assert packed.rows.tolist() == [0, 2, 3, 6]
    assert packed.targets.tolist() == [2, 6, 7, 6]
    assert packed.cu_rows.tolist() == [0, 1, 3, 3, 4]


def test_an_empty_response_has_tokens_and_no_targets() -> None:
    packed = pack([Example([1, 2], []), Example([3], [4]), Example([5], [])])
    assert packed.cu_seqlens.tolist() == [0, 2, 4, 5]
    assert packed.cu_rows.tolist() == [0, 0, 1, 1]
    assert packed.last.tolist() == [1, 3, 4]


def test_a_batch_may_have_no_targets_and_even_no_sequences() -> None:
    without_targets, without_anything = pack([Example([1, 2], [])]), pack([])
    for packed in (without_targets, without_anything):
        assert packed.rows.shape == packed.targets.shape == (0,)
        assert packed.targets.dtype == packed.rows.dtype == torch.int64
    assert without_targets.cu_rows.tolist() == [0, 0]
    assert without_anything.cu_seqlens.tolist() == without_anything.cu_rows.tolist() == [0]
    assert without_anything.positions.tolist() == []


@settings(deadline=None)
@given(st.lists(examples(), max_size=5))
def test_every_learnable_token_but_the_first_is_a_target_once(sequences: list[Example]) -> None:
    rows, targets, per_sequence, start = [], [], [], 0
    for s in sequences:
        tokens = s.prompt + s.response
        learnable = [False] * len(s.prompt) + ([True] * len(s.response) if s.learn is None else s.learn)
        found = [t for t in range(1, len(tokens)) if learnable[t]]
        rows += [start + t - 1 for t in found]
        targets += [tokens[t] for t in found]
        per_sequence.append(len(found))
        start += len(tokens)
    packed = pack(sequences)
    assert packed.rows.tolist() == rows
    assert packed.targets.tolist() == targets
    assert packed.cu_rows.tolist() == [0, *accumulate(per_sequence)]
    assert packed.tokens.tolist() == [token for s in sequences for token in s.prompt + s.response]
    assert packed.positions.tolist() == [i for s in sequences for i in range(len(s.prompt + s.response))]
    assert packed.cu_seqlens.tolist() == [0, *accumulate(packed.lengths)]


def test_a_rollout_packs_like_an_example() -> None:
    rollout = Rollout([5, 6], [7, 8], torch.zeros(2), None, finished=True)
    packed, expected = pack([rollout]), pack([Example([5, 6], [7, 8])])
    for name in ("tokens", "positions", "cu_seqlens", "rows", "targets", "cu_rows"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), name


def test_a_packed_batch_moves_as_a_whole() -> None:
    packed = pack([Example([5], [7, 8])], "meta")
    moved = {
        getattr(packed, name).device.type
        for name in ("tokens", "positions", "cu_seqlens", "rows", "targets", "cu_rows")
    }
    assert moved == {"meta"}
    assert packed.lengths == (3,)


def test_sequences_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(
        ValueError, match="expected at least one token in every sequence, got an empty sequence at index 1"
    ):
        pack([Example([1], [2]), Example([], [])])
    with pytest.raises(ValueError, match=r"sequence 0: expected one learn mark per response token \(2\), got 1"):
        pack([Example([1], [2, 3], [True])])


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=6))
def test_segments_are_summed_one_by_one(counts: list[int]) -> None:
    cu = cumulative(counts)
    assert cu.dtype == torch.int32
    x = torch.arange(1.0, sum(counts) + 1, requires_grad=True)
    sums = segment_sum(x, cu)
    assert sums.tolist() == [x[a:b].sum().item() for a, b in pairwise(cu.tolist())]
    assert segment_ids(cu).tolist() == [s for s, n in enumerate(counts) for _ in range(n)]
    (sums * torch.arange(1.0, len(counts) + 1)).sum().backward()
    if counts:
        assert x.grad.tolist() == [s + 1.0 for s in segment_ids(cu).tolist()]


def test_micro_batches_fill_up_to_the_budget() -> None:
    assert list(micro_batches("abcdef", [3, 3, 4, 9, 1, 1], 7)) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert list(micro_batches("ab", [3, 4], 7)) == [["a", "b"]]
    assert list(micro_batches([], [], 7)) == []
    with pytest.raises(ValueError, match="shorter"):
        list(micro_batches("abc", [1, 1], 7))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 12))
def test_micro_batches_lose_nothing_and_stay_within_the_budget(lengths: list[int], budget: int) -> None:
    micros = list(micro_batches(range(len(lengths)), lengths, budget))
    assert [i for micro in micros for i in micro] == list(range(len(lengths)))
    assert all(micros), "an empty micro-batch"
    used = [sum(lengths[i] for i in micro) for micro in micros]
    assert all(len(micro) == 1 or tokens <= budget for micro, tokens in zip(micros, used, strict=True))
    assert all(tokens + lengths[after[0]] > budget for tokens, after in zip(used[:-1], micros[1:], strict=True))
