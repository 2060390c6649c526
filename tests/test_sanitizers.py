"""The C++ extension, built with AddressSanitizer and UndefinedBehaviorSanitizer, passes the tests of its kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parent.parent
FLAGS = "-std=c++17 -O1 -g -fPIC -fvisibility=hidden -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all"
INCLUDES = [f"-I{folder}" for folder in (sysconfig.get_path("include"), pybind11.get_include())]
PLANTED = """
extern "C" __attribute__((visibility("default"))) int read_at(const int* data, int index) { return data[index]; }
extern "C" __attribute__((visibility("default"))) int increase(int number) { return number + 1; }
"""

PLANTED_CALLS = {  # and what the sanitizers say of each
    "read_at(ctypes.c_void_p(torch.zeros(1000).data_ptr()), 1000)": "heap-buffer-overflow",
    "increase(2**31 - 1)": "signed integer overflow",
    "increase(1)": "",
}


def runtime(library: str) -> str:
    """Where the compiler keeps a library; its bare name where it has none."""
    return subprocess.check_output(["g++", f"-print-file-name={library}"], text=True).strip()


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which `import twinhead.kernels` takes the instrumented extension."""
    if shutil.which("g++") is None or not Path(runtime("libasan.so")).is_absolute():
        pytest.skip("needs g++ with libasan")
    folder = tmp_path_factory.mktemp("sanitized")
    objects, package = folder / "objects", folder / "twinhead" / "kernels"
    objects.mkdir()
    shutil.copytree(ROOT / "kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (objects / "planted.cpp").write_text(PLANTED)

    def compiled(source: Path) -> str:
        target = str(objects / f"{source.stem}.o")
        subprocess.run(["g++", *FLAGS.split(), *INCLUDES, "-c", source, "-o", target], check=True)
        return target

    sources = [*sorted((ROOT / "csrc").glob("*.cpp"), key=lambda path: -path.stat().st_size), objects / "planted.cpp"]
    with ThreadPool(2) as pool:
        found = pool.map(compiled, sources, chunksize=1)
    library = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *FLAGS.split(), *found, "-o", library], check=True)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers' runtime in it from the start, as a library that is loaded later needs it."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name} | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees what lives as long as it does
        "PYTHONPATH": str(folder),
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_kernels_make_no_mistake_where_planted_ones_are_seen(instrumented: Path) -> None:
    """All cases of the backend "cpu" that need no compiler of torch. One test, so that one worker builds."""
    for call, complaint in PLANTED_CALLS.items():
        script = f"import ctypes, torch, twinhead.kernels._C as C; ctypes.CDLL(C.__file__).{call}"
        child = run(instrumented, "-c", script)
        assert bool(child.returncode) == bool(complaint), child.stderr[-2000:]
        assert complaint in child.stderr
    options = ["-q", "-p", "no:cacheprovider", "-k", "cpu and not compile", "tests/kernels"]
    child = run(instrumented, "-m", "pytest", *options)
    assert child.returncode == 0, (child.stdout + child.stderr)[-4000:]
    passed = child.stdout.rpartition(" passed")[0].split()[-1]
    assert int(passed) > 400, child.stdout[-400:]
