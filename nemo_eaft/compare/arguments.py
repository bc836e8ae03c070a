"""What ``nemo-eaft compare`` is told. Nothing heavy is imported, for ``--help`` reads it."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = (
    "Each CONF is a configuration (trained if it is not finished), the run.dir of a finished run, or an exported "
    "Hugging Face folder; all from one base model, with the same held-out rows. Every kept checkpoint is measured: "
    "trainer.keep_checkpoints=-1 keeps all. Measurements are kept in the output folder, so the same command goes on "
    "where it was stopped. With another seed or learning rate give another run.dir."
)
NUMBERS = {
    "rows": (200, 1, "held-out rows, the first so many, for target cross-entropy and exact match"),
    "samples": (32, 0, "texts that the base model writes, for the drift; 0: no drift"),
    "sample_tokens": (128, 2, "tokens of each, at most"),
    "windows": (64, 1, "pieces of --text"),
    "window_tokens": (256, 2, "tokens of each"),
    "draws": (2000, 0, "draws of rows for the bootstrap, each with 50 of seeds; 0: no intervals"),
    "seed": (0, 0, "of the texts and of the bootstrap"),
}


def add_arguments(parser: argparse.ArgumentParser, overrides: str) -> None:
    """The command's arguments. ``overrides``: what KEY=VALUE means."""
    parser.epilog = _EPILOG
    parser.add_argument("conf", metavar="CONF", nargs="+", help="a name of conf/, a .yaml file, a run.dir, a folder")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=f"for configurations: {overrides}")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder to write (runs/compare)")
    parser.add_argument("--reference", metavar="METHOD", help="the method to compare with; default: sft, or the first")
    parser.add_argument("--text", type=Path, metavar="FILE", help="general text, UTF-8, for the perplexity")
    parser.add_argument("--probe", type=Path, metavar="FILE", help="JSONL of question, answers, right")
    parser.add_argument(
        "--probe-score", choices=("full", "first"), default="full", help="whole answers or first tokens"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--keep-exports", action="store_true", help="do not remove what was exported to be measured")
    for name, (default, _, text) in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", default=default, help=text)
