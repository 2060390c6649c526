"""The benchmark of the kernels: its gate, its clock, its peers' shelf, and what it writes."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, chart, gate, gpu, kernels, peers, providers, readme, timing
from benchmarks.cases import Case, Limit, Problem
from benchmarks.contender import EAGER, OURS, Call, Maker
from benchmarks.peers import Missing, Peer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
QUICK = cases.cases("cpu", quick=True)


def tiny(rows: int = 40, words: int = 50) -> Case:
    """A case of a few microseconds."""

    def problem(device: torch.device) -> Problem:
        return cases.logits(rows, words, torch.float32, True, 1, device)

    return Case("selective_log_softmax", "tiny", problem, lambda p: Limit("half a read", p["logits"].sum, 0.5))


def use(monkeypatch: pytest.MonkeyPatch, **makers: Maker) -> None:
    """These contenders beside the eager one."""
    eager = providers.eager("selective_log_softmax")
    monkeypatch.setattr(providers, "providers", lambda op: {EAGER: eager, **makers})


def distorted(change: Callable[[torch.Tensor], torch.Tensor]) -> Maker:
    def make(problem: Problem) -> Call:
        run = providers.eager("selective_log_softmax")(problem).run
        return Call(lambda: tuple(change(x) for x in run() if x is not None))

    return make


def raising(error: Exception) -> Maker:
    def make(problem: Problem) -> Call:
        raise error

    return make


def test_every_function_is_measured_with_and_without_its_gradient() -> None:
    for device in ("cpu", "cuda"):
        found = cases.cases(device)
        assert {case.op for case in found} == set(providers.OPS)
        assert len({(case.op, case.title) for case in found}) == len(found)
    titles = {case.op: [c.title for c in cases.cases("cpu") if c.op == case.op] for case in cases.cases("cpu")}
    assert "1024 × 32000 float32, forward" in titles["selective_log_softmax"]
    assert "4096 × 32000 float32, forward and backward" in titles["selective_log_softmax_and_entropy"]
    assert titles["linear_ppo_loss"] == ["2048 × 512 × 32000 float32, forward and backward"]
    assert titles["gae"][0] == "256 sequences, mean length 256, float32"
    assert titles["ppo_loss"] == ["65,536 tokens float32, forward and backward"]
    assert titles["sample"][0] == "64 × 32000 float32"


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op}-{case.title}")
def test_our_answers_pass_the_gate(case: Case) -> None:
    problem = case.problem(CPU)
    expected = gate.exact(case, problem)
    makers = providers.providers(case.op)
    for name in (EAGER, OURS["torch"]):
        call = makers[name](problem)
        found = gate.asked(call, problem)()
        assert len(found[1]) == len(problem.learn)
        assert gate.error(case, problem, call, found, expected) <= 1e-5, name
    assert case.limit(problem).run() is not NotImplemented


def test_the_exact_answer_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("selective_log_softmax", "linear_ppo_loss", "full_kl"):
        case = next(c for c in QUICK if c.op == op and "backward" in c.title)
        problem = case.problem(CPU)
        monkeypatch.setattr(gate, "CHUNK", 1 << 20)
        whole = gate.exact(case, problem)
        monkeypatch.setattr(gate, "CHUNK", 7)
        parts = gate.exact(case, problem)
        for one, other in zip([*whole[0], *whole[1]], [*parts[0], *parts[1]], strict=True):
            assert one is not None and other is not None and other.dtype == torch.float64
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x + 0.01, "wrong"),
        (lambda x: x + 0.01 * (torch.arange(len(x)) == 39), "wrong"),
        (lambda x: x.detach() + 1.01 * (x - x.detach()), "wrong"),
        (lambda x: x * torch.nan, "wrong"),
        (lambda x: x[:-1], "Error"),
    ],
    ids=["value", "one row", "gradient", "nan", "shape"],
)
def test_a_wrong_answer_has_no_time(change: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, wrong=distorted(change), right=distorted(lambda x: x.clone()))
    rows = {row["provider"]: row for row in kernels.measure(tiny(), CPU, seconds=0)["rows"]}
    assert words in rows["wrong"]["failed"] and "milliseconds" not in rows["wrong"]
    assert rows["right"]["milliseconds"] > 0 and rows["right"]["error"] < 1e-6


def test_who_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OURS["triton"]
    use(
        monkeypatch,
        peer=raising(Missing("needs a GPU")),
        broken=raising(RuntimeError("no\nkernel")),
        **{ours: raising(ValueError("no backend 'triton'"))},
    )
    rows = {row["provider"]: row for row in kernels.measure(tiny(), CPU, seconds=0)["rows"]}
    assert rows["peer"] == {"provider": "peer", "not_run": "needs a GPU"}
    assert rows["broken"] == {"provider": "broken", "failed": "RuntimeError: no"}
    assert rows[ours]["not_run"] == "no backend 'triton'" and not kernels.ours_broke(rows[ours])
    use(monkeypatch, **{ours: raising(RuntimeError("illegal memory access"))})
    rows = {row["provider"]: row for row in kernels.measure(tiny(), CPU, seconds=0)["rows"]}
    assert kernels.ours_broke(rows[ours])


def test_rounds_are_interleaved_and_turn() -> None:
    seen: list[str] = []
    runs = {name: lambda name=name: seen.append(name) for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SAMPLE_SECONDS", 0.0)
        times = timing.interleaved(runs, CPU, seconds=0, least=4)
    assert "".join(seen[6:]) == "abc" + "bca" + "cab" + "abc", (
        "after the two calls that each had before the first round"
    )
    assert {t.rounds for t in times.values()} == {4}


def test_what_stands_around_a_sample_is_not_timed() -> None:
    @contextmanager
    def slowly() -> Iterator[None]:
        seen.append("in")
        time.sleep(0.05)
        yield
        seen.append("out")

    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SAMPLE_SECONDS", 0.0)
        times = timing.interleaved({"a": lambda: seen.append("a")}, CPU, seconds=0, least=2, around={"a": slowly})
    assert seen == ["in", "a", "a", "out", *["in", "a", "out"] * 2] and times["a"].median < 50.0


def test_the_median_and_the_quartiles_are_in_milliseconds() -> None:
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 100.0]) == timing.Times(3000.0, 2000.0, 4000.0, 5)


def test_the_limit_counts_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(runs: Any, *_: Any, **__: Any) -> dict[str, timing.Times]:
        return {name: timing.Times(8.0 if name == kernels.LIMIT else 5.0, 4.0, 6.0, 3) for name in runs}

    use(monkeypatch)
    monkeypatch.setattr(kernels, "interleaved", timed)
    measured = kernels.measure(tiny(), CPU, seconds=0)
    assert measured["limit"] == {"name": "half a read", "milliseconds": 4.0}
    assert measured["rows"][0]["of_limit"] == 0.8 and measured["rows"][0]["quartiles"] == [4.0, 6.0]


@pytest.mark.skipif(not timing.CLEAR.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_peak_memory_counts_what_a_call_holds() -> None:
    def run() -> torch.Tensor:
        big = torch.ones(8 << 20)  # 32 MiB
        return big[: 1 << 20] + big[-(1 << 20) :]  # 4 MiB

    run()
    found = timing.peak_memory(run, CPU)
    assert found is not None
    assert 35 << 20 < found < 39 << 20


def test_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = OURS["cpu"]
    use(monkeypatch, **{ours: distorted(lambda x: x.clone()), "Peer 1": distorted(lambda x: x.clone())})
    monkeypatch.setattr(cases, "cases", lambda device, quick=False: [tiny(), tiny(20)])
    kernels.main("cpu", [], True, tmp_path)
    found = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert found["machine"]["threads"] == torch.get_num_threads() and found["versions"]["torch"]
    (case, _) = found["cases"]
    assert case["limit"]["name"] == "half a read"
    row = case["rows"][1]
    assert row["provider"] == ours
    assert row["of_limit"] == pytest.approx(case["limit"]["milliseconds"] / row["milliseconds"])
    assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
    assert ours in capsys.readouterr().out
    assert (tmp_path / "kernels_cpu_selective_log_softmax.png").stat().st_size > 10_000
    assert [path.name for path in chart.main(found, tmp_path)] == ["kernels_cpu_selective_log_softmax.png"]


def test_time_that_is_up_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "cases", lambda device, quick=False: [tiny()])
    kernels.main("cpu", [], True, tmp_path, minutes=0)
    assert "no time left for selective_log_softmax, tiny" in capsys.readouterr().out
    assert json.loads((tmp_path / "kernels_cpu.json").read_text())["left_out"]


def test_kept_memory_has_results_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[bool] = []
    monkeypatch.setattr(kernels, "keep_freed_memory", lambda: told.append(True))
    monkeypatch.setattr(cases, "cases", lambda device, quick=False: [tiny()])
    for keep_memory in (False, True):
        kernels.main("cpu", [], True, tmp_path, minutes=0, keep_memory=keep_memory)
    assert told == [True]
    assert {path.name for path in tmp_path.glob("*.json")} == {"kernels_cpu.json", "kernels_cpu_kept.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the GNU C library's")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept(keep: bool) -> None:
    """Page faults of a large result once the heap has grown, in a process of its own."""
    script = f"""
