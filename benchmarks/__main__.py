"""`python -m benchmarks`: every claim, measured on your own machine."""

from __future__ import annotations

import argparse
from pathlib import Path

import transformers

from benchmarks import quality, readme


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("quality", help="does it learn: task A, three seeds, healthy and weak reward model")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs; they resume")
    options.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of JSON and pictures")
    options = commands.add_parser("readme", help="write the README's tables from the results")
    options.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    if given.command == "readme":
        readme.main(Path("README.md"), given.results)
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    quality.main(given.seeds, given.runs, given.results)


if __name__ == "__main__":
    main()
