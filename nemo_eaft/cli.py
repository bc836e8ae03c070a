"""``nemo-eaft import | train | export | plan | analyze | compare``.

Exit codes: 0 done, 2 the user's input is wrong (one message, no traceback), 75 a training was stopped on request and
goes on with the same command, 1 anything else.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_ALLOW = "--allow-config-change"
_STOPPING = (
    "A file `stop` in run.dir, or SIGTERM or SIGUSR1 to the launcher, asks the run to stop: at the next step it saves "
    "a checkpoint and ends with exit code 75 (ranks of a torchrun of your own: 0), and run.dir/stopped.json says "
    "where. A second signal ends it at once. Other exit codes: 0 done, 2 wrong input, 1 anything else."
)
_OVERRIDES = "group.key=value or group=file, for example trainer.learning_rate=1e-5 or loss=sft"


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments and all("=" in word and not word.startswith("-") for word in rest):
        # argparse takes no more of them once an option has come.
        arguments.overrides, rest = [*arguments.overrides, *rest], []
    if rest:
        parser.error(_not_an_option(rest))
    # torch's own, in every process that imports it where NeMo's requirements are installed.
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    command: Callable[[argparse.Namespace], int] = arguments.run
    return _guarded(lambda: command(arguments))


def _not_an_option(rest: list[str]) -> str:
    from nemo_eaft.settings import known_keys

    option = rest[0].partition("=")[0]
    name = option.lstrip("-").replace("-", "_")
    keys = [key for key in known_keys() if name in (key, key.partition(".")[2], key.replace(".", "_"))]
    hint = f"; a setting is given as {keys[0]}=VALUE" if keys else "; settings are given as group.key=VALUE"
    return f"unrecognized argument {option}{hint}"


class _Version(argparse.Action):
    """Prints what is installed, without importing it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        for name in ("nemo-eaft", "nemo-toolkit", "megatron-core", "torch", "transformer-engine", "triton"):
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} not installed")
        parser.exit()


