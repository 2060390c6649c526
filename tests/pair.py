"""Two processes that train together, as torchrun starts them: a list of jobs done one after the other by both."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers
from tests import toys
from tests.models import classifier, model
from twinhead.engine import adam, batch, evaluate, grpo, ppo, ranks, run, scorers, shares
from twinhead.engine.batch import Example, Rollout
from twinhead.engine.data import Comparison
from twinhead.engine.optim import Optimizer
from twinhead.engine.policy import Policy, RewardModel

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Job:
    """One training run of the toys, by its name; `cut`: from what an earlier job had left after that many steps."""

    name: str
    stage: str
    changes: dict[str, Any] = field(default_factory=dict)
    cut: tuple[str, int] | None = None
    fails: str = ""  # where in it which rank cannot go on: "generate 1"


@dataclass(frozen=True)
class Left:
    """What a rank knows after a job."""

    error: str
    tokens: list[list[int]]  # of every response that was generated
    moments: int  # bytes that its optimizer remembers
    measured: int  # held-out sequences or comparisons that it passed through a model itself, and rollouts to score


def train(job: Job, box: dict[str, str], folder: Path) -> Left:
    """Do one job in this process, with the others if there are any; the run stands in folder / job.name."""
    tokens: list[list[int]] = []
    optimizers: list[Optimizer] = []
    measured: list[int] = []
    if job.cut is not None:
        ranks.first(lambda: cut(folder / job.cut[0], folder / job.name, job.cut[1]))

    def generate(*arguments: Any) -> list[Rollout]:
        rollouts = shares.generate(*arguments)
        tokens.extend(r.response for r in rollouts)
        return rollouts

    def micro_batches(items: Sequence[Any], lengths: Sequence[int], tokens_per_micro: int) -> Iterator[list[Any]]:
        measured.append(len(items))
        return batch.micro_batches(items, lengths, tokens_per_micro)

    def track(self: run.Run, *models: Any, optimizer: Optimizer, **state: Any) -> None:
        optimizers.append(optimizer)
        tracked(self, *models, optimizer=optimizer, **state)

    tracked = run.Run.track
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "generate", generate)
        patch.setattr(grpo, "generate", generate)
        patch.setattr(evaluate, "micro_batches", micro_batches)
        patch.setattr(scorers, "micro_batches", micro_batches)
        patch.setattr(run.Run, "track", track)
        if job.fails:
            fail(patch, *job.fails.split())
        error = ""
        try:
            given = {name: toys.filled(value, box) for name, value in job.changes.items()}
            toys.train(job.stage, box, folder / job.name, **given)
        except (ValueError, OSError, RuntimeError, KeyError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    states = [state for o in optimizers for state in o.adam.state.values()]
    moments = sum(t.nbytes for state in states for t in adam.plain(state).values() if t.ndim)
    return Left(error, tokens, moments, sum(measured))


def fail(patch: pytest.MonkeyPatch, place: str, rank: str) -> None:
    """Let one rank find that it cannot go on: the disk is full, or what it was to read is not there."""
    if ranks.rank() != int(rank):
        return
    if place == "generate":
        patch.setattr(shares, "generate_alone", broken(KeyError("what is this?")))
    else:
        patch.setattr(run.JsonLines, "write", broken(OSError("could not write it: no room")))


def broken(error: Exception) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def cut(whole: Path, part: Path, step: int) -> None:
    """The folder of a run as it stood after its checkpoint of that step."""
    shutil.copytree(whole, part)
    for path in [*part.iterdir()]:
        if path.is_file() and path.suffix != ".jsonl":
            path.unlink()
        elif path.is_dir() and int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def probe() -> dict[str, Any]:
    """What ranks tell each other, in two processes; a buffer of a few numbers makes many journeys."""
    own = ranks.rank()
    empty = {name: torch.zeros(3, 2) for name in "abc"} | {"half": torch.zeros(5).bfloat16()}
    module = {name: torch.nn.Parameter(tensor) for name, tensor in empty.items()}
    module["a"].grad = torch.full((3, 2), 1.0 + own)
    if own:
        module["b"].grad, module["half"].grad = torch.ones(3, 2).T.reshape(2, 3).T, torch.ones(5).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "BUCKET", 30)
        ranks.sum_gradients([*module.values()])
        gradients = [None if p.grad is None else p.grad.flatten().tolist() for p in module.values()]
        for p in module.values():
            p.data.fill_(own)
        ranks.send_parameters([*module.values()])
    parts = [torch.tensor([1.0, 3.0]), torch.tensor([8.0])] if own else []
    return {
        "gradients": gradients,
        "owners": ranks.owners([p.numel() for p in module.values()]),
        "parameters": [p.flatten().tolist() for p in module.values()],
        "total": [ranks.total(own + 1), ranks.total(own + 0.5)],
        "cat": ranks.cat(parts).tolist(),
        "over_all": [part.tolist() for part in ranks.over_all(lambda x: x - x.mean(), [torch.ones(1 + own), *parts])],
        "gathered": ranks.gathered({"own": own}),
        "collected": ranks.collected(own),
        "spread": [list(part) for part in ranks.spread(lambda rows: rows, 5)],
        "first": ranks.first(lambda: f"rank {own}"),
        "held out": [ranks.first(lambda: held_out(ranks.alone)), held_out(ranks.spread)],
    }


def held_out(spread: ranks.Spread) -> list[float]:
    """What a policy and a reward model say of one example and one comparison: too few for two ranks."""
    example, other = Example([4, 5], [6, 7, 8]), Example([4, 5], [9])
    surprise = evaluate.perplexity(Policy(model(), "none"), [example], spread=spread)
    ordered = evaluate.reward_accuracy(RewardModel(classifier()), [Comparison([example, other], [0, 1])], spread=spread)
    return [surprise.loss, float(surprise.num_targets), ordered.micro, ordered.macro, ordered.loss]


def together(
    jobs: list[Job], box: dict[str, str], folder: Path, torchao: bool = False
) -> list[tuple[dict[str, Left], dict[str, Any]]]:
    """Do all jobs in two processes: what each rank knows of every one of them, and what its probe() found.

    torchao: they have the package, which warns of much as it is imported, without its compiler.
    """
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    (folder / "box.json").write_text(json.dumps(box))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pair", str(folder), *(["torchao"] if torchao else [])],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=170)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert torchao or said[1] == "", "only the first rank speaks"
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return [({name: Left(**left) for name, left in rank["jobs"].items()}, rank["probe"]) for rank in found]


def main(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    box = json.loads((folder / "box.json").read_text())
    jobs = [Job(**given) for given in json.loads((folder / "jobs.json").read_text())]
    left = {job.name: asdict(train(job, box, folder)) for job in jobs}
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps({"jobs": left, "probe": probe()}))
    ranks.leave()


if __name__ == "__main__":
    if "torchao" in sys.argv[2:]:
        peers.load(peers.TORCHAO, "torchao.optim")
        torch.compiler.set_stance("force_eager")
    main(Path(sys.argv[1]))
