"""The study: ``python -m benchmarks.forgetting [--plan | --report] [--only SETTING ...] [--methods METHOD ...]``.

Trains SmolLM2-135M on the CPU with plain ``transformers``, AdamW and :func:`nemo_eaft.eaft_loss`, one run at a time,
and adds a line to ``results/`` for each that is finished: killed anywhere, the same command goes on with the next.
Two of these commands may run side by side if ``--only`` gives them different settings.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.forgetting import design, results


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for wrong input."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except results.WrongInput as error:
        print(f"benchmarks.forgetting: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="print what is left, and leave")
    parser.add_argument("--report", action="store_true", help="write README.md and its pictures, and leave")
    parser.add_argument("--only", nargs="+", choices=design.SETTINGS, default=design.SETTINGS, metavar="SETTING")
    parser.add_argument("--methods", nargs="+", choices=design.METHOD_NAMES, default=design.METHOD_NAMES, metavar="M")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds only")
    parser.add_argument("--minutes", type=float, help="begin no run that would not end within so many")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 1 by default, to run in the background")
    parser.add_argument("--steps", type=int, default=design.STEPS, help="of each run, to try it out; needs --results")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON lines")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    for name in ("threads", "steps"):
        if getattr(arguments, name) < 1:
            raise results.WrongInput(f"--{name} {getattr(arguments, name)} must be 1 or more")
    if arguments.steps != design.STEPS and arguments.results == results.FOLDER:
        raise results.WrongInput(
            f"--steps {arguments.steps}: the study has {design.STEPS}; give another folder with --results"
        )
    # Before torch is imported, which reads them once.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from benchmarks.forgetting import plan, report, study

    if arguments.report:
        for path in report.write(arguments.results):
            print(path)
        return 0
    lines = study.all_lines(arguments.results)
    left = plan.left(lines, arguments.only, arguments.methods, arguments.seeds)
    for run in left if arguments.plan else ():
        print(f"{run.setting}, {run.method}, {run.learning_rate:g}, seed {run.seed}")
    done = sum(line.method != results.BASE for line in lines)
    rest = plan.total() - done
    taken = plan.minutes(lines, rest)
    expected = "unknown before the first" if taken is None else f"about {taken:.0f} minutes"
    print(f"{done} of {plan.total()} runs are done, {len(left)} of the others can be made now; the rest: {expected}")
    if arguments.plan:
        return 0
    import torch

    from nemo_eaft.demo_data import build
    from nemo_eaft.hf_model import home

    torch.set_num_threads(arguments.threads)
    until = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    build(home() / "demo")
    made = study.Study(home() / "demo", arguments.results, arguments.steps)
    study.make_runs(made, arguments.only, arguments.methods, arguments.seeds, until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