import resource, torch
from benchmarks.timing import keep_freed_memory
if {keep}: keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def one():
    before = faults()
    torch.ones(1 << 25).sum()
    return faults() - before
for _ in range(9): one()
print(min(one() for _ in range(5)))
"""
    faults = int(subprocess.check_output([sys.executable, "-c", script], text=True, cwd=gpu.ROOT))
    assert (faults < 100) == keep


def test_an_unknown_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no function soft_max, expected some of selective_log_softmax"):
        kernels.main("cpu", ["gae", "soft_max"], True, tmp_path)


def test_a_failure_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, **{OURS["cpu"]: distorted(lambda x: x + 1)})
    monkeypatch.setattr(cases, "cases", lambda device, quick=False: [tiny()])
    with pytest.raises(SystemExit, match="tiny: twinhead cpu"):
        kernels.main("cpu", [], True, tmp_path)


@pytest.mark.parametrize(
    ("milliseconds", "written"),
    [(0.00123, "1.23 µs"), (0.0853, "85.3 µs"), (0.412, "412 µs"), (4.123, "4.12 ms"), (1300.0, "1.30 s")],
)
def test_durations(milliseconds: float, written: str) -> None:
    assert kernels.duration(milliseconds) == written


def row(provider: str, milliseconds: float) -> dict[str, Any]:
    return {"provider": provider, "milliseconds": milliseconds, "of_limit": 1 / milliseconds, "peak_bytes": 3 << 20}


def test_the_readme_has_our_time_beside_the_fastest_peer(tmp_path: Path) -> None:
    rows = [row(EAGER, 8.0), row(OURS["torch"], 5.0), row(OURS["cpu"], 2.0), row("A 1", 7.0), row("B 2", 6.0)]
    found = {
        "machine": {"cpu": "Some CPU", "threads": 2}, "versions": {"torch": "2.13"}, "commit": "abc", "date": "today",
        "quick": False, "cases": [{"op": "gae", "title": "small", "rows": rows}],
    }  # fmt: skip
    again = [row(EAGER, 3.0), row(OURS["cpu"], 2.0), row("B 2", 5.0)]
    kept = {"cases": [{"op": "gae", "title": "small", "rows": again}]}
    lines = readme.kernels({"cpu": found, "cuda": None}, kept)
    assert lines[2] == "| `gae` | small | **2.00 ms** | 50% | 8.00 ms (1.5) | – | B 2 6.00 ms (2.5) | 3 / 3 MiB |"
    assert "| 8.00 ms | – | B 2 6.00 ms |" in readme.kernels({"cpu": found, "cuda": None}, None)[2]
    assert sum(readme.UNMEASURED in line for line in lines) == len(providers.OPS)
    assert lines[-1] == "Some CPU, 2 threads, torch 2.13, commit abc, today."


def test_a_result_without_a_place_in_the_readme_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Title\n<!-- demo table -->\n<!-- /demo table -->\n")
    (tmp_path / "quality.json").write_text('{"healthy": {}, "weak": {}}')
    with pytest.raises(ValueError, match="expected <!-- quality table --> and"):
        readme.main(tmp_path / "README.md", tmp_path)


def shelve(folder: Path, peer: Peer, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{peer.name}-{peer.version}" / "package" / peer.top / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / f"{peer.name}-{peer.version}" / "needs").mkdir()


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    return tmp_path


def test_a_peer_is_loaded_and_leaves_no_trace_on_the_path(shelf: Path) -> None:
    peer = Peer("Alien", "alien", "1", "alien_one", stubs=("heavy",))
    shelve(shelf, peer, __init__="from heavy.sub import Thing\nimport heavy\nheavy.anything\nname = 'one'\n")
    before, finders = list(sys.path), list(sys.meta_path)
    assert peer.function("alien_one", "name") == "one"
    assert sys.path == before and sys.meta_path == finders
    assert "heavy" not in sys.modules and "heavy.sub" not in sys.modules
    assert "alien_one" in sys.modules, "its own lazy imports find it there"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("heavy")


def test_two_versions_of_a_package_live_side_by_side(shelf: Path) -> None:
    old = Peer("Alien", "alien", "0", "alien_two", leaves=True)
    new = Peer("Alien", "alien", "2", "alien_two")
    text = "from alien_two.part import version\n"
    shelve(shelf, old, __init__=text, part="version = 'old'\n")
    shelve(shelf, new, __init__=text, part="version = 'new'\n")
    assert new.function("alien_two", "version") == "new"
    assert old.function("alien_two", "version") == "old"
    assert sys.modules["alien_two.part"].version == "new", "the newer one is still there for its lazy imports"


@pytest.mark.parametrize("text", [None, "import not_there_at_all\n", "raise SystemError('no driver')\n"])
def test_a_peer_that_cannot_be_loaded_is_missing(text: str | None, shelf: Path) -> None:
    peer = Peer("Alien", "alien", "3", "alien_three")
    if text is not None:
        shelve(shelf, peer, __init__=text)
    expected = "python -m benchmarks peers" if text is None else "not_there_at_all|no driver"
    with pytest.raises(Missing, match=expected):
        peer.function("alien_three", "name")


def test_peers_are_installed_without_dependencies_into_their_own_folder(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    peers.main()
    peers.main()
    installed = [spec for command in calls for spec in command if "==" in spec]
    assert {peer.spec for peer in peers.PEERS} <= set(installed)
    assert all("--no-deps" in command for command in calls)
    assert all(Path(command[command.index("--target") + 1]).is_relative_to(shelf) for command in calls)
    assert not any(spec.startswith(("torch==", "transformers==", "triton==")) for spec in installed)
    assert not list(shelf.glob("*.part")) and len(list(shelf.iterdir())) == len(peers.PEERS)
    assert len(calls) == len(peers.PEERS) + sum(bool(peer.needs) for peer in peers.PEERS), (
        "the second call does nothing"
    )
    assert "flash-attn" in capsys.readouterr().out


def test_an_installation_that_fails_leaves_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        peers.main()
    assert not peers.PEERS[0].folder.exists()


def alive(marker: str) -> list[str]:
    """Command lines of running processes that contain `marker`; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end at any moment
            found += [path.read_text()] if marker in path.read_text() else []
    return found


