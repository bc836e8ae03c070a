"""``nemo-eaft analyze MODEL DATA``."""

from __future__ import annotations

import argparse

_EPILOG = (
    "Writes analysis.json, landscape.png and conflicts.html to run.dir (runs/analyze-<model>-<data>), and prints one "
    "line of advice: see docs/analyze.md. No training, no gradients. data.train_rows=N reads the first N rows. An "
    "interrupted analysis goes on with the same command. Without a GPU add run.backend=cpu trainer.precision=fp32."
)


def add_arguments(parser: argparse.ArgumentParser, overrides: str) -> None:
    """The command's arguments. ``overrides``: what KEY=VALUE means."""
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name or folder, or a run.dir or checkpoint")
    parser.add_argument("data", metavar="DATA", help="as data.train: a .jsonl file or the name of a data set")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=overrides)


def run(arguments: argparse.Namespace) -> int:
    """Analyse, write the files, print the advice; returns the exit code.

    Raises:
        ValueError: wrong input; nothing was written into ``run.dir`` then.
    """
    # Not above: torch takes seconds, which --help need not wait for.
    from nemo_eaft.analyze import job

    return job.run(arguments.model, arguments.data, arguments.overrides)
