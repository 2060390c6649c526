"""What people install: the wheel holds everything and nothing else, and the kernels stand alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from twinhead.engine import cli

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "kernels", "csrc")


def python(program: str, folder: Path, **environment: str) -> list[str]:
    """The words that a fresh interpreter prints; `folder` is where it starts, and the first place it imports from."""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    run.check_returncode()
    return run.stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing built earlier can slip in."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(built)]
    subprocess.run([sys.executable, "-P", "-m", "pip", "wheel", *options, str(source)], check=True)
    (path,) = built.glob("twinhead-*.whl")
    return path


def test_the_wheel_holds_every_module_the_extension_and_the_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("twinhead/")}
    expected = {
        f"twinhead/{path.relative_to(ROOT).as_posix()}"
        for folder in ("engine", "kernels")
        for pattern in ("**/*.py", "py.typed", "_C.pyi")
        for path in (ROOT / folder).glob(pattern)
    }
    extensions = {name for name in held if name.startswith("twinhead/kernels/_C.") and name.endswith(".so")}
    assert {"twinhead/engine/py.typed", "twinhead/kernels/py.typed", "twinhead/kernels/_C.pyi"} <= expected
    assert len(extensions) == 1
    assert held == expected | extensions


def test_the_wheel_imports_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-P", "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    modules = ("twinhead.engine", "twinhead.kernels", "twinhead.kernels._C")
    program = f"import sys, {', '.join(modules)}; print(*(sys.modules[name].__file__ for name in {modules}))"
    loaded = python(program, tmp_path, PYTHONPATH=str(site))
    assert [Path(path).is_relative_to(site) for path in loaded] == [True] * len(modules)


def test_the_command_is_the_command_line(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (listing,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        (command,) = re.findall(r"^twinhead = (.+):(.+)$", archive.read(listing).decode(), flags=re.MULTILINE)
    assert command == ("twinhead.engine.cli", "main")
    assert callable(cli.main)


def test_kernels_stand_alone(tmp_path: Path) -> None:
    """Importing the kernels loads neither Triton, nor the extension, nor anything of Hugging Face or of the engine."""
    loaded = python("import sys, twinhead.kernels; print(*sys.modules)", tmp_path)
    assert "torch" in loaded
    assert not {"triton", "twinhead.kernels._C", "transformers", "datasets", "twinhead.engine"}.intersection(loaded)


def test_no_module_is_loaded_twice() -> None:
    """In the repository's root too, where transformers takes our folder for the package `kernels` and imports it."""
    loaded = python("import sys, twinhead.engine, transformers.integrations.hub_kernels; print(*sys.modules)", ROOT)
    assert "transformers.integrations.hub_kernels" in loaded
    assert not [name for name in loaded if name == "engine" or name.startswith(("engine.", "kernels."))]
