"""Bad input ends in one sentence that says what was expected and what came, before work is lost."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaForCausalLM, MambaConfig, T5Config

from tests import toys
from twinhead.engine import checkpoint, cli
from twinhead.engine.metrics import JsonLines
from twinhead.engine.policy import RewardModel
from twinhead.engine.run import Run
from twinhead.engine.text import Text

Box = dict[str, str]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["twinhead.engine.cli"])

PAIR = '{"prompt": "one two", "completion": "two two"}\n'
LONG = " one" * 20
FILES: dict[str, str | bytes] = {
    "no_completion.jsonl": PAIR + '{"prompt": "one"}\n',
    "no_text.jsonl": '{"txt": "one"}\n',
    "no_answers.jsonl": '{"prompt": "one"}\n',
    "no_prompt.jsonl": '{"question": "one"}\n',
    "number.jsonl": PAIR + '{"prompt": "one", "completion": 7}\n',
    "nothing_said.jsonl": PAIR + '{"prompt": "one", "completion": " "}\n',
    "nothing_ever_said.jsonl": '{"prompt": "one", "completion": " "}\n' * 2,
    "long.jsonl": PAIR + json.dumps({"prompt": LONG, "completion": "two"}) + "\n",
    "too_long.jsonl": json.dumps({"prompt": LONG, "completion": "two"}) + "\n",
    "long_text.jsonl": json.dumps({"text": LONG}) + "\n",
    "broken.jsonl": PAIR + '{"prompt": "one\n',
    "list.jsonl": PAIR + "[1, 2]\n",
    "latin.jsonl": b'{"prompt": "\xe9t\xe9"}\n',
    "empty.jsonl": "",
    "table.csv": "prompt,completion\n",
    "tied.jsonl": '{"prompt": "one", "completions": ["two", "three"], "ranks": [1, 1]}\n',
    "labeler.jsonl": '{"prompt": "one", "chosen": "two", "rejected": "three", "labeler_id": ["ann"]}\n',
    "ranks.jsonl": '{"prompt": "one", "completions": ["two", "three"], "ranks": [1]}\n',
    "asked.jsonl": '{"prompt": "one", "completion": "two", "lable": true}\n',
    "labels.jsonl": '{"prompt": "one", "completion": "two", "label": 1}\n',
    "long_pair.jsonl": json.dumps({"prompt": LONG, "chosen": "two", "rejected": "three"}) + "\n",
    "praise.jsonl": '{"prompt": "one", "completion": "two", "label": true}\n' * 2,
    "blame.jsonl": '{"prompt": "one", "completion": "two", "label": false}\n',
    "one_prompt.jsonl": '{"prompt": "one", "chosen": "two", "rejected": "three"}\n' * 2,
    "column.jsonl": '{"prompt": "one", "finished": 1}\n',
    "huge.jsonl": '{"prompt": "huge", "completion": "one"}\n',
    "unknown.yaml": "steps: 3\nlearnin_rate: 0.1\n",
    "broken.yaml": "steps: [3\n",
    "list.yaml": "- steps\n",
    "latin.yaml": b"model: \xe9t\xe9\n",
    "file": "not a folder",
    "functions.py": '''
import math, os
few = lambda prompts, **_: [1.0]
none = lambda prompts, **_: None
nones = lambda prompts, **_: [0.5, None] * (len(prompts) // 2)
words = lambda prompts, **_: ["good"] * len(prompts)
rows = lambda prompts, **_: [[1.0, 2.0]] * len(prompts)
lazy = lambda prompts, **_: (1.0 for _ in prompts)
nan = lambda prompts, **_: [math.nan] * len(prompts)
number = 3

def third_time(prompts, completions, **_):
    """Fails at its third call, unless a file says that it was mended."""
    third_time.calls = getattr(third_time, "calls", 0) + 1
    broken = third_time.calls == 3 and not os.path.exists("mended")
    return [None if broken else len(c) / 10 for c in completions]

def interrupt(prompts, **_):
    raise KeyboardInterrupt
''',
    "syntax.py": "def f(:\n",
    "imports.py": "import a_module_that_nobody_has\n",
}  # fmt: skip


def save(folder: Path, model: Any, tokenizer: Any = None) -> None:
    model.save_pretrained(folder)
    (tokenizer or toys.tokenizer()).save_pretrained(folder)


def models(folder: Path, paths: Box) -> None:
    """Checkpoints that are not what a stage expects, each in a folder of its own."""
    narrow = {"vocab_size": len(toys.WORDS), "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    llama = LlamaForCausalLM.from_pretrained(paths["model"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(folder / "bert", transformers.BertForMaskedLM(BertConfig(**narrow, **heads)))
        t5 = T5Config(vocab_size=16, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
        save(folder / "t5", transformers.T5ForConditionalGeneration(t5))
        save(folder / "mamba", transformers.MambaForCausalLM(MambaConfig(**narrow, state_size=4)))
        gpt2 = GPT2Config(vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=16)
        save(folder / "gpt2", transformers.GPT2LMHeadModel(gpt2))
        toys.reward_model(folder / "wide", toys.language_model(folder / "wide_model", hidden_size=64))
    save(folder / "without_eos", llama, toys.tokenizer(eos_token=""))
    save(folder / "without_pad", llama, toys.tokenizer(pad_token=""))
    save(folder / "other_words", llama, toys.tokenizer([*toys.WORDS, "huge"]))
    flat = RewardModel.from_pretrained(paths["reward_model"])
    flat.spread = 0.0
    save(folder / "flat", flat)
    toys.reward_model(folder / "other_order", paths["model"])
    toys.tokenizer(toys.WORDS[::-1]).save_pretrained(folder / "other_order")
    for name, spoil in {
        "no_weights": lambda f: (f / "model.safetensors").unlink(),
        "cut_weights": lambda f: cut(f / "model.safetensors"),
        "cut_config": lambda f: cut(f / "config.json"),
        "cut_tokenizer": lambda f: cut(f / "tokenizer.json"),
        "no_tokenizer": lambda f: [path.unlink() for path in f.glob("tokenizer*")],
    }.items():
        spoil(Path(shutil.copytree(paths["model"], folder / name)))
    shutil.copytree(folder / "t5", folder / "empty_t5", ignore=shutil.ignore_patterns("*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """The toys, and everything that is wrong: file name, or folder of a model, -> path."""
    folder = tmp_path_factory.mktemp("box")
    paths = toys.box(folder)
    wrong = folder / "wrong"
    wrong.mkdir()
    for name, content in FILES.items():
        (wrong / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    models(wrong, paths)
    return paths | {path.name.replace(".", "_"): str(path) for path in wrong.iterdir()} | {"wrong": str(wrong)}


def command(stage: str, box: Box, output_dir: Path | str, **changes: Any) -> list[str]:
    if stage == "kto":
        stage, changes = "dpo", {"loss": "kto", "data": box["unpaired"], "eval_data": box["labelled"]} | changes
    chosen = toys.options(stage, box) | {"output_dir": str(output_dir)} | changes
    return toys.command(stage, {name: toys.filled(value, box) for name, value in chosen.items() if value != ()})


@toys.one_thread()
def refused(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """The one sentence that a failing command ends with; everything above it on the terminal is progress."""
    assert cli.main(args) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    return the_sentence(printed.err, args[0])


def the_sentence(err: str, name: str) -> str:
    assert "Traceback" not in err
    *above, last = err.rstrip("\n").split("\n")
    assert last.startswith(f"twinhead {name}: ")
    assert not any(line.startswith("twinhead ") for line in above)
    return last.removeprefix(f"twinhead {name}: ")


ROWS = [
    ("sft", "data", "no_completion_jsonl", " row 2: expected the columns prompt and completion (or response, or "
     "answer), or messages, got the columns prompt"),
    ("pretrain", "data", "no_text_jsonl", " row 1: expected the column text, got the columns txt"),
    ("reward", "data", "no_answers_jsonl", " row 1: expected the columns chosen and rejected (with or without prompt), "
     "or prompt, completions and ranks, got the columns prompt"),
    ("ppo", "prompts", "no_prompt_jsonl", " row 1: expected the column prompt, got the columns question"),
    ("sft", "eval_data", "no_completion_jsonl", " row 2: expected the columns"),
    ("reward", "eval_data", "no_answers_jsonl", " row 1: expected the columns"),
    ("reward", "demonstrations", "no_completion_jsonl", " row 2: expected the columns"),
    ("ppo", "ptx_data", "no_text_jsonl", " row 1: expected the column text, got the columns txt"),
    ("sft", "data", "number_jsonl", " row 2: expected completion to be text or a list of messages, got int"),
    ("sft", "data", "broken_jsonl", " line 2: not valid JSON (Unterminated string starting at column 12)"),
    ("sft", "data", "list_jsonl", " row 2: expected an object with named columns, got list"),
    ("sft", "data", "latin_jsonl", " line 1: not valid UTF-8 (invalid continuation byte at byte 13)"),
    ("sft", "data", "empty_jsonl", ": expected at least one row, found none"),
    ("sft", "data", "table_csv", ": expected a file that ends in .jsonl, .json, .parquet, .txt, got .csv"),
    ("sft", "data", "nothing_ever_said_jsonl", ": no row is left: 2 rows, 2 dropped (empty completion: rows 1, 2)"),
    ("sft", "data", "too_long_jsonl", ": no row is left: 1 row, 1 dropped (prompt alone fills 16 tokens: row 1)"),
    ("ppo", "prompts", "too_long_jsonl", ": no row is left: 1 row, 1 dropped (prompt longer than 8 tokens: row 1)"),
    ("reward", "data", "tied_jsonl", ": no row is left: 1 row, 1 dropped (all answers tied: row 1)"),
    ("reward", "data", "ranks_jsonl", " row 1: expected one rank per completion (2), got 1"),
    ("reward", "eval_data", "labeler_jsonl", " row 1: expected labeler_id to be text or an integer, got list"),
    ("sft", "data", "wrong/nowhere.jsonl", ": no such file or folder"),
    ("grpo", "prompts", "no_prompt_jsonl", " row 1: expected the column prompt, got the columns question"),
    ("grpo", "prompts", "too_long_jsonl", ": no row is left: 1 row, 1 dropped (prompt longer than 8 tokens: row 1)"),
    ("dpo", "data", "no_answers_jsonl", " row 1: expected the columns chosen and rejected (with or without prompt), "
     "or prompt, completions and ranks, got the columns prompt"),
    ("dpo", "data", "praise_jsonl", " row 1: expected the columns chosen and rejected (with or without prompt), "
     "or prompt, completions and ranks, got the columns prompt, completion, label"),
    ("dpo", "eval_data", "no_answers_jsonl", " row 1: expected the columns"),
    ("dpo", "data", "tied_jsonl", ": no row is left: 1 row, 1 dropped (all answers tied: row 1)"),
    ("kto", "data", "asked_jsonl", " row 1: expected the columns prompt, completion and label, or chosen and rejected, "
     "got the columns prompt, completion, lable"),
    ("kto", "data", "labels_jsonl", " row 1: expected label to be true or false, got 1"),
    ("kto", "data", "praise_jsonl", ": expected good and bad answers, got only good ones (label true)"),
    ("kto", "data", "blame_jsonl", ": expected good and bad answers, got only bad ones (label false)"),
    ("kto", "eval_data", "praise_jsonl", ": expected good and bad answers, got only good ones (label true)"),
    ("kto", "data", "one_prompt_jsonl", ": expected answers to at least two prompts, got one prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "option", "name", "sentence"), ROWS)
def test_a_wrong_row_is_named(
    stage: str, option: str, name: str, sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = box[name] if name in box else f"{box['wrong']}/{name}"
    found = refused(command(stage, box, tmp_path / "run", **{option: path}), capsys)
    assert found.startswith(path + sentence)
    assert left_in(tmp_path / "run") == []


def left_in(run: Path) -> list[str]:
    """What a run has written, apart from its logs."""
    return [name for name in toys.files(run) if name not in ("metrics.jsonl", "timings.jsonl")]


@pytest.mark.parametrize(
    ("stage", "changes", "sentence"),
    [
        ("sft", {"data": "{nothing_said_jsonl}"}, "sft  2 rows, 1 dropped (empty completion: row 2)"),
        ("sft", {"data": "{long_jsonl}"}, "sft  2 rows, 1 dropped (prompt alone fills 16 tokens: row 2)"),
        ("ppo", {"prompts": "{long_jsonl}"}, "ppo  2 rows, 1 dropped (prompt longer than 8 tokens: row 2)"),
        ("sft", {"data": "{demonstrations}", "max_length": 5}, "sft  40 rows, 40 cut (rows 1, 2, 3, 4, 5, ...)"),
    ],
)
def test_what_teaches_nothing_is_dropped_and_counted(
    stage: str, changes: dict[str, Any], sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with toys.one_thread():
        assert cli.main(command(stage, box, tmp_path / "run", **changes)) == 0
    assert sentence in capsys.readouterr().err.splitlines()
    assert len(toys.metrics(tmp_path / "run")) == 3


MODELS = [
    ("sft", {"model": "{wrong}/nowhere"}, "expected a checkpoint folder, got '{wrong}/nowhere', which does not exist"),
    ("sft", {"model": "{no_tokenizer}"}, "expected a tokenizer in '{no_tokenizer}', found no"),
    ("sft", {"model": "{cut_tokenizer}"}, "expected a tokenizer in '{cut_tokenizer}', found none that loads ("),
    ("sft", {"model": "{without_eos}"}, "{without_eos}: expected a tokenizer with an end-of-sequence token, got none"),
    ("ppo", {"model": "{without_eos}"}, "{without_eos}: expected a tokenizer with an end-of-sequence token, got none"),
    ("sft", {"model": "{cut_config}"}, "expected a tokenizer in '{cut_config}', found none that loads (It looks like"),
    ("sft", {"model": "{no_weights}"}, "'{no_weights}' cannot be loaded as AutoModelForCausalLM: Error no file named"),
    ("sft", {"model": "{cut_weights}"}, "'{cut_weights}' cannot be loaded as AutoModelForCausalLM: Error while"),
    ("reward", {"model": "{cut_weights}"}, "'{cut_weights}' cannot be loaded as AutoModelForSequenceClassification:"),
    ("sft", {"model": "{bert}"}, "BertLMHeadModel cannot be used: "),
    ("sft", {"model": "{t5}"}, "'{t5}' cannot be loaded as AutoModelForCausalLM: Unrecognized configuration class"),
    ("pretrain", {"model": "{empty_t5}"}, "'{empty_t5}' holds no configuration of a causal language model: "),
    ("reward", {"model": "{t5}"}, "'{t5}': expected the weights of a language model, but it lacks "),
    ("ppo", {"model": "{t5}"}, "'{t5}' cannot be loaded as AutoModelForCausalLM: Unrecognized configuration class"),
    ("sft", {"model": "{mamba}"}, "MambaForCausalLM cannot be used: expected 2 calls of the attention function"),
    ("sft", {"model": "{reward_model}"}, "'{reward_model}': expected the weights of a causal language model, but"),
    ("ppo", {"reward_model": "{model}"}, "'{model}': expected the weights of a reward model with one label, but"),
    ("ppo", {"reward_model": "{wrong}/nowhere"},
     "expected a checkpoint folder, got '{wrong}/nowhere', which does not exist"),
    ("ppo", {"reward_model": "{other_order}"}, "reward_model: expected the policy's tokenizer (16 tokens), got "
     "another one (16 tokens) in '{other_order}'"),
    ("ppo", {"reward_models": ("{reward_model}", "{flat}")}, "reward_models: expected a spread above 0, got 0.0 of "
     "member 2"),
    ("ppo", {"reward_models": ("{reward_model}", "{other_order}")}, "reward_model: expected the policy's tokenizer"),
    ("ppo", {"reward_models": ("{reward_model}",), "value_init": "reward_model"}, "value_init: expected a reward_model "
     "to take the value head from"),
    ("ppo", {"reference": "{other_order}"}, "reference: expected the policy's tokenizer (16 tokens), got another one"),
    ("ppo", {"reference": "{reward_model}"}, "'{reward_model}': expected the weights of a causal language model, but"),
    ("ppo", {"value_init": "reward_model"}, "value_init: expected a reward_model to take the value head from"),
    ("ppo", {"value_init": "reward_model", "reward_model": "{wide}"}, "value_init: expected a reward model of "
     "the policy's width 32, got 64"),
    ("sft", {"model": "{other_words}", "data": "{huge_jsonl}"}, "sequence 0: expected token ids in [0, 16), "
     "the rows of the model's embedding, got 0..16: its tokenizer belongs to another model"),
    ("ppo", {"model": "{other_words}", "prompts": "{huge_jsonl}"}, "sequence 0: expected token ids in [0,"),
    ("sft", {"model": "{gpt2}", "data": "{too_long_jsonl}", "max_length": 64}, "sequence 0: expected at most the "
     "model's 16 tokens, got 23"),
    ("sft", {"model": "{gpt2}", "eval_data": "{too_long_jsonl}", "max_length": 64}, "sequence 40: expected at most"),
    ("pretrain", {"model": "{gpt2}", "data": "{long_text_jsonl}", "max_length": 64}, "sequence 0: expected at most"),
    ("ppo", {"model": "{gpt2}", "max_new_tokens": 14}, "sequence 0: expected at most the model's 16 tokens, got 3 and"),
    ("ppo", {"model": "{gpt2}", "ptx_data": "{long_text_jsonl}"}, "sequence 0: expected at most the model's 16"),
    ("grpo", {"model": "{t5}"}, "'{t5}' cannot be loaded as AutoModelForCausalLM: Unrecognized configuration class"),
    ("grpo", {"reward_model": "{other_order}"}, "reward_model: expected the policy's tokenizer (16 tokens), got "),
    ("grpo", {"model": "{gpt2}", "max_new_tokens": 14}, "sequence 0: expected at most the model's 16 tokens, got 3"),
    ("dpo", {"reference": "{other_order}"}, "reference: expected the policy's tokenizer (16 tokens), got another one "
     "(16 tokens) in '{other_order}'"),
    ("dpo", {"reference": "{other_words}"}, "reference: expected the policy's tokenizer (16 tokens), got another one "
     "(17 tokens) in '{other_words}'"),
    ("dpo", {"reference": "{wrong}/nowhere"}, "expected a checkpoint folder, got '{wrong}/nowhere', which does not"),
    ("dpo", {"reference": "{reward_model}"}, "'{reward_model}': expected the weights of a causal language model, but"),
    ("dpo", {"reference": "{cut_weights}"}, "'{cut_weights}' cannot be loaded as AutoModelForCausalLM: Error while"),
    ("dpo", {"reference": "{gpt2}", "data": "{long_pair_jsonl}", "max_length": 64}, "sequence 0: expected at most the "
     "model's 16 tokens, got 23"),
    ("dpo", {"model": "{gpt2}", "data": "{long_pair_jsonl}", "max_length": 64, "precompute_reference": True},
     "sequence 0: expected at most the model's 16 tokens, got 23"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "sentence"), MODELS)
def test_a_wrong_model_is_named(
    stage: str, changes: dict[str, Any], sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(command(stage, box, tmp_path / "run", **changes), capsys)
    assert found.startswith(sentence.format(**box))
    assert left_in(tmp_path / "run") == []


def test_a_tokenizer_without_pad_is_good_enough(box: Box, tmp_path: Path) -> None:
    run = toys.train("sft", box, tmp_path / "run", model=box["without_pad"])
    saved = transformers.AutoTokenizer.from_pretrained(run.dir)
    assert saved.pad_token == saved.eos_token == "</s>"


REWARDS = [
    ("few", "reward function <lambda>: expected 8 scores, got 1"),
    ("none", "reward function <lambda>: expected 8 scores, got NoneType"),
    ("nones", "reward function <lambda>: expected a number for row 1, got None"),
    ("words", "reward function <lambda>: expected a number for row 0, got 'good'"),
    ("rows", "reward function <lambda>: expected a number for row 0, got [1.0, 2.0]"),
    ("lazy", "reward function <lambda>: expected 8 scores, got generator"),
    ("nan", "step 10: 10 batches in a row were skipped, the last one for non-finite scores in rows [0, 1, 2, 3, 4]"),
    ("number", "reward_functions: expected a function 'number' in {functions_py}, found none"),
    ("nothing", "reward_functions: expected a function 'nothing' in {functions_py}, found none"),
]


@pytest.mark.parametrize(("name", "sentence"), REWARDS)
def test_a_wrong_reward_is_named(
    name: str, sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = (box["functions_py"] + ":" + name,)
    found = refused(command("ppo", box, tmp_path / "run", reward_functions=functions, steps=20), capsys)
    assert found == sentence.format(**box)


STEPS = [
    ("none", "reward function <lambda>: expected 12 scores, got NoneType"),
    ("nan", "reward function <lambda>: expected a list of 5 step rewards for row 0, one per token, got float"),
    ("rows", "reward function <lambda>: expected a list of 5 step rewards for row 0, one per token, got 2"),
    ("number", "process_function: expected a function 'number' in {functions_py}, found none"),
]


@pytest.mark.parametrize(("name", "sentence"), STEPS)
def test_a_wrong_process_reward_is_named(
    name: str, sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = box["functions_py"] + ":" + name
    found = refused(command("grpo", box, tmp_path / "run", process_function=process), capsys)
    assert found == sentence.format(**box)


def test_grpo_gives_up_on_scores_that_are_no_numbers(
    box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = (box["functions_py"] + ":nan",)
    found = refused(command("grpo", box, tmp_path / "run", reward_functions=functions, steps=20), capsys)
    assert found.startswith("step 10: 10 batches in a row were skipped, the last one for non-finite scores in rows [0,")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward_functions": ()}, "expected a reward_model or at least one reward function, got neither"),
        ({"reward_functions": ("{wrong}/nowhere.py:f",)}, "reward_functions: expected file.py:function with an "
         "existing file or group_diversity or batch_diversity, got '{wrong}/nowhere.py:f'"),
        ({"reward_functions": ("goodness",)}, "reward_functions: expected file.py:function with an existing file or "
         "group_diversity or batch_diversity, got 'goodness'"),
        ({"reward_functions": ("{syntax_py}:f",)}, "reward_functions: {syntax_py} cannot be imported (invalid syntax"),
        ({"reward_functions": ("{imports_py}:f",)}, "reward_functions: {imports_py} cannot be imported (No module"),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights: expected one per source (goodness), got [1.0, 2.0]"),
        ({"prompts": "{column_jsonl}"}, "prompts: the column 'finished' is an argument of reward functions itself"),
        ({"kl_target_nats": -1.0}, "adaptive KL: expected target and horizon above 0, got -1.0 and 10000"),
    ],
)  # fmt: skip
def test_a_wrong_source_of_rewards_is_named(
    changes: dict[str, Any], sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refused(command("ppo", box, tmp_path / "run", **changes), capsys)
    assert found.startswith(sentence.format(**box))
    assert left_in(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--learnin_rate", "1"], "unknown option 'learnin_rate', did you mean 'learning_rate'?"),
        (["--learnin-rate=1"], "unknown option 'learnin_rate', did you mean 'learning_rate'?"),
        (["--top_p", "0.9"], "unknown option 'top_p'"),  # a filter would sample from another policy than learns
        (["--zzz", "1"], "unknown option 'zzz'; the options are output_dir, seed, device, "),
        (["--config"], "--config: expected the path of a YAML file, got nothing"),
        (
            ["--config", "{wrong}/no.yaml"],
            "--config: expected a YAML file, got '{wrong}/no.yaml', which does not exist",
        ),
        (["--config", "{unknown_yaml}"], "unknown option 'learnin_rate', did you mean 'learning_rate'?"),
        (["--config={unknown_yaml}"], "unknown option 'learnin_rate', did you mean 'learning_rate'?"),
        (["--config", "{broken_yaml}"], "{broken_yaml}: not valid YAML (while parsing a flow sequence"),
        (["--config", "{list_yaml}"], "{list_yaml}: expected a mapping of options, got list"),
        (["--config", "{latin_yaml}"], "{latin_yaml}: not valid YAML ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_wrong_option_is_named(
    args: list[str], sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [arg.format(**box) for arg in args]
    found = refused([*command("sft", box, tmp_path / "run"), *words], capsys)
    assert found.startswith(sentence.format(**box))
    assert not (tmp_path / "run").exists()


VALUES = [
    ("sft", {"learning_rate": -1}, "learning_rate: expected at least 0, got -1.0"),
    ("sft", {"schedule": "square"}, "schedule: expected one of constant, linear, cosine, got 'square'"),
    ("sft", {"dtype": "float8"}, "dtype: expected one of float32, bfloat16, mixed, got 'float8'"),
    ("sft", {"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
    ("sft", {"warmup_ratio": 2}, "warmup_ratio: expected a share between 0 and 1, got 2.0"),
    ("sft", {"tokens_per_micro": 0}, "tokens_per_micro: expected at least 1, got 0"),
    ("sft", {"max_length": 1}, "max_length: expected at least 2, got 1"),
    ("sft", {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ("sft", {"keep_checkpoints": 0}, "keep_checkpoints: expected at least 1, got 0"),
    ("reward", {"epochs": 0}, "epochs: expected at least 1, got 0"),
    ("reward", {"loss": "softmax"}, "loss: expected one of pairwise, listwise, got 'softmax'"),
    ("reward", {"centring_coef": -0.1}, "centring_coef: expected at least 0, got -0.1"),
    ("reward", {"centring_coef": "nan"}, "centring_coef: expected at least 0, got nan"),
    ("ppo", {"minibatches": 9}, "minibatches: expected 1 to rollouts_per_step, got 9"),
    ("ppo", {"temperature": 0}, "temperature: expected above 0 (a greedy policy explores nothing), got 0.0"),
    ("ppo", {"old_logprobs": "none"}, "old_logprobs: expected rollout or recompute, got 'none'"),
    ("ppo", {"critic": "none"}, "critic: expected one of shared, detached, branch, separate, got 'none'"),
    ("ppo", {"branch_layers": 0}, "branch_layers: expected at least 1, got 0"),
    ("ppo", {"critic_learning_rate": 1e-3}, "critic_learning_rate: expected at least 0, with critic=branch or"),
    ("ppo", {"critic": "branch", "critic_learning_rate": -1}, "critic_learning_rate: expected at least 0, with critic"),
    ("ppo", {"critic_warmup": -1}, "critic_warmup: expected at least 0, got -1"),
    ("ppo", {"critic_model": "m"}, "critic_model: expected none but with critic=separate, and then none with"),
    (
        "ppo",
        {"critic": "separate", "critic_model": "m", "value_init": "reward_model"},
        "critic_model: expected none but with critic=separate, and then none with value_init=reward_model, whose trunk",
    ),
    ("ppo", {"kl_kind": "k4"}, "kl_kind: expected one of k1, k2, k3, full, got 'k4'"),
    ("ppo", {"kl_in": "both"}, "kl_in: expected reward, or loss with another kl_kind than k1"),
    ("ppo", {"kl_in": "loss"}, "kl_in: expected reward, or loss with another kl_kind than k1, whose expected gradient"),
    ("ppo", {"advantage": "td"}, "advantage: expected one of gae, bandit"),
    ("ppo", {"ema_decay": 1}, "ema_decay: expected at least 0 and below 1, got 1.0"),
    ("ppo", {"stop_kl_nats": 0}, "stop_kl_nats: expected above 0, got 0.0"),
    ("ppo", {"eval_prompts": "p"}, "eval_prompts: expected none without eval_every, got 'p'"),
    ("ppo", {"best_by": "eval/score"}, "best_by: expected none without eval_every, got 'eval/score'"),
    ("ppo", {"patience": 2}, "patience: expected at least 0, with best_by, got 2"),
    ("ppo", {"reward_model": "a", "reward_models": ("b",)}, "reward_models: expected none beside a reward_model, got"),
    ("ppo", {"ensemble": "min"}, "ensemble: expected one of mean, min, mean_std, with reward_models, got 'min'"),
    ("ppo", {"ensemble": "max", "reward_models": ("a",)}, "ensemble: expected one of mean, min, mean_std, with"),
    ("ppo", {"ensemble_coef": 2}, "ensemble_coef: expected at least 0, with ensemble=mean_std, got 2.0"),
    ("ppo", {"ensemble_coef": -1, "ensemble": "mean_std", "reward_models": ("a",)}, "ensemble_coef: expected at least"),
    ("ppo", {"value_init": "one"}, "value_init: expected one of zero, sft, reward_model, got 'one'"),
    ("ppo", {"kl_coef": 0, "kl_target_nats": 1}, "kl_target_nats: expected none with a kl_coef of 0"),
    ("ppo", {"score_clip": 0}, "score_clip: expected above 0, got 0.0"),
    ("ppo", {"lam": 1.5}, "lam: expected 0 to 1, got 1.5"),
    ("ppo", {"ptx_batch_size": 0}, "ptx_batch_size: expected at least 1, got 0"),
    ("grpo", {"steps": 0}, "steps: expected at least 1, got 0"),
    ("grpo", {"prompts_per_step": 0}, "prompts_per_step: expected at least 1, got 0"),
    ("grpo", {"group_size": 1}, "group_size: expected at least 2 (an answer is compared with the others), got 1"),
    ("grpo", {"minibatches": 13}, "minibatches: expected 1 to the step's answers, got 13"),
    ("grpo", {"epochs": 0}, "epochs: expected at least 1, got 0"),
    ("grpo", {"temperature": 0}, "temperature: expected above 0 (greedy answers are all the same), got 0.0"),
    ("grpo", {"old_logprobs": "none"}, "old_logprobs: expected rollout or recompute, got 'none'"),
    ("grpo", {"importance_cap": 2}, "importance_cap: expected above 0, with old_logprobs=recompute, got 2.0"),
    ("grpo", {"mismatch_alarm": 0}, "mismatch_alarm: expected above 0, got 0.0"),
    ("grpo", {"loss": "ppo"}, "loss: expected one of grpo, dr_grpo, dapo, rloo, gspo, got 'ppo'"),
    ("grpo", {"clip_low": 1.5}, "clip_low: expected 0 to 1, got 1.5"),
    ("grpo", {"clip_high": -0.1}, "clip_high: expected at least 0, got -0.1"),
    ("grpo", {"beta": -1}, "beta: expected at least 0 (0: no reference), got -1.0"),
    ("grpo", {"resample": -1}, "resample: expected at least 0 (0: groups stay as they are), got -1"),
    ("grpo", {"overlong_buffer": 6}, "overlong_buffer: expected 0 to max_new_tokens, got 6"),
    ("grpo", {"eval_every": -1}, "eval_every: expected at least 0 (0: never), got -1"),
    ("dpo", {"loss": "simpo"}, "loss: expected one of sigmoid, robust, hinge, ipo, ipo_mean, kto, got 'simpo'"),
    ("dpo", {"beta": 0}, "beta: expected above 0, got 0.0"),
    ("dpo", {"beta": -0.1}, "beta: expected above 0, got -0.1"),
    ("dpo", {"beta": "nan"}, "beta: expected above 0, got nan"),
    ("dpo", {"label_smoothing": 0.5}, "label_smoothing: expected at least 0 and below 0.5, got 0.5"),
    ("dpo", {"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing: expected 0 with loss=ipo, which has none, got"),
    ("kto", {"label_smoothing": 0.1}, "label_smoothing: expected 0 with loss=kto, which has none, got 0.1"),
    ("dpo", {"desirable_weight": 2.0}, "desirable_weight: expected 1 with loss=sigmoid, which has none, got 2.0"),
    ("dpo", {"undesirable_weight": 0.5, "loss": "robust"}, "undesirable_weight: expected 1 with loss=robust, which"),
    ("kto", {"desirable_weight": -1.0}, "desirable_weight: expected at least 0, got -1.0"),
    ("kto", {"undesirable_weight": "inf"}, "undesirable_weight: expected at least 0, got inf"),
    ("dpo", {"epochs": 0}, "epochs: expected at least 1, got 0"),
    ("dpo", {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ("dpo", {"max_length": 1}, "max_length: expected at least 2, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "sentence"), VALUES)
def test_a_wrong_value_is_named(
    stage: str, changes: dict[str, Any], sentence: str, box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(command(stage, box, tmp_path / "run", **changes))
    assert exit_code.value.code == 2
    assert sentence in unboxed(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def unboxed(text: str) -> str:
    """The words of what stands in a frame of the terminal's width."""
    return " ".join(re.sub(r"[│╭╮╰╯─|]+|-{4,}", " ", text).split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sft", "--data", "x"], ["--model", "required"]),
        (["ppo"], ["--model", "--prompts", "--steps", "required"]),
        (["sft", "--model", "m", "--data", "d", "--steps", "many"], ["--steps", "many"]),
        (["sft", "--model", "m", "--data", "d", "word"], ["word"]),
        (["generate", "--model", "m"], ["expected one of --prompt, --instruction and --prompts"]),
        (
            ["generate", "--model", "m", "--prompt", "one", "--prompts", "p"],
            ["expected one of --prompt, --instruction and --prompts"],
        ),
        (
            ["generate", "--model", "m", "--instruction", "one", "--prompt", "p"],
            ["expected one of --prompt, --instruction and --prompts"],
        ),
        (
            ["generate", "--model", "m", "--prompt", "one", "--input", "two"],
            ["input: expected nothing without --instruction, got 'two'"],
        ),
        (
            ["generate", "--model", "m", "--prompt", "one", "--top_p", "2"],
            ["top_p: expected above 0 and at most 1, got 2.0"],
        ),
        (["evaluate", "--model", "m"], ["nothing to measure: expected --model with --data or --text"]),
    ],
)
def test_a_missing_or_unreadable_option_is_named(
    args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(args)
    assert exit_code.value.code == 2
    printed = unboxed(capsys.readouterr().err)
    assert all(word in printed for word in words), printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_output_folder_that_is_a_file_is_refused(below: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    found = refused(command("sft", box, box["file"] + below), capsys)
    assert found.startswith(f"output_dir: expected a folder, got '{box['file'] + below}' (")
    assert Path(box["file"]).read_text() == FILES["file"]


def test_the_command_itself_prints_one_sentence_and_fails(box: Box, tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; from twinhead.engine.cli import main; sys.exit(main())"]
    args = command("sft", box, tmp_path / "run", data="{no_completion_jsonl}")
    done = subprocess.run([*words, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert the_sentence(done.stderr, "sft").startswith(box["no_completion_jsonl"] + " row 2: expected the columns")


# -- what is done is not lost ------------------------------------------------------------------------------------------


SAVED = {"save_every": 1, "keep_checkpoints": 5, "steps": 4}


@pytest.fixture(scope="module")
def whole(box: Box, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mended").touch()
    return mend(folder, box)


def failing(box: Box) -> list[str]:
    return command("ppo", box, "run", **SAVED, reward_functions=("{functions_py}:third_time",))


def mend(folder: Path, box: Box) -> dict[str, bytes]:
    """Run what failed again, without what made it fail; the files that it leaves in the end."""
    (folder / "mended").touch()
    with pytest.MonkeyPatch.context() as patch, toys.one_thread():
        patch.chdir(folder)
        assert cli.main(failing(box)) == 0
    files = toys.files(folder / "run")
    del files["timings.jsonl"]
    return files


def assert_intact(run: Path, steps: int) -> None:
    """These steps were saved, whole, and nothing else lies around."""
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [f"checkpoint-{i + 1}" for i in range(steps)]
    for step in range(1, steps + 1):
        LlamaForCausalLM.from_pretrained(run / f"checkpoint-{step}")
        checkpoint.load_state(run / f"checkpoint-{step}")
    assert not (run / "config.json").exists()


def test_a_reward_function_that_fails_later_costs_one_step(
    box: Box,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(failing(box), capsys) == "reward function third_time: expected a number for row 0, got None"
    assert_intact(tmp_path / "run", steps=2)
    assert mend(tmp_path, box) == whole


def test_an_interrupt_says_how_to_go_on(box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = command("ppo", box, tmp_path / "run", reward_functions=("{functions_py}:interrupt",))
    assert refused(args, capsys, code=130) == "interrupted; the same command goes on from the last checkpoint"


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(
    box: Box, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    found = refused(command("sft", box, tmp_path / "run"), capsys)
    assert found == f"{tmp_path / 'run'}: a checkpoint needs 0 MB, but only 0 MB are free on this disk"
    assert left_in(tmp_path / "run") == []
    assert toys.metrics(tmp_path / "run") == []


def third(owner: Any, name: str) -> None:
    """From the third call of owner.name on, no file may grow beyond 300 bytes."""
    original, calls = getattr(owner, name), iter(range(1, 100))

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        return original(*args, **kwargs)

    setattr(owner, name, full)


FULL: dict[str, tuple[Callable[[], None], str, int]] = {
    "weights": (lambda: third(Run, "save"), "could not write run/checkpoint-3: ", 2),
    "tokenizer": (
        lambda: third(Text, "save_pretrained"),
        "could not write run/checkpoint-3: the tokenizer cannot be",
        2,
    ),
    "optimizer": (lambda: third(checkpoint, "save_state"), "could not write run/checkpoint-3: ", 2),
    "metrics": (lambda: third(JsonLines, "write"), "could not write run/", 0),
    "final": (lambda: third(checkpoint, "merge_folder"), "could not write run/.export: ", 4),
}


def full_disk(folder: Path, args: list[str], moment: str, answer: Connection) -> None:
    """What a child does."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    if moment == "final":
        finish = Run.finish
        Run.finish = lambda self: [resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)), finish(self)][1]
    else:
        FULL[moment][0]()
    answer.send((cli.main(args), sys.stderr.getvalue()))


@pytest.mark.parametrize("moment", FULL)
def test_a_disk_that_fills_up_leaves_what_was_saved(
    moment: str, box: Box, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    (tmp_path / "mended").touch()
    ours, theirs = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=full_disk, args=(tmp_path, failing(box), moment, theirs))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    code, err = ours.recv()
    _, sentence, steps = FULL[moment]
    found = the_sentence(err, "ppo")
    assert code == 1
    assert found.startswith(sentence)
    assert "File too large" in found
    assert found.endswith("earlier checkpoints are intact") or moment == "metrics"
    assert_intact(tmp_path / "run", steps)
    assert mend(tmp_path, box) == whole