def test_the_gpu_command_runs_everything_and_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)  # orphan'])"
    written = [
        gpu.Step("good", [sys.executable, "-c", "import os; print(os.environ['PYTHONPATH'])"], 60),
        gpu.Step("bad", [sys.executable, "-c", "raise SystemExit(3)"], 60),
        gpu.Step("slow", [sys.executable, "-c", child], 1.5),
        gpu.Step("timed", [sys.executable, "-c", "print({minutes})"], 60),
        gpu.Step("shared", [sys.executable, "-c", "print({minutes})"], 60, share=0.25),
    ]
    monkeypatch.setattr(gpu, "steps", lambda device, output: written)
    with pytest.raises(SystemExit):
        gpu.main("cpu", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    ends = {name: step["end"] for name, step in summary.items()}
    assert ends == {"good": "done", "bad": "exit 3", "slow": "out of time", "timed": "done", "shared": "done"}
    assert str(ROOT / "tests" / "typing") in (tmp_path / "good.log").read_text()
    assert 5 < float((tmp_path / "timed.log").read_text()) < 8
    assert 1 < float((tmp_path / "shared.log").read_text()) < 2
    assert "out of time" in capsys.readouterr().out
    assert not alive("# orphan"), "what a step started ends with it"


def test_the_gpu_command_tests_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = gpu.steps("cuda", tmp_path)
    found = {step.name: list(step.command) for step in steps}
    assert list(found) == ["build", "tests", "sanitizer", "kernels", "generate", "train", "ppo"]
    assert found["build"][1:] == ["setup.py", "build_ext", "--inplace"]
    assert found["tests"][-3:] == ["tests/kernels/test_cuda.py", "tests/test_cuda_engine.py", "tests/kernels"]
    assert [step.share for step in steps[-4:]] == [1 / 4, 1 / 3, 1 / 2, 1], (
        "equal parts of what is left after the tests"
    )
    for name in ("kernels", "generate", "train", "ppo"):
        assert found[name][3:] == [name, *"--device cuda --minutes {minutes} --results".split(), str(tmp_path)]
    assert all(step.command[-1] == "--quick" for step in gpu.steps("cpu", tmp_path)[-4:])


def test_a_checkout_can_be_imported_without_installing_it() -> None:
    """The path that the GPU command sets; asked of the finder, because here the package is installed as well."""
    package = importlib.machinery.PathFinder.find_spec("twinhead", [str(ROOT / "tests" / "typing")])
    assert package is not None and package.submodule_search_locations
    found = importlib.machinery.PathFinder.find_spec("twinhead.kernels", package.submodule_search_locations)
    assert found is not None and found.origin is not None
    assert Path(found.origin).resolve() == ROOT / "kernels" / "__init__.py"


def test_the_gpu_command_imports_nothing_that_a_bare_machine_lacks() -> None:
    text = (
        "import sys; import benchmarks.__main__, benchmarks.gpu; print(sorted(sys.modules.keys() & {'torch', 'rich'}))"
    )
    found = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_benchmarks_are_no_part_of_the_tests() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]


