"""The `twinhead` command: its help, its options from a file, and what one does with checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests import toys
from twinhead.engine import cli, data
from twinhead.engine.batch import Rollout
from twinhead.engine.config import hidden
from twinhead.engine.evaluate import perplexity, reward_accuracy
from twinhead.engine.policy import Policy, RewardModel
from twinhead.engine.text import Text

Box = dict[str, str]
EMPTY = Rollout([], [], torch.zeros(0), None, True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with toys.one_thread():
        yield


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    return toys.box(tmp_path_factory.mktemp("box"))


@pytest.fixture(scope="module")
def trained(box: Box, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that repeats the last word of its prompt twice, and stops."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return str(toys.train("sft", box, folder, data=toys.demonstrations(64), batch_size=16, steps=50).dir)


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    """What a command prints on its standard output."""
    assert cli.main(list(args)) == code
    return capsys.readouterr().out


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "code"), [([], 1), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_the_help_lists_every_command(args: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *args, code=code)
    words = " ".join(printed.split())
    assert words.startswith("usage: twinhead COMMAND [--config file.yaml] [--key value ...]")
    for name, (config, _) in cli.COMMANDS.items():
        assert f" {name} {config.__doc__.split()[0]} " in words, "each command with what it is for"
    assert "twinhead COMMAND --help lists the options." in words


def test_the_commands_are_the_documented_ones() -> None:
    assert set(cli.COMMANDS) == set("demo pretrain sft reward ppo dpo grpo generate evaluate report".split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([name, "--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: twinhead {name}" in printed
    config, _ = cli.COMMANDS[name]
    for option in dataclasses.fields(config):
        assert (f"--{option.name}" in printed) != hidden(option)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("ppoo", "twinhead ppoo: unknown command, did you mean ppo? (see twinhead --help)"),
        ("evaluation", "twinhead evaluation: unknown command, did you mean evaluate? (see twinhead --help)"),
        ("xyz", "twinhead xyz: unknown command (see twinhead --help)"),
        ("--model", "twinhead --model: unknown command (see twinhead --help)"),
    ],
)
def test_an_unknown_command_suggests_the_nearest(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "--model", "m"]) == 1
    assert capsys.readouterr() == ("", sentence + "\n")


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", toys.TRAIN)
def test_a_stage_runs_from_a_file_and_overrides(
    stage: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = toys.options(stage, box) | {"seed": 3}
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}))
    ran = [stage, "--config", str(file), "--output_dir", str(tmp_path / "cli"), "--learning_rate", "0.002"]
    assert run(capsys, *ran) == ""
    toys.train(stage, box, tmp_path / "python", seed=3, learning_rate=0.002)
    assert toys.metrics(tmp_path / "cli") == toys.metrics(tmp_path / "python")
    header = json.loads((tmp_path / "cli" / "metrics.jsonl").read_text().splitlines()[0])
    assert header["stage"] == stage
    assert header["config"]["learning_rate"] == 0.002
    assert header["config"]["seed"] == 3


def test_the_terminal_shows_data_and_progress(box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = toys.command("sft", toys.options("sft", box) | {"output_dir": str(tmp_path / "run")})
    assert cli.main(args) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *_, last = printed.err.splitlines()
    assert first == "sft  40 rows"
    assert re.fullmatch(r"sft\s+━+ 3/3 0:00:00 loss \d\.\d{3}", last)


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_answers_on_the_terminal(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(
        capsys, "generate", "--model", trained, "--prompt", "five seven", "--max_new_tokens", "5", "--temperature", "0"
    )
    assert printed == "> five seven\nseven seven\n\n"


def test_generate_answers_a_file(trained: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = toys.write(tmp_path / "asked.jsonl", [{"prompt": "one two"}, {"prompt": "eight three", "note": 1}])
    out = tmp_path / "answers.jsonl"
    args = ["--model", trained, "--prompts", asked, "--output", str(out), "--temperature", "0", "--max_new_tokens"]
    assert run(capsys, "generate", *args, "5") == ""
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "one two", "completion": "two two", "finished": True},
        {"prompt": "eight three", "completion": "three three", "finished": True},
    ]
    run(capsys, "generate", *args, "2")
    assert [json.loads(line)["finished"] for line in out.read_text().splitlines()] == [False, False]


def test_generate_depends_on_its_seed_alone(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "--model", box["model"], "--prompts", box["prompts"], "--max_new_tokens", "8", "--seed"]
    first, again, other = (run(capsys, *args, seed) for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    "option", [["--top_k", "1"], ["--top_p", "1e-6"], ["--min_p", "0.99999"], ["--num_slots", "2"]]
)
def test_generate_passes_every_option_of_sampling_on(
    option: list[str], box: Box, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "--model", box["model"], "--prompts", box["prompts"], "--max_new_tokens", "8"]
    greedy, free = run(capsys, *args, "--temperature", "0"), run(capsys, *args)
    assert greedy != free
    assert run(capsys, *args, *option) == (free if option[0] == "--num_slots" else greedy)


def test_generate_stops_where_it_is_told(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = str(toys.WORDS.index("seven"))
    args = ["--prompt", "five seven", "--temperature", "0", "--max_new_tokens", "9", "--stop", stop]
    assert run(capsys, "generate", "--model", trained, *args) == "> five seven\nseven\n\n"


def test_generate_prints_brackets_as_they_are(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "generate", "--model", box["model"], "--prompt", "[/b] [red]one[/]", "--max_new_tokens", "2")
    assert printed.startswith("> [/b] [red]one[/]\n")


def test_generate_reads_conversations(trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"prompt": [{"role": "user", "content": "one two"}]}]
    path = toys.write(tmp_path / "asked.jsonl", asked)
    printed = run(capsys, "generate", "--model", trained, "--prompts", path, "--max_new_tokens", "2")
    assert printed.startswith("> user: one two\n")


@pytest.mark.parametrize("template", ["short", "alpaca"])
def test_generate_spells_an_instruction_as_it_was_taught(
    template: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = tmp_path / "taught"
    row = {"instruction": "one two", "input": "five", "output": "two"}
    toys.train("sft", box, taught, data=[row], eval_data="", template=template, max_length=64, steps=1)
    asked: list[list[int]] = []
    monkeypatch.setattr(cli, "generate", lambda policy, prompts, sampling: asked.extend(prompts) or [EMPTY])
    words = ["generate", "--model", str(taught), "--instruction", "one two"]
    text = Text.from_pretrained(taught)
    for given in (["--input", "five"], []):
        asked.clear()
        assert run(capsys, *words, *given).startswith("> user: one two\n" + "\nfive\n" * bool(given))
        trained = data.demonstrations([row if given else row | {"input": ""}], text, 64)
        assert asked == [trained[0].prompt]
    assert asked != [text.prompt("one two")]


def test_generate_looks_for_its_output_folder_first(
    box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "nowhere" / "answers.jsonl")
    assert cli.main(["generate", "--model", "no model", "--prompt", "one", "--output", out]) == 1
    assert (
        capsys.readouterr().err == f"twinhead generate: output: expected a file in a folder that exists, got {out!r}\n"
    )


# -- evaluate ----------------------------------------------------------------------------------------------------------


def measured(printed: str) -> dict[str, float]:
    """The rows of the printed table."""
    return {name: float(value) for name, value in re.findall(r"│ (\S+)\s+│ (\S+)\s+│", printed)}


def test_evaluate_measures_perplexity(trained: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(run(capsys, "evaluate", "--model", trained, "--data", box["heldout"], "--text", box["documents"]))
    policy, text = Policy.from_pretrained(trained, "none"), Text.from_pretrained(trained)
    answers = perplexity(policy, data.demonstrations(box["heldout"], text, 1024))
    plain = perplexity(policy, data.documents(box["documents"], text, 1024))
    expected = {"data/loss": answers.loss, "data/ppl": answers.ppl, "text/loss": plain.loss, "text/ppl": plain.ppl}
    assert found == pytest.approx(expected, abs=1e-4)
    assert found["data/loss"] < 0.02
    assert found["text/ppl"] == pytest.approx(math.exp(found["text/loss"]), rel=1e-3)


def test_evaluate_measures_a_reward_model(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(run(capsys, "evaluate", "--reward_model", box["reward_model"], "--comparisons", box["ranked"]))
    model, text = RewardModel.from_pretrained(box["reward_model"]), Text.from_pretrained(box["reward_model"])
    expected = reward_accuracy(model, data.comparisons(box["ranked"], text, 1024))
    assert found == pytest.approx({f"reward/{name}": x for name, x in dataclasses.asdict(expected).items()}, abs=1e-4)


def test_evaluate_tells_the_labelers_apart(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(run(capsys, "evaluate", "--reward_model", box["reward_model"], "--comparisons", box["conflict"]))
    ann, other = found["reward/labeler/ann"], found["reward/labeler/7"]
    rows = [json.loads(line) for line in Path(box["conflict"]).read_text().splitlines()]
    model, text = RewardModel.from_pretrained(box["reward_model"]), Text.from_pretrained(box["reward_model"])
    for accuracy, theirs in ((ann, rows[::2]), (other, rows[1::2])):
        assert accuracy == pytest.approx(reward_accuracy(model, data.comparisons(theirs, text, 1024)).micro, abs=1e-4)
    assert ann != other


def test_evaluate_holds_a_contest(trained: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ["--prompts", box["prompts"], "--reward_model", box["reward_model"], "--max_new_tokens", "5"]
    contest = [
        measured(run(capsys, "evaluate", "--model", ours, "--baseline", theirs, *judge))
        for ours, theirs in ((trained, box["model"]), (box["model"], trained), (trained, trained))
    ]
    won, lost, drawn = (found["win_rate/rate"] for found in contest)
    assert won + lost == pytest.approx(1.0, abs=2e-4)
    assert won != 0.5 == drawn
    for found in contest:
        assert 0 <= found["win_rate/low"] < found["win_rate/rate"] < found["win_rate/high"] <= 1
        assert found["win_rate/num"] == 24


def test_evaluate_refuses_a_judge_that_reads_other_ids(
    box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = toys.reward_model(tmp_path / "judge", box["model"])
    toys.tokenizer(toys.WORDS[::-1]).save_pretrained(judge)
    args = ["--model", box["model"], "--baseline", box["model"], "--prompts", box["prompts"], "--reward_model", judge]
    assert cli.main(["evaluate", *args]) == 1
    assert "reward_model: expected the policy's tokenizer (16 tokens), got another one" in capsys.readouterr().err


# -- report ------------------------------------------------------------------------------------------------------------


def test_report_draws_a_run(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "report", "--run", trained)
    written = Path(printed.removeprefix("report: ").strip())
    assert written.parent == Path(trained)
    assert written.suffix == ".html"
    assert "<svg" in written.read_text(encoding="utf-8")


def test_report_refuses_what_is_no_run(box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (box["model"], str(tmp_path / "nowhere")):
        assert cli.main(["report", "--run", folder]) == 1
        assert (
            f"expected a run's folder, with at least one step in metrics.jsonl, got {folder}" in capsys.readouterr().err
        )
    assert not (tmp_path / "nowhere").exists()
