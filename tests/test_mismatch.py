"""Mismatch: what is measured between sampler and trainer, and the weights that correct for it."""

from __future__ import annotations

import math

import pytest
import torch

from twinhead.engine import mismatch


def test_what_is_measured() -> None:
    sampler = torch.full((200,), -2.0)
    trainer = sampler.clone()
    trainer[:2] = torch.tensor([-1.5, -3.0])  # ratios e^0.5 and e^-1
    found = {name: value.item() for name, value in mismatch.measure(trainer, sampler).items()}
    k3 = (math.exp(0.5) - 1 - 0.5 + math.exp(-1) - 1 + 1) / 200
    expected = {"mean": 1.5 / 200, "p99": 0.0, "max": 1.0, "kl": k3, "outside": 0.01}
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_99th_percentile_lies_below_one_in_a_hundred() -> None:
    gaps = torch.arange(1.0, 101.0) / 1000
    assert mismatch.measure(gaps, torch.zeros(100))["p99"].item() == pytest.approx(0.099)


def test_agreement_and_nothing_measure_0() -> None:
    for size in (0, 1, 7):
        logprobs = torch.randn(size)
        assert all(value == 0 for value in mismatch.measure(logprobs, logprobs).values())


def test_weights_are_ratios_up_to_the_cap() -> None:
    weights = mismatch.importance(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, 0.0, -3.0]), 2.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(-1), 2.0])
