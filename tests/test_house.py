"""The house rules, executed: what imports what, what a file may hold, and that every option does something.

A rule is a function from one source file to its violations. `RULES` lists them, and `PLANTED` holds files that each
must refuse. What ruff and mypy can check is a line of pyproject.toml instead: see test_linters.py.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE, MAX_FUNCTION = 400, 60

# Top to bottom: a module imports only from lines below its own. `engine/__init__.py` stands above all of them.
LAYERS = """
    cli
    demo refresh
    presets
    sft reward dpo ppo grpo
    arrangements
    planning
    run evaluate report labeler reference best_of penalty validation backbone
    shares
    checkpoint generate scorers experience selection ema
    step
    policy data optim docstrings diversity meter
    critic outline
    trunk
    weights graphs lora formats preferences
    cache
    attention
    losses text mismatch sampling flash adam milestones best
    rows curves options rollout_options linear
    config metrics batch pictures page templates residence memory
    ranks
"""
DEPTH = {module: depth for depth, line in enumerate(LAYERS.split("\n")) for module in line.split()}


@dataclass(frozen=True)
class Source:
    """One Python file of the repository, or one that a test has planted."""

    path: str  # from the repository's root, with forward slashes
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def folders(self) -> tuple[str, ...]:
        return Path(self.path).parts[:-1]

    @cached_property
    def stem(self) -> str:
        return Path(self.path).stem

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of everything imported; `from a import b` is `a.b` (ruff bans relative ones)."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found

    def nodes(self, *kinds: type) -> Iterator:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


Rule = Callable[[Source], Iterator[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def in_engine(source: Source) -> bool:
    return source.folders[0] == "engine"


def in_kernels(source: Source) -> bool:
    return source.folders[0] == "kernels"


def shipped(source: Source) -> bool:
    return in_engine(source) or in_kernels(source)


def layers_point_down(source: Source) -> Iterator[str]:
    """The engine's modules import only from lower layers, never from their own, and each has a layer."""
    if not in_engine(source) or source.path == "engine/__init__.py":
        return
    module = source.folders[1] if len(source.folders) > 1 else source.stem
    if module not in DEPTH:
        yield f"{module} has no place in LAYERS"
        return
    for line, name in source.imports:
        if name.startswith("twinhead.engine"):
            target = [*name.split("."), ""][2]
            if target != module and DEPTH.get(target, -1) <= DEPTH[module]:
                yield f"line {line}: {module} imports {name}, which is not below it"


def kernels_need_only_torch(source: Source) -> Iterator[str]:
    """twinhead.kernels imports torch, Triton, NumPy, the standard library, and nothing else of ours."""
    if in_kernels(source):
        for line, name in source.imports:
            root = name.split(".")[0]
            if not (
                name.startswith("twinhead.kernels") or root in {"torch", "triton", "numpy", *sys.stdlib_module_names}
            ):
                yield f"line {line}: imports {name}"


def operations_have_one_door(source: Source) -> Iterator[str]:
    """Only an operation's own folder imports its reference.py, gpu.py and cpu.py."""
    for line, name in source.imports if shipped(source) else ():
        inside = re.match(r"twinhead\.(kernels\.\w+)\.(reference|gpu|cpu)\b", name)
        if inside and inside[1] != ".".join(source.folders):
            yield f"line {line}: imports {name} past the door twinhead.{inside[1]}"


def imports_are_declared(source: Source) -> Iterator[str]:
    """What the engine imports is in pyproject.toml (extras too, but those not at the top of a file)."""
    if not in_engine(source):
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"] + extras}
    allowed = {"twinhead", *sys.stdlib_module_names, *declared} | ({"yaml"} if "pyyaml" in declared else set())
    for line, name in source.imports:
        if name.split(".")[0] not in allowed:
            yield f"line {line}: imports {name}, which pyproject.toml does not list"


