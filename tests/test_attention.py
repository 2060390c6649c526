"""Attention over ragged sequences and over cache slots equals the definition, written as a loop in float64."""

from __future__ import annotations

from math import tanh

import pytest
import torch
from torch import Tensor, nn

from twinhead.engine.attention import Ragged, Slots, attend
from twinhead.engine.batch import cumulative

HEADS, GROUPS, WIDTH = 4, 2, 8
SHORT_SEQUENCES = (3, 1, 9, 6)
LONG_SEQUENCES = (133, 2, 17)

VARIANTS = pytest.mark.parametrize("softcap", [None, 0.7])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 4, 1000])


def defined(query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(D,): one query against all the keys (n, D) that it may read, in Python's floats."""
    scores = [scale * float(query.double() @ key.double()) for key in keys]
    if softcap is not None:
        scores = [softcap * tanh(score / softcap) for score in scores]
    shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
    return shares @ values.double()


def ragged_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int,
    softcap: float | None,
) -> Tensor:
    """(1, T, H, D), one query after another."""
    out = torch.zeros(1, query.shape[2], HEADS, WIDTH, dtype=torch.float64)
    for end, length in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths, strict=True):
        for t in range(end - length, end):
            seen = slice(max(end - length, t - window + 1), t + 1)
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                out[0, t, h] = defined(query[0, h, t], key[0, g, seen], value[0, g, seen], scale, softcap)
    return out


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=noise) for shape in shapes]


def laid(lengths: tuple[int, ...]) -> Ragged:
    return Ragged(lengths, cumulative(lengths))


def ragged(num_tokens: int) -> list[Tensor]:
    return tensors((1, HEADS, num_tokens, WIDTH), (1, GROUPS, num_tokens, WIDTH), (1, GROUPS, num_tokens, WIDTH))


@VARIANTS
@WINDOWS
@pytest.mark.parametrize("lengths", [SHORT_SEQUENCES, (7,), (1,)], ids=str)
def test_ragged_sequences_read_their_own_past(
    lengths: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    query, key, value = ragged(sum(lengths))
    options = {"scaling": 0.4, "sliding_window": window, "softcap": softcap}
    out, _ = attend(nn.Module(), query, key, value, None, layout=laid(lengths), **options)
    expected = ragged_by_definition(query, key, value, lengths, 0.4, window or 10**6, softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


@VARIANTS
@WINDOWS
def test_a_long_sequence_is_attended_to_on_its_own(window: int | None, softcap: float | None) -> None:
    query, key, value = ragged(sum(LONG_SEQUENCES))
    options = {"sliding_window": window, "softcap": softcap}
    together, _ = attend(nn.Module(), query, key, value, None, layout=laid(LONG_SEQUENCES), **options)
    start = 0
    for length in LONG_SEQUENCES:
        part = slice(start, start + length)
        q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
        alone, _ = attend(nn.Module(), q, k, v, None, layout=laid((length,)), **options)
        torch.testing.assert_close(together[:, part], alone)
        start += length
    last = slice(max(0, LONG_SEQUENCES[0] - (window or 10**6)), LONG_SEQUENCES[0])
    t = LONG_SEQUENCES[0] - 1
    expected = defined(query[0, 3, t], key[0, 1, last], value[0, 1, last], WIDTH**-0.5, softcap)
    torch.testing.assert_close(together[0, t, 3].double(), expected, atol=1e-6, rtol=1e-5)


@VARIANTS
@WINDOWS
def test_a_slot_reads_its_own_keys_and_nothing_after_its_position(window: int | None, softcap: float | None) -> None:
    positions = torch.tensor([4, 0, 11])
    span = 12
    query, key, value = tensors((3, HEADS, 1, WIDTH), (3, GROUPS, span, WIDTH), (3, GROUPS, span, WIDTH))
    for b, position in enumerate(positions.tolist()):  # what an earlier sequence left in the slot
        key[b, :, position + 1 :], value[b, :, position + 1 :] = 1e4, -1e4
    layout = Slots(positions, span)
    out, _ = attend(nn.Module(), query, key, value, None, layout=layout, sliding_window=window, softcap=softcap)
    assert out.shape == (3, 1, HEADS, WIDTH)
    for b, position in enumerate(positions.tolist()):
        seen = slice(max(0, position + 1 - (window or 10**6)), position + 1)
        for h in range(HEADS):
            keys, values = key[b, h // 2, seen], value[b, h // 2, seen]
            expected = defined(query[b, h, 0], keys, values, WIDTH**-0.5, softcap)
            torch.testing.assert_close(out[b, 0, h].double(), expected, atol=1e-6, rtol=1e-5)


def test_layers_of_one_step_may_have_different_windows() -> None:
    layout = Slots(torch.tensor([5, 2]), 6)
    assert layout.mask(None).sum(-1).flatten().tolist() == [6, 3]
    assert layout.mask(2).sum(-1).flatten().tolist() == [2, 2]
    assert layout.mask(None).sum(-1).flatten().tolist() == [6, 3]


def test_what_cannot_be_attended_to_is_refused() -> None:
    query, key, value = ragged(4)
    with pytest.raises(ValueError, match="does not hand keyword arguments"):
        attend(nn.Module(), query, key, value, None)
    with pytest.raises(ValueError, match=r"attention sinks \(s_aux\) are not supported"):
        attend(nn.Module(), query, key, value, None, layout=laid((4,)), s_aux=torch.zeros(HEADS))
