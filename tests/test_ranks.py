"""Two processes do what one does: the same tokens, the same steps, the same metrics; and share what AdamW remembers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import peers
from tests import pair, toys
from tests.pair import Job, Left
from twinhead.engine import cli, planning, ppo, ranks
from twinhead.engine.config import RunConfig
from twinhead.engine.optim import Optimizer

KEPT = {"save_every": 1, "keep_checkpoints": 9}
RICH = {
    "reward_model": "{reward_model}", "normalise_scores": True, "tokens_per_micro": 20, "kl_target_nats": 0.01,
    "kl_horizon": 20, "ptx_data": "{documents}", "ptx_batch_size": 5, "eval_prompts": "{heldout}", "eval_every": 1,
}  # fmt: skip
STEADY = {"learning_rate": 1e-3, "adam_eps": 1e-5}  # AdamW divides what is nothing but rounding by its size
ODD = {"tokens_per_micro": 8, "batch_size": 3} | STEADY
UNPAIRED = {"loss": "kto", "data": "{unpaired}", "eval_data": "{labelled}", "precompute_reference": True}
ALIKE = [
    Job("pretrain", "pretrain", {"batch_size": 3} | STEADY),
    Job("sft", "sft", ODD),
    Job("reward", "reward", {"centring_coef": 0.1, "eval_data": "{conflict}", "normalisation": "mean_std"}),
    Job("dpo", "dpo"),
    Job("kto", "dpo", UNPAIRED | {"batch_size": 5}),
    Job("ppo", "ppo", RICH),
    Job("few", "ppo", {"rollouts_per_step": 3, "minibatches": 3, "ptx_data": "{documents}", "ptx_batch_size": 1}),
    Job("stop", "ppo", {"kl_stop": 5e-4, "old_logprobs": "recompute", "importance_cap": 1.1}),
    Job("grpo", "grpo", {"beta": 0.1, "resample": 1, "process_function": "{rewards}:progress"}),
]
SHARDED = RICH | KEPT | {"shard_optimizer": True}
OTHERS = [
    Job("sharded", "ppo", SHARDED),
    Job("resumed", "ppo", SHARDED, cut=("sharded", 2)),
    Job("no rank", "ppo", fails="generate 1"),
    Job("no room", "sft", fails="write 0"),
]


@dataclass(frozen=True)
class Done:
    """What one process and two have left in their folders, and what they know."""

    one: Path
    two: Path
    alone: dict[str, Left]
    ranks: list[dict[str, Left]]
    probes: list[dict[str, Any]]
    box: dict[str, str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("ranks")
    box = toys.box(folder / "box")
    found, probes = zip(*pair.together([*ALIKE, *OTHERS], box, folder / "two"), strict=True)
    alone = {job.name: pair.train(job, box, folder / "one") for job in ALIKE}
    return Done(folder / "one", folder / "two", alone, found, probes, box)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    head = folder / "value_head.safetensors"
    return load_file(folder / "model.safetensors") | (load_file(head) if head.is_file() else {})


@pytest.mark.parametrize("name", [job.name for job in ALIKE])
def test_two_processes_take_the_steps_of_one(name: str, done: Done) -> None:
    assert [left[name].error for left in (done.alone, *done.ranks)] == [""] * 3
    ours, theirs = weights(done.two / name), weights(done.one / name)
    before = load_file(Path(done.box["model"]) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for parameter, tensor in theirs.items():
        torch.testing.assert_close(ours[parameter], tensor, rtol=0, atol=1e-6)
    if name != "pretrain":
        assert max(float((theirs[n] - before[n]).abs().max()) for n in before if n in theirs) > 1e-3


@pytest.mark.parametrize("name", [job.name for job in ALIKE])
def test_metrics_are_those_of_all_ranks(name: str, done: Done) -> None:
    ours, theirs = toys.metrics(done.two / name), toys.metrics(done.one / name)
    assert len(ours) == len(theirs) >= 3
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=2e-6, nan_ok=True)


@pytest.mark.parametrize("name", ["ppo", "few", "stop", "grpo"])
def test_rollouts_are_the_same_tokens(name: str, done: Done) -> None:
    assert len(done.alone[name].tokens) >= 9
    assert done.alone[name].tokens == done.ranks[0][name].tokens == done.ranks[1][name].tokens


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "ppo"])
def test_what_is_held_out_is_shared(name: str, done: Done) -> None:
    """Text, comparisons, demonstrations that a reward is normalised by, and rollouts: each is read by one rank."""
    whole = done.alone[name].measured
    parts = [rank[name].measured for rank in done.ranks]
    assert whole >= 8 and sum(parts) == whole
    assert max(parts) <= 0.6 * whole


def test_the_runs_were_what_they_are_meant_to_be(done: Done) -> None:
    """Without these, the tests above would say less than they seem to."""
    updates = [line["policy/num_updates"] for line in toys.metrics(done.one / "stop")]
    assert 2 in updates, "kl_stop ends some steps early"
    assert len({line["objective/kl_coef"] for line in toys.metrics(done.one / "ppo")}) == 3
    assert {"eval/micro", "eval/labeler/ann", "spread"} <= toys.metrics(done.one / "reward")[-1].keys()
    assert {"eval/score", "eval/eos_rate"} <= toys.metrics(done.one / "ppo")[-1].keys()
    assert (done.two / "kto" / "reference.json").read_bytes() == (done.one / "kto" / "reference.json").read_bytes()


def test_only_the_first_rank_writes(done: Done) -> None:
    for job in ALIKE:
        ours, theirs = toys.files(done.two / job.name), toys.files(done.one / job.name)
        assert ours.keys() == theirs.keys()
        assert ours["metrics.jsonl"].count(b"\n") == theirs["metrics.jsonl"].count(b"\n")


# -- a shared optimizer ------------------------------------------------------------------------------------------------


def test_a_shared_memory_changes_no_bit(done: Done) -> None:
    assert [rank["sharded"].error for rank in done.ranks] == ["", ""]
    assert toys.metrics(done.two / "sharded") == toys.metrics(done.two / "ppo")
    ours, theirs = weights(done.two / "sharded"), weights(done.two / "ppo")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_rank_remembers_half(done: Done) -> None:
    whole = done.alone["ppo"].moments
    assert [rank["ppo"].moments for rank in done.ranks] == [whole, whole]
    halves = [rank["sharded"].moments for rank in done.ranks]
    assert sum(halves) == whole
    assert max(halves) < 0.55 * whole


def test_it_resumes_bit_for_bit(done: Done) -> None:
    assert [rank["resumed"].error for rank in done.ranks] == ["", ""]
    ours, theirs = (toys.files(done.two / name) for name in ("resumed", "sharded"))
    for name in theirs:
        if not name.startswith("timings"):
            assert name == "metrics.jsonl" or ours[name] == theirs[name], name
    assert toys.metrics(done.two / "resumed") == toys.metrics(done.two / "sharded")


def test_one_process_goes_on_from_what_two_have_left(done: Done) -> None:
    job = Job("alone", "ppo", SHARDED | {"shard_optimizer": False}, cut=("sharded", 1))
    left = pair.train(job, done.box, done.two)
    assert left.error == "" and len(left.tokens) == 2 * 8
    ours, theirs = weights(done.two / "alone"), weights(done.two / "sharded")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    saved = [load_file(done.two / run / "checkpoint-3" / "optimizer.safetensors") for run in ("alone", "sharded")]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.skipif(not peers.TORCHAO.folder.is_dir(), reason=f"needs {peers.TORCHAO.label}: make peers")
def test_moments_of_8_bits_are_shared_too(done: Done, tmp_path: Path) -> None:
    """Square matrices get 8 bits, the others do not; without the compiler, which takes half a minute."""
    wide = toys.language_model(tmp_path / "wide", hidden_size=64, num_hidden_layers=1, num_key_value_heads=4)
    eight = {"model": wide, "adam_bits": 8} | STEADY | KEPT
    jobs = [
        Job("whole", "sft", eight),
        Job("sharded", "sft", eight | {"shard_optimizer": True}),
        Job("resumed", "sft", eight | {"shard_optimizer": True}, cut=("sharded", 1)),
    ]
    found = [jobs for jobs, _ in pair.together(jobs, done.box, tmp_path / "two", torchao=True)]
    assert [[left.error for left in rank.values()] for rank in found] == [[""] * 3] * 2
    whole, sharded = ([rank[name].moments for rank in found] for name in ("whole", "sharded"))
    assert whole == [sum(sharded)] * 2
    assert max(sharded) < 0.6 * sum(sharded)
    for name in ("sharded", "resumed"):
        assert toys.metrics(tmp_path / "two" / name) == toys.metrics(tmp_path / "two" / "whole")
        for step in (2, 3):
            for file in ("model", "optimizer"):
                path = f"checkpoint-{step}/{file}.safetensors"
                ours, theirs = (load_file(tmp_path / "two" / run / path) for run in (name, "whole"))
                assert ours.keys() == theirs.keys()
                assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []
    square = {key for key, tensor in theirs.items() if tensor.numel() >= 64 * 64}
    assert {key.rpartition(".")[2] for key in square} == {"exp_avg:codes", "exp_avg_sq:codes"}
    assert {theirs[key].dtype for key in square} == {torch.uint8}
    assert any(key.endswith(".exp_avg") for key in theirs), "the small ones keep 32 bits"


def test_the_plan_knows_of_it(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    given = toys.options("ppo", done.box) | {"output_dir": "run"}
    plain, sharded = ppo.Config(**given), ppo.Config(**given, shard_optimizer=True)
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    assert planning.moments(sharded, parameter) == planning.moments(plain, parameter) == 2 * 4 * 64 * 64
    monkeypatch.setattr(ranks, "size", lambda: 4)
    assert planning.moments(sharded, parameter) == planning.moments(plain, parameter) // 4


@pytest.mark.parametrize("bits", [32, 8])
def test_a_rank_may_have_nothing_to_remember(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if bits == 8:
        if not peers.TORCHAO.folder.is_dir():
            pytest.skip(f"needs {peers.TORCHAO.label}: make peers")
        peers.load(peers.TORCHAO, "torchao.optim")
    monkeypatch.setattr(ranks, "size", lambda: 3)
    monkeypatch.setattr(ranks, "rank", lambda: 2)
    config = RunConfig(output_dir="run", shard_optimizer=True, adam_bits=bits)
    optimizer = Optimizer(torch.nn.Linear(2, 1), config, 1)
    assert len(optimizer.parameters) == 2 and optimizer.own == {}
    optimizer.adam.step()
    assert not optimizer.adam.state


# -- what ranks tell each other ----------------------------------------------------------------------------------------


def test_the_error_of_one_rank_ends_the_run_on_all(done: Done) -> None:
    assert [rank["no rank"].error for rank in done.ranks] == [
        "RuntimeError: rank 1: KeyError: 'what is this?'", "KeyError: 'what is this?'",
    ]  # fmt: skip
    assert [rank["no room"].error for rank in done.ranks] == ["OSError: could not write it: no room"] * 2


def test_gradients_are_summed_and_weights_sent(done: Done) -> None:
    first, second = done.probes
    assert first["gradients"] == second["gradients"] == [[3.0] * 6, [1.0] * 6, None, [1.0] * 5]
    assert sorted(set(first["owners"])) == [0, 1] and first["owners"] == second["owners"]
    expected = [[float(owner)] * num for owner, num in zip(first["owners"], (6, 6, 6, 5), strict=True)]
    assert first["parameters"] == second["parameters"] == expected


def test_what_is_told_arrives(done: Done) -> None:
    for own, probe in enumerate(done.probes):
        assert probe["total"] == [3, 2.0]
        assert probe["cat"] == [1.0, 3.0, 8.0]
        mean = (3 * 1 + 1 + 3 + 8) / 6
        parts = [[1.0, 1.0], [1.0, 3.0], [8.0]] if own else [[1.0]]
        assert probe["over_all"] == [pytest.approx([x - mean for x in part]) for part in parts]
        assert probe["gathered"] == [{"own": 0}, {"own": 1}]
        assert probe["collected"] == ([] if own else [0, 1])
        assert probe["spread"] == [[0, 1], [2, 3, 4]]
        assert probe["first"] == "rank 0"


def test_a_rank_may_have_nothing_to_read(done: Done) -> None:
    """And the first one may measure alone, as a caller's own evaluation does, while the others wait."""
    alone = pair.held_out(ranks.alone)
    assert alone[1] == 3.0 and alone[4] > 0.0
    assert [probe["held out"] for probe in done.probes] == [[pytest.approx(alone)] * 2] * 2


