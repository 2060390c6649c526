"""CUDA graphs, as far as a machine without a GPU can tell: what is recorded, when, and that replays draw the same text.

A stand-in records a call and makes it again. tests/test_cuda_engine.py records real graphs where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import toys
from tests.test_requests import LLAMA, NEW, PROMPTS, TOKEN, learn, policy, same_as_alone
from twinhead.engine import graphs
from twinhead.engine.generate import generate
from twinhead.engine.graphs import Tensors
from twinhead.engine.policy import Policy
from twinhead.engine.sampling import Sampling

SAMPLED = Sampling(max_new_tokens=NEW, stop=tuple(range(4, 10)), seed=5, cuda_graphs=True, keep_cache=True)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensors]]:
    """The outputs of every graph that was recorded; the device counts as a GPU."""
    made: list[Tensors] = []

    def record(call: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        outputs = call()
        made.append(outputs)

        def replay() -> None:
            for static, new in zip(outputs, call(), strict=True):
                static.copy_(new)

        return outputs, replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "SHORTEST", 8)
    yield made
    LLAMA.kept = None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_slots": 3},
        {"cache_bytes": 42 * TOKEN},
        {"min_new_tokens": 4},
        {"temperature": 0.7, "top_k": 20},
        {"bootstrap": True, "stop_sequences": ((20,), (30,))},
    ],
    ids=str,
)
def test_replays_draw_the_same_text(options: dict[str, object], recorded: list[Tensors]) -> None:
    """Rows come and go, so that a graph is replayed for fewer rows than it was recorded for."""
    sampling = replace(SAMPLED, **options)
    same_as_alone(PROMPTS, sampling, generate(LLAMA, PROMPTS, sampling))
    sizes = {len(outputs[0]) for outputs in recorded}
    assert sizes <= {1, 2, 3, 4, 7}
    if not options:
        assert max(sizes) == 7, "never more rows than slots"


def test_graphs_are_kept_for_the_next_call(recorded: list[Tensors]) -> None:
    made = policy()
    generate(made, PROMPTS, SAMPLED)
    assert made.kept is not None
    known, found = len(recorded), made.kept.graphs
    generate(made, PROMPTS, SAMPLED)
    assert len(recorded) == known
    generate(made, PROMPTS, replace(SAMPLED, seed=6))
    assert made.kept.graphs is found
    generate(made, PROMPTS[:2], replace(SAMPLED, keep_cache=False))
    assert made.kept is None, "what is not to be kept is released"


def same_as_without(made: Policy, sampling: Sampling) -> None:
    with_graphs = generate(made, PROMPTS, sampling)
    made.kept = None
    without = generate(made, PROMPTS, replace(sampling, cuda_graphs=False, keep_cache=False))
    assert [r.response for r in with_graphs] == [r.response for r in without]


def test_a_replay_sees_weights_that_have_learned(recorded: list[Tensors]) -> None:
    made = policy()
    before = [r.response for r in generate(made, PROMPTS, SAMPLED)]
    assert made.kept is not None
    found = made.kept.graphs
    learn(made)
    after = [r.response for r in generate(made, PROMPTS, SAMPLED)]
    assert made.kept.graphs is found is not None
    assert before != after
    same_as_without(made, SAMPLED)


def test_weights_that_moved_are_recorded_anew(recorded: list[Tensors]) -> None:
    made = policy()
    generate(made, PROMPTS, SAMPLED)
    known = len(recorded)
    head = made.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0))
    generate(made, PROMPTS, SAMPLED)
    assert len(recorded) > known
    same_as_without(made, SAMPLED)


def test_another_way_of_sampling_is_recorded_anew(recorded: list[Tensors]) -> None:
    made = policy()
    for options in ({"temperature": 0.5}, {"top_k": 5}, {"min_new_tokens": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        generate(made, PROMPTS, SAMPLED)
        known = len(recorded)
        generate(made, PROMPTS, replace(SAMPLED, **options))  # type: ignore[arg-type]
        assert len(recorded) > known


def test_a_kept_cache_is_large_enough(recorded: list[Tensors]) -> None:
    made = policy()
    short = replace(SAMPLED, cuda_graphs=False, max_new_tokens=3)
    generate(made, PROMPTS[:3], short)
    kept = made.kept
    assert kept is not None
    generate(made, PROMPTS[:2], short)
    assert made.kept is kept
    same_as_alone(PROMPTS, replace(SAMPLED, cuda_graphs=False), generate(made, PROMPTS, SAMPLED))
    assert made.kept is not kept, "more slots and longer ones"


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graphs: expected a policy on a GPU, got one on cpu"):
        generate(LLAMA, PROMPTS, SAMPLED)


def test_ppo_asks_for_graphs(tmp_path: Path) -> None:
    box = toys.box(tmp_path / "box")
    with pytest.raises(ValueError, match="cuda_graphs: expected a policy on a GPU, got one on cpu"):
        toys.train("ppo", box, tmp_path / "run", cuda_graphs=True)
