"""``python -m benchmarks``: the EAFT loss beside its peers, on this machine."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs the kernel tests, then measures time and peak memory of the EAFT loss beside its peers. "
        "Prints no figure and exits with 1 when a test fails.",
    )
    made.add_argument("--quick", action="store_true", help="only the cases that have a figure to reach")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    made.add_argument("--only", action="append", default=[], metavar="NAME", help="a contender; may be repeated")
    made.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    # torch says on import that a package it uses is deprecated; that is no part of a result.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.cuda")
    import torch

    from benchmarks.contenders import BY_NAME
    from benchmarks.plan import plan
    from benchmarks.runner import run
    from nemo_eaft.loss.backend import VARIABLE

    if os.environ.get(VARIABLE) is not None:
        made.error(f"{VARIABLE} is set: what is measured must be the default path of the device")
    if unknown := [name for name in options.only if name not in BY_NAME]:
        made.error(f"argument --only: no contender {unknown[0]!r}; there are {', '.join(BY_NAME)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("argument --device: no CUDA device here")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    suffix = "-partial" if options.only else "-quick" if options.quick else ""
    return run(
        plan(device, options.quick),
        device,
        options.out,
        suffix=suffix,
        only=tuple(options.only),
        all_memory=not options.quick,
        say=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
