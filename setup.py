"""Maps the folders engine/ and kernels/ into the package twinhead and builds its extension; see pyproject.toml."""

from glob import glob
from sys import platform

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

FOLDERS = {"twinhead.engine": "engine", "twinhead.kernels": "kernels"}
OPENMP = [] if platform == "darwin" else ["-fopenmp"]  # Apple's clang ships no OpenMP; the loops then run on one thread

packages = [*FOLDERS, *(f"{root}.{sub}" for root, folder in FOLDERS.items() for sub in find_packages(folder))]
sources = sorted(glob("csrc/*.cpp"))
extension = Pybind11Extension(
    "twinhead.kernels._C",
    sources,
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", *OPENMP],
    extra_link_args=OPENMP,
)

ParallelCompile().install()
setup(
    packages=packages,
    package_dir=FOLDERS,
    ext_modules=[extension] if sources else [],
    cmdclass={"build_ext": build_ext},
)
