"""The packages that we compare with, at pinned versions, in a folder of their own: `python -m benchmarks peers`.

pip puts each into `.peers/NAME-VERSION/package` with --no-deps, so that no second torch ever comes along, and the few
pure dependencies that it cannot do without into `needs` beside it. The folder is on sys.path while a peer is loaded
and not a moment longer: `package` in front of everything, `needs` behind it, so that what is installed here wins.
Dependencies that none of the measured functions calls (ray, tensordict, ...) are stubs: modules that have every name.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("TWINHEAD_PEERS", Path(__file__).parent.parent / ".peers"))
ACCELERATE = ("accelerate==1.15.0", "psutil==7.2.2")


class Missing(Exception):
    """Why a contender cannot run here."""


@dataclass(frozen=True)
class Peer:
    """One pinned distribution."""

    title: str
    name: str
    version: str
    top: str  # the name that it is imported by
    needs: Sequence[str] = ()
    stubs: Sequence[str] = ()
    leaves: bool = False  # its modules give way to another version of the same package once its functions are in hand

    @property
    def label(self) -> str:
        return f"{self.title} {self.version}"

    @property
    def spec(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.name}-{self.version}"

    def function(self, module: str, name: str) -> Any:
        """A function or class of the peer. Raises Missing as load() does."""
        return getattr(load(self, module), name)


TRL = Peer("TRL", "trl", "1.16.0", "trl", needs=ACCELERATE, stubs=("datasets", "pandas"))
TRL_TRAINER = Peer("TRL", "trl", "1.12.0", "trl", needs=ACCELERATE)  # the last release with a PPO trainer
TRL_PPO = Peer(  # the last one whose GAE is a function
    "TRL", "trl", "0.11.4", "trl",
    needs=(*ACCELERATE, "tyro==1.0.17", "docstring-parser==0.18.0", "typeguard==4.6.0", "shtab==1.13.0"),
    stubs=("datasets", "pandas"), leaves=True,
)  # fmt: skip
LIGER = Peer("Liger", "liger-kernel", "0.8.5", "liger_kernel")
CCE = Peer("CCE", "cut-cross-entropy", "25.1.1", "cut_cross_entropy")
VERL = Peer(
    "verl", "verl", "0.9.1", "verl",
    stubs=("ray", "tensordict", "omegaconf", "codetiming", "orjson", "wandb", "hydra", "cachetools", "peft"),
)  # fmt: skip
TORCHAO = Peer("torchao", "torchao", "0.18.0", "torchao")  # for tests: transformers, where it is installed, loads it
PEERS = (TRL, TRL_TRAINER, TRL_PPO, LIGER, CCE, VERL, TORCHAO)
NOT_INSTALLED = {
    "flash-attn": "has to be compiled for one GPU and one torch; verl's functions use it where it is present",
    "quack-kernels": "needs the CuTe DSL and a Hopper or Blackwell GPU",
}


def main() -> None:
    """Install what is not there yet, and say what is there."""
    for peer in PEERS:
        known = peer.folder.is_dir()
        if not known:
            install(peer)
        print(f"{peer.spec:28} {'was there' if known else 'installed'}: {peer.folder}")
    for name, reason in NOT_INSTALLED.items():
        print(f"{name:28} not installed: {reason}")


def install(peer: Peer) -> None:
    """A folder that is whole or absent. Raises CalledProcessError where pip fails."""
    half = peer.folder.with_name(f"{peer.folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    for part, specs in (("package", [peer.spec]), ("needs", peer.needs)):
        (half / part).mkdir(parents=True)
        if specs:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, "--no-deps", "--no-compile", "--target", str(half / part), *specs], check=True)
    half.rename(peer.folder)


@cache
def load(peer: Peer, module: str) -> Any:
    """A module of a peer, loaded once. Raises Missing if the peer is not installed or cannot be imported here."""
    if not peer.folder.is_dir():
        raise Missing("not installed: python -m benchmarks peers")
    with _reachable(peer):
        try:
            loaded = importlib.import_module(module)
        except Exception as failure:  # a foreign package can fail in any way
            raise Missing(f"import {module}: {type(failure).__name__}: {failure}") from failure
    return loaded


@contextmanager
def _reachable(peer: Peer) -> Iterator[None]:
    """The peer and its stubs can be imported inside, and its own version is what comes."""
    package, needs = str(peer.folder / "package"), str(peer.folder / "needs")
    others = _take_out(peer.top, keep=package)
    stubs = Stubs(peer.stubs)
    sys.path.insert(0, package)
    sys.path.append(needs)
    sys.meta_path.append(stubs)
    try:
        yield
    finally:
        sys.path.remove(package)
        sys.path.remove(needs)
        sys.meta_path.remove(stubs)
        for name in stubs.made:
            sys.modules.pop(name, None)
        if peer.leaves:
            _take_out(peer.top, keep="")
            sys.modules.update(others)


def _take_out(top: str, keep: str) -> dict[str, ModuleType]:
    """Removes the modules of package `top` from sys.modules, unless they were loaded from the folder `keep`."""
    root = sys.modules.get(top)
    if root is None or (keep and str(root.__file__).startswith(keep)):
        return {}
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name == top or name.startswith(f"{top}.")}


class Stub(ModuleType):
    """A module that has every name: each is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


class Stubs(MetaPathFinder, Loader):
    """Finds a stub for packages that are listed and that nobody else has found."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None