def test_one_process_asks_nobody() -> None:
    assert (ranks.size(), ranks.rank()) == (1, 0)
    item = [torch.ones(2)]
    assert ranks.gathered(item)[0] is item and ranks.collected(item)[0] is item
    assert ranks.share([5, 1, 9]) == [0, 1, 2]
    assert ranks.spread(list, 3) == [[0, 1, 2]]


@pytest.mark.parametrize("sizes", [[9, 1, 1, 7, 5, 5, 2], [3] * 10, [1], []])
@pytest.mark.parametrize("num", [2, 3, 4])
def test_shares_are_balanced(sizes: list[int], num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graham 1969: the fullest share is at most 4/3 of the best that there is."""
    monkeypatch.setattr(ranks, "size", lambda: num)
    found = []
    for rank in range(num):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        found.append(ranks.share(sizes))
    assert sorted(i for share in found for i in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in found)
    least = max(sum(sizes) / num, max(sizes, default=0))
    assert max(sum(sizes[i] for i in share) for share in found) <= 4 / 3 * least


def test_every_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^device: expected a GPU for every process of this machine, got 1 for 2$"):
        ranks.join("cuda")


def test_several_processes_are_for_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["report", "--run", "runs/sft"]) == 1
    assert capsys.readouterr().err == "twinhead report: expected one process for what is no training, got 2\n"


def test_torchrun_starts_it(done: Done, tmp_path: Path) -> None:
    options = toys.options("sft", done.box) | ODD
    command = toys.command("sft", options | {"output_dir": str(tmp_path / "run")})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "twinhead.engine.cli"]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    run = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("40 rows") == 1, "the first rank alone speaks"
    assert toys.metrics(tmp_path / "run") == toys.metrics(done.two / "sft")