def files_stay_small(source: Source) -> Iterator[str]:
    """Files have at most 400 lines and functions at most 60."""
    if not shipped(source):
        return
    if (lines := len(source.text.splitlines())) > MAX_FILE:
        yield f"{lines} lines, expected at most {MAX_FILE}"
    for function in source.nodes(Function):
        if (lines := function.end_lineno - function.lineno + 1) > MAX_FUNCTION:
            yield f"line {function.lineno}: {function.name} has {lines} lines, expected at most {MAX_FUNCTION}"


def files_open_with_a_sentence(source: Source) -> Iterator[str]:
    """The docstring's first line says what the file is, in one sentence or as "name: sentence."."""
    first = (ast.get_docstring(source.tree) or "").partition("\n")[0]
    if source.text.strip() and not re.fullmatch(r"(\w[\w.]*: )?\S.* .*\.", first):
        yield f"expected a first line that is one sentence with a full stop, got {first!r}"


def files_are_named_by_a_noun(source: Source) -> Iterator[str]:
    """No file or folder is a drawer for whatever fits nowhere."""
    drawers = {"util", "utils", "helper", "helpers", "common", "base", "misc"}
    for name in drawers.intersection(re.split(r"[_/.]", source.path)):
        yield f"{name!r} names no thing"


def asserts_say_why(source: Source) -> Iterator[str]:
    """Every assertion outside the tests carries its sentence."""
    for node in source.nodes(ast.Assert) if shipped(source) else ():
        if node.msg is None:
            yield f"line {node.lineno}: assert {ast.unparse(node.test)} has no message"


def the_shift_lives_once(source: Source) -> Iterator[str]:
    """Only engine/batch.py knows that row t - 1 predicts token t; nobody else shifts a sequence by one."""
    if not in_engine(source) or source.stem == "batch":
        return
    per_token = re.compile(r"\b(\w*tokens|\w*ids|labels|targets|hidden|logits|\w*logprobs|values|rewards)$")
    for node in source.nodes(ast.Subscript):
        axes = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        shifts = [ast.unparse(axis) for axis in axes if ast.unparse(axis) in {"1:", ":-1"}]
        if shifts and (len(axes) > 1 or per_token.search(ast.unparse(node.value))):
            yield f"line {node.lineno}: {ast.unparse(node)} shifts by one"
    for node in source.nodes(ast.Attribute):
        if node.attr == "roll":
            yield f"line {node.lineno}: {ast.unparse(node)} shifts by rolling"


