"""The demonstration, very small: every stage in order, from what the one before left, and again where one is lost."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests import toys
from twinhead.engine import data, demo, docstrings
from twinhead.engine.docstrings import Harvest
from twinhead.engine.generate import generate
from twinhead.engine.policy import Policy

SMALL = demo.Size(
    pretrain_steps=4, sft_steps=4, rankings=12, ppo_steps=2, eval_every=1, shown=(1, 2), rollouts=8, eval_prompts=6
)
NOUNS = ("file", "list", "key", "row", "tree", "page", "line", "word")
PAIRS = [
    (f"{verb.lower()}_{n}(x)", f"{verb} the {n} of x.") for verb in ("Open", "Close", "Read", "Sort") for n in NOUNS
]
LIBRARY = Harvest(PAIRS, [f"{name} is a function. {sentence} It returns n." for name, sentence in PAIRS])
STAGES = ["pretrain", "sft", "reward", "ppo", "ppo_ptx"]
Play = Callable[[], str]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Play]]:
    """The folder of a demonstration that has run once, and a function that runs it again; it gives what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch, toys.one_thread():
        patch.setattr(docstrings, "harvest", lambda: LIBRARY)
        patch.setattr(docstrings, "NUM_HELDOUT_PAIRS", 12)
        patch.setattr(docstrings, "NUM_HELDOUT_DOCUMENTS", 12)
        patch.setattr(demo, "QUICK", SMALL)
        patch.setattr(demo, "HELDOUT_RANKINGS", 6)
        patch.setattr(demo, "SAMPLES", 3)

        def again() -> str:
            printed = io.StringIO()
            written = demo.run(demo.Config(output_dir=str(folder), quick=True), Console(file=printed, width=160))
            assert written == folder / "report.html"
            return printed.getvalue()

        again()
        yield folder, again


def test_every_stage_is_measured_on_the_same_prompts(play: tuple[Path, Play]) -> None:
    folder, _ = play
    results = json.loads((folder / "results.json").read_text())
    samples = json.loads((folder / "samples.json").read_text())
    shown = ["pretrain", "sft", "ppo_1", "ppo_2", "ppo_ptx_1", "ppo_ptx_2"]
    assert list(results["stages"]) == list(samples["answers"]) == shown
    columns = {"win_rate", "gold", "reward", "kl", "distinct", "eos_rate", "length", "lm_loss", "ppl"}
    assert all(columns <= stage.keys() for stage in results["stages"].values())
    assert len(samples["prompts"]) == 3
    made = demo.Demo(demo.Config(output_dir=str(folder), quick=True))
    asked = data.prompts(made.source("prompts_heldout"), made.text, docstrings.PROMPT_TOKENS)[:6]
    assert [str(p.text).removesuffix(docstrings.SEP) for p in asked[:3]] == samples["prompts"]
    for stage, place in (("sft", "sft"), ("ppo_1", "ppo/checkpoint-1"), ("ppo_ptx_2", "ppo_ptx/checkpoint-2")):
        policy = Policy.from_pretrained(folder / place, "none")
        answers = generate(policy, [p.tokens for p in asked], made.sampling)
        assert samples["answers"][stage] == [made.text.decode(r.response) for r in answers[:3]]


def test_a_stage_that_is_lost_is_run_again_alone(play: tuple[Path, Play]) -> None:
    folder, again = play
    before = toys.files(folder)
    kept = {path: path.stat().st_mtime_ns for name in STAGES for path in (folder / name).rglob("*") if path.is_file()}
    shutil.rmtree(folder / "reward")
    printed = again()
    for path, changed in kept.items():
        if folder / "reward" not in path.parents:
            assert path.stat().st_mtime_ns == changed, path
    after = toys.files(folder)
    assert after.keys() == before.keys()
    for name in ("reward/metrics.jsonl", "reward/model.safetensors", "samples.json"):
        assert after[name] == before[name], name
    assert "SFT" in printed