def run_rank(argv: list[str]) -> int:
    """Entry point of ``python -m nemo_eaft.train CONF [key=value ...]``: a rank, or the launcher if started
    alone."""
    return main(["train", *argv])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-eaft", description="Entropy-Adaptive Fine-Tuning with NeMo and Megatron-Core."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="what is installed, and leave")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    for name, run, help in (
        ("import", _import, "convert the Hugging Face model of a configuration to a NeMo checkpoint"),
        ("train", _train, "train; started alone it starts its own ranks, under torchrun or srun it is one"),
    ):
        command = add(name, run, help)
        if name == "train":
            command.epilog = _STOPPING
        if name == "import":
            command.add_argument(
                "--data", action="store_true", help="also read and check the rows, and write them to run.dir"
            )
        else:
            command.add_argument(
                _ALLOW, action="store_true", help="go on from checkpoints of another configuration or of other data"
            )
        command.add_argument("conf", metavar="CONF", help="a name of conf/ (demo) or a .yaml file")
        command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=_OVERRIDES)
    from nemo_eaft.plan.command import add_arguments

    add_arguments(
        add("plan", _plan, "what a run asks of its GPUs, or the best layout of so many; no GPU needed"), _OVERRIDES
    )
    from nemo_eaft.analyze import command as analyze_command

    analyze_command.add_arguments(
        add("analyze", _analyze, "what EAFT would do to a model on some data: conflicts, weights, advice"), _OVERRIDES
    )
    from nemo_eaft.compare.arguments import add_arguments as add_compare

    add_compare(add("compare", _compare, "target quality against forgetting, of runs from one base model"), _OVERRIDES)
    export = add("export", _export, "convert a checkpoint to a Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="a checkpoint, or a run.dir for its newest one")
    export.add_argument("output", type=Path, help="folder to write; must not exist or be empty")
    export.add_argument(
        "--hf", type=Path, help="folder or files of the model that was imported; default: that of the run"
    )
    export.add_argument("--backend", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    return parser


def _guarded(command: Callable[[], int]) -> int:
    """Turn errors into messages and exit codes."""
    from nemo_eaft.launch import is_users

    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            # For the user: one line; where it was raised is our business.
            print(f"nemo-eaft: warning: {message}", file=sys.stderr)
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        return command()
    except KeyboardInterrupt:
        print("nemo-eaft: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Who read the output has seen enough. The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        if not is_users(error):
            raise
        print(f"nemo-eaft: {error}", file=sys.stderr)
        return 2


def _import(arguments: argparse.Namespace) -> int:
    from nemo_eaft.compose import compose

    settings = compose(arguments.conf, arguments.overrides, unused=() if arguments.data else ("data.train",))
    from nemo_eaft.ready import import_model, open_model, prepare_rows
    from nemo_eaft.run_dir import check_run_dir

    if arguments.data:
        check_run_dir(settings)
    model = open_model(settings)
    if arguments.data:
        prepare_rows(settings, model)
    print(import_model(settings, model))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from nemo_eaft import launch
    from nemo_eaft.compose import compose

    # Before torch is imported: most mistakes are in these words.
    with launch.warned_once():
        settings = compose(arguments.conf, arguments.overrides)
    from nemo_eaft import stop
    from nemo_eaft.launch import check_world, forget_errors, launched, run_local, tell_torchrun, write_error
    from nemo_eaft.ready import make_ready, wait_ready
    from nemo_eaft.run_dir import check_run_dir

    allow: bool = arguments.allow_config_change
    place = launched()
    if place is None:
        if make_ready(settings, allow).finished:
            print(f"run.dir={settings.run.dir}: finished, all {settings.trainer.max_steps} steps are done")
            _say_where(Path(settings.run.dir))
            return 0
        code = run_local(settings, [*([_ALLOW] if allow else []), arguments.conf, *arguments.overrides])
        if code == 0:
            _say_where(Path(settings.run.dir))
        return code
    from nemo_eaft.orphans import end_with_agent
    from nemo_eaft.restart import check_store, name_this_start

    rank, ranks = place
    end_with_agent()
    stop.listen()
    # As torchrun's own `record` does: a rank that a fault of memory ends prints where it was.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    try:
        # Before write_error can act: until these pass, run.dir may be another run's.
        check_world(settings, ranks)
        check_store()
        check_run_dir(settings, allow)
    except ValueError as error:
        tell_torchrun(error)
        raise
    try:
        name_this_start()
        if rank == 0:
            forget_errors(Path(settings.run.dir))
            stop.clear(Path(settings.run.dir))
        # Rank 0 decides where the run goes on: another rank might look a moment later, or at an older state.
        ready = make_ready(settings, allow) if rank == 0 else wait_ready(settings)
        if ready.finished:
            return 0
        from nemo_eaft.train import run_training

        run_training(settings, ready.checkpoint, ready.resume_from)
    except (Exception, SystemExit) as error:
        write_error(Path(settings.run.dir), rank, error)
        raise
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from nemo_eaft.plan.command import run

    return run(arguments)


def _analyze(arguments: argparse.Namespace) -> int:
    from nemo_eaft.analyze.command import run

    return run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from nemo_eaft.compare.command import run

    return run(arguments)


def _say_where(run_dir: Path) -> None:
    """What a finished run has left, for who started it."""
    from nemo_eaft.checkpoints import checkpoints_in

    print(f"metrics:    {run_dir / 'metrics.jsonl'}, {run_dir / 'report.png'}; tensorboard --logdir {run_dir}")
    for checkpoint in checkpoints_in(run_dir)[-1:]:
        print(f"checkpoint: {checkpoint}")
    print(f"export:     nemo-eaft export {run_dir} OUTPUT", flush=True)


def _export(arguments: argparse.Namespace) -> int:
    from nemo_eaft.checkpoints import checkpoints_in, is_checkpoint, is_unfinished
    from nemo_eaft.convert import run_in_own_process
    from nemo_eaft.integrity import SUMS, faults
    from nemo_eaft.run_dir import CONFIG

    checkpoint: Path = arguments.checkpoint
    if not checkpoint.is_dir():
        raise ValueError(f"checkpoint {checkpoint}: no such folder")
    run_dir = next(
        (folder for folder in (checkpoint, *checkpoint.resolve().parents) if (folder / CONFIG).is_file()),
        None,
    )
    if not is_checkpoint(checkpoint):
        there = checkpoints_in(checkpoint)
        if not there:
            raise ValueError(f"checkpoint {checkpoint}: neither a complete NeMo checkpoint nor a run with one")
        checkpoint = there[-1]
    if is_unfinished(checkpoint.resolve()):
        raise ValueError(f"checkpoint {checkpoint} was not finished: a file {checkpoint.name}-unfinished is beside it")
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder")
    hf: Path = arguments.hf or _hf_files(checkpoint, run_dir)
    if not (hf / "config.json").is_file():
        raise ValueError(f"--hf {hf}: no config.json there")
    if not (checkpoint / SUMS).is_file():
        warnings.warn(f"{checkpoint} has no {SUMS}: it is not known whether its files are whole", stacklevel=1)
    elif found := faults(checkpoint):
        listed = "\n  ".join(found)
        raise ValueError(f"checkpoint {checkpoint} is damaged; export another one by its folder:\n  {listed}")
    print(f"export: {checkpoint} -> {output}", flush=True)
    run_in_own_process(["to-hf", str(checkpoint.resolve()), str(output), str(hf)], arguments.backend)
    print(output)
    return 0


def _hf_files(checkpoint: Path, run_dir: Path | None) -> Path:
    """Configuration and tokenizer of the model that a checkpoint came from: its own copy, or that of the import."""
    from nemo_eaft.convert import HF_FILES
    from nemo_eaft.ready import read_ready

    ready = read_ready(run_dir) if run_dir is not None else None
    # NeMo keeps the tokenizer's folder in context/, under the name it had in the import.
    places = [checkpoint / "context" / HF_FILES, checkpoint / HF_FILES]
    places += [ready.checkpoint / HF_FILES] if ready is not None else []
    for place in places:
        if (place / "config.json").is_file():
            return place
    looked = ", ".join(map(str, places))
    raise ValueError(f"--hf: no config.json in {looked}, so the folder of the model it came from must be given")


if __name__ == "__main__":
    sys.exit(main())