def public(body: list[ast.stmt]) -> list[ast.ClassDef | Function]:
    return [node for node in body if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_")]


def the_public_is_documented(source: Source) -> Iterator[str]:
    """Public functions and classes have a docstring."""
    for node in public(source.tree.body) if shipped(source) else ():
        if ast.get_docstring(node) is None:
            yield f"line {node.lineno}: {node.name} has no docstring"


def the_public_is_annotated(source: Source) -> Iterator[str]:
    """Public functions and the public methods of public classes have full annotations."""
    top = public(source.tree.body) if shipped(source) else []
    methods = [method for node in top if isinstance(node, ast.ClassDef) for method in public(node.body)]
    for node in [node for node in top + methods if isinstance(node, Function)]:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [arg.arg for arg in given if arg and arg.annotation is None and arg.arg not in {"self", "cls"}]
        if bare or node.returns is None:
            yield f"line {node.lineno}: {node.name} lacks the annotation of {', '.join(bare) or 'its result'}"


RULES: list[Rule] = [
    layers_point_down,
    kernels_need_only_torch,
    operations_have_one_door,
    imports_are_declared,
    files_stay_small,
    files_open_with_a_sentence,
    files_are_named_by_a_noun,
    asserts_say_why,
    the_shift_lives_once,
    the_public_is_documented,
    the_public_is_annotated,
]


def dataclasses_of(source: Source) -> Iterator[ast.ClassDef]:
    for node in source.nodes(ast.ClassDef):
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield node


def fields_of(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [line for line in node.body if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line)]


def options(sources: list[Source]) -> dict[str, tuple[Source, ast.ClassDef]]:
    """Every dataclass called Config or in a file of options, and by name those that it inherits from or holds."""
    known = {node.name: (source, node) for source in sources for node in dataclasses_of(source)}
    found = {
        f"{source.path} {node.name}": (source, node)
        for source in sources
        for node in dataclasses_of(source)
        if node.name == "Config" or source.stem.endswith("options")
    }
    waiting = list(found.values())
    while waiting:
        _, node = waiting.pop()
        words = " ".join(ast.unparse(part) for part in [*node.bases, *(line.annotation for line in fields_of(node))])
        for name in set(re.findall(r"\w+", words)) & known.keys() - found.keys() - {"Config"}:
            found[name] = known[name]
            waiting.append(known[name])
    return found


def reads(source: Source) -> set[str]:
    """Attribute names that a file reads, leaving out what only a dataclass's own validation looks at."""
    checks = [
        inner
        for node in dataclasses_of(source)
        for method in node.body
        if isinstance(method, Function) and method.name == "__post_init__"
        for inner in ast.walk(method)
    ]
    skipped = {id(node) for node in checks}
    loads = (n for n in source.nodes(ast.Attribute) if isinstance(n.ctx, ast.Load) and id(n) not in skipped)
    return {node.attr for node in loads}


def dead_options(sources: list[Source]) -> list[str]:
    """Options that nothing reads: neither their own file, nor one above or below it in the layers."""
    dead = []
    for source, node in options(sources).values():
        level = DEPTH.get(source.stem)
        near = [s for s in sources if s is source or DEPTH.get(s.stem) != level]
        alive = set().union(*(reads(s) for s in near))
        unread = [line.target.id for line in fields_of(node) if line.target.id not in alive]
        dead += [f"{source.path}: {node.name}.{name} is read nowhere" for name in unread]
    return dead


def read(*patterns: str) -> list[Source]:
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


SOURCES = read("engine/**/*.py", "kernels/**/*.py", "benchmarks/**/*.py", "tests/*.py", "tests/kernels/**/*.py")
DOCUMENTED = '"""gae: advantages from rewards and values."""\n'


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    violations = [f"{source.path}: {violation}" for source in SOURCES for violation in rule(source)]
    assert not violations, f"{rule.__doc__}\n" + "\n".join(violations)


def test_every_option_is_read() -> None:
    dead = dead_options([source for source in SOURCES if in_engine(source)])
    assert not dead, "\n".join(dead)


PLANTED = [
    (layers_point_down, "engine/losses.py", "from twinhead.engine.ppo import train"),
    (layers_point_down, "engine/losses.py", "from twinhead.engine import ppo"),
    (layers_point_down, "engine/losses.py", "def late():\n    import twinhead.engine.text"),
    (layers_point_down, "engine/ppo.py", "from twinhead.engine.grpo import train"),
    (layers_point_down, "engine/run.py", "from twinhead.engine import Policy"),
    (layers_point_down, "engine/novelty.py", ""),
    (kernels_need_only_torch, "kernels/gae/gpu.py", "from twinhead.engine.batch import Packed"),
    (kernels_need_only_torch, "kernels/__init__.py", "import transformers"),
    (operations_have_one_door, "engine/losses.py", "from twinhead.kernels.gae.cpu import forward"),
    (operations_have_one_door, "kernels/gae/__init__.py", "from twinhead.kernels.loss import reference"),
    (imports_are_declared, "engine/data.py", "import polars"),
    (files_stay_small, "engine/run.py", "x = 1\n" * (MAX_FILE + 1)),
    (files_stay_small, "kernels/gae/cpu.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
    (files_open_with_a_sentence, "engine/run.py", "import os"),
    (files_open_with_a_sentence, "engine/run.py", '"""Runs"""'),
    (files_are_named_by_a_noun, "engine/text_utils.py", ""),
    (files_are_named_by_a_noun, "kernels/common/gae.py", ""),
    (asserts_say_why, "engine/run.py", "assert 1"),
    (the_shift_lives_once, "engine/sft.py", "x = logits[:, :-1]"),
    (the_shift_lives_once, "engine/sft.py", "x = anything[..., 1:, :]"),
    (the_shift_lives_once, "engine/sft.py", "x = batch.input_ids[1:]"),
    (the_shift_lives_once, "engine/sft.py", "x = torch.roll(tokens, 1)"),
    (the_public_is_documented, "engine/run.py", "def f(x: int) -> int:\n    return x"),
    (the_public_is_documented, "kernels/gae/cpu.py", "class A:\n    x: int"),
    (the_public_is_annotated, "engine/run.py", "def f(x) -> int: ..."),
    (the_public_is_annotated, "engine/run.py", "def f(*x) -> int: ..."),
    (the_public_is_annotated, "kernels/gae/cpu.py", "class A:\n    def f(self, x: int): ..."),
]
ALLOWED = [
    ("engine/ppo.py", "from twinhead.engine import losses, run\nfrom twinhead.kernels import gae"),
    ("engine/cli.py", "import argparse\nimport yaml\nfrom twinhead.engine import demo, grpo, ppo"),
    ("engine/__init__.py", "from twinhead.engine.ppo import train\nfrom twinhead.engine.batch import pack"),
    (
        "engine/losses.py",
        "cuts = cu_rows[1:] - cu_rows[:-1]\nlast = tokens[-1:]\nfirst = tokens[:, :1]\nassert 1, 'so'",
    ),
    ("kernels/gae/__init__.py", "import torch\nfrom twinhead.kernels.gae import gpu, reference"),
    ("kernels/gae/gpu.py", "import triton\ndef _kernel(x, BLOCK): ...\ndef f(x: int) -> int:\n    '''Doc.'''"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_rule_sees_a_planted_violation(rule: Rule, path: str, text: str) -> None:
    assert len(list(rule(Source(path, text)))) == 1


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_the_rules_allow_what_is_good(path: str, text: str) -> None:
    source = Source(path, DOCUMENTED + text)
    assert [violation for rule in RULES for violation in rule(source)] == []


def test_every_rule_is_planted() -> None:
    assert {rule.__name__ for rule, _, _ in PLANTED} == {rule.__name__ for rule in RULES}


def test_dead_options_are_seen() -> None:
    shared = "@dataclass\nclass Seed:\n    seed: int\n    rare: int\n"
    config = "@dataclass(frozen=True)\nclass Config(Seed):\n    lr: float\n    clip: float\n    gamma: float\n"
    checked = "    def __post_init__(self):\n        print(self.gamma)\n"
    ppo = config + checked + "def train(config):\n    print(config.lr, config.seed)"
    grpo = "def train(config):\n    print(config.clip)"  # a neighbour's option, not this one's
    sources = [Source("engine/config.py", shared), Source("engine/ppo.py", ppo), Source("engine/grpo.py", grpo)]
    dead = [line.split()[1] for line in dead_options(sources)]
    assert dead == ["Config.clip", "Config.gamma", "Seed.rare"]


def test_no_file_names_a_machine() -> None:
    files = [
        path
        for folder in ("engine", "kernels", "csrc", "benchmarks", "tests", "docs", ".ci")
        for path in ROOT.glob(f"{folder}/**/*")
    ]
    files += [path for path in ROOT.iterdir() if path.name != ".git"]
    text = {".py", ".pyi", ".cpp", ".h", ".md", ".toml", ".json", ".yaml", ".yml", ""}
    private = re.compile(r"(?<![\w.~*])/(?:work|tmp|root)/")
    named = [path for path in files if path.is_file() and path.suffix in text and private.search(path.read_text())]
    assert not named, f"these mention a private path: {named}"


def test_an_operation_is_one_word_everywhere() -> None:
    """kernels/<op>/ has its reference and its tests; csrc/<op>.cpp and <op>_bindings.cpp belong to a kernels/<op>/."""
    folders = {path.parent.name for path in ROOT.glob("kernels/*/__init__.py")}
    assert folders == {path.parent.name for path in ROOT.glob("kernels/*/reference.py")}
    assert folders <= {path.stem.removeprefix("test_") for path in ROOT.glob("tests/kernels/test_*.py")}
    assert {path.stem.removesuffix("_bindings") for path in ROOT.glob("csrc/*.cpp")} <= {*folders, "bindings"}