def test_peers_that_overwrite_their_input_get_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwrites(torch.autograd.Function):
        """As Liger does it: the gradient is written over the logits, behind autograd's back."""

        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, index: torch.Tensor, *rest: Any) -> tuple[torch.Tensor]:
            losses = torch.nn.functional.cross_entropy(logits, index, reduction="none")
            p = logits.softmax(-1)
            p[torch.arange(len(p)), index] -= 1
            logits.data.copy_(p)
            ctx.save_for_backward(logits)
            return (losses,)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return (grad[:, None] * ctx.saved_tensors[0], None, None, None, None, None, None)

    monkeypatch.setattr("benchmarks.logits.expect_cuda", lambda tensor: None)
    monkeypatch.setattr("benchmarks.logits.LIGER", SimpleNamespace(label="Liger", function=lambda *_: Overwrites))
    for name in ("TRL", "VERL"):
        monkeypatch.setattr(f"benchmarks.logits.{name}", SimpleNamespace(label=name))
    case = tiny()
    problem = case.problem(CPU)
    before = problem["logits"].detach().clone()
    call = providers.providers(case.op)["Liger"](problem)
    found = gate.asked(call, problem)()
    assert gate.error(case, problem, call, found, gate.exact(case, problem)) < 1e-6
    assert torch.equal(problem["logits"], before)
