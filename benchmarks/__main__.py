"""`python -m benchmarks`: every claim, measured on your own machine."""

from __future__ import annotations

import argparse
from pathlib import Path

RESULTS = Path("benchmarks/results")


def main() -> None:
    """Run one of the benchmarks; each imports what it needs, so that `gpu` starts on a bare machine."""
    given = parsed()
    if given.command == "quality":
        import transformers

        from benchmarks import comparison, quality, sharing

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        quality.main(given.seeds, given.runs, given.results)
        sharing.main(given.seeds, given.runs, given.results)
        comparison.main(given.seeds, given.runs, given.results)
    elif given.command == "kernels":
        from benchmarks import kernels

        kernels.main(given.device, given.op, given.quick, given.results, given.minutes, given.keep_memory)
    elif given.command in ("generate", "train", "ppo"):
        import transformers

        from benchmarks import iterations, rollouts, updates

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        chosen = {"generate": rollouts, "train": updates, "ppo": iterations}[given.command]
        chosen.main(given.device, given.quick, given.results, given.minutes)
    elif given.command == "peers":
        from benchmarks import peers

        peers.main()
    elif given.command == "gpu":
        from benchmarks import gpu

        gpu.main(given.device, given.output)
    else:
        from benchmarks import readme

        readme.main(Path("README.md"), given.results)


def parsed() -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser(
        "quality", help="does it learn: task A, two reward models; task C, a rule; and what to use when"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs; they resume")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON and pictures")
    timed = {
        "kernels": "how fast are the kernels, beside torch, torch.compile and the peers",
        "generate": "how fast are rollouts, beside three ways of transformers to decode",
        "train": "how fast is a training step on ragged sequences, beside transformers padded and packed",
        "ppo": "how fast is a whole PPO iteration, beside TRL's last PPO trainer",
    }
    for name, help in timed.items():
        options = commands.add_parser(name, help=help)
        options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        if name == "kernels":
            options.add_argument("--op", nargs="+", default=[], metavar="NAME", help="only these functions")
            options.add_argument(
                "--keep_memory",
                action="store_true",
                help="let the C library keep freed memory, as no process does by itself",
            )
        options.add_argument(
            "--quick", action="store_true", help="small shapes: shows that everything runs, measures nothing"
        )
        options.add_argument("--minutes", type=float, help="begin no further case after so many")
        options.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON and pictures")
    commands.add_parser("peers", help="install the packages to compare with, into a folder of their own")
    options = commands.add_parser("gpu", help="from a bare checkout: build, test and measure on a GPU, in 8 minutes")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a rehearsal on small shapes")
    options.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of all logs and results")
    options = commands.add_parser("readme", help="write the README's tables and the kernels' pictures from the results")
    options.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
