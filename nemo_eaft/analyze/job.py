"""An analysis from end to end: the launcher's part and a rank's."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_eaft.analyze import state as states
from nemo_eaft.analyze.inputs import check_folder, save_inputs, settings_of, spoken, warn_without_effect
from nemo_eaft.integrity import SUMS, faults
from nemo_eaft.launch import (
    LAUNCHER,
    Program,
    check_world,
    forget_errors,
    launched,
    run_local,
    tell_torchrun,
    warned_once,
    write_error,
)
from nemo_eaft.machine import check_machine
from nemo_eaft.ready import (
    READY,
    Ready,
    import_model,
    leave,
    made_by_launcher,
    missing_of,
    open_model,
    prepare_rows,
    wait_ready,
)
from nemo_eaft.run_dir import save_config
from nemo_eaft.settings import Settings

PROGRAM = Program("nemo_eaft.analyze", "MODEL DATA", "row", "when the rows that are being read are counted")


def run(model: str, data: str, overrides: Sequence[str]) -> int:
    """See ``command.run``."""
    with warned_once():
        settings, weights = settings_of(model, data, overrides)
    place = launched()
    if LAUNCHER not in os.environ and (place is None or place[0] == 0):
        # Once, and not by every rank.
        warn_without_effect(overrides)
    if place is not None:
        return _rank(settings, model, weights, *place)
    ready = _make_ready(settings, model, weights)
    if not ready.finished:
        code = run_local(settings, [model, data, *overrides], PROGRAM)
        if code:
            return code
    _report(settings, ready)
    return 0


def _make_ready(settings: Settings, named: str, weights: Path | None) -> Ready:
    """As :func:`nemo_eaft.ready.make_ready`, for forward passes on all rows of the MODEL that is `named` so."""
    check_machine(settings)
    check_folder(settings, named, weights)
    run_dir = Path(settings.run.dir)
    by_launcher = made_by_launcher(run_dir)
    if by_launcher is not None and not missing_of(settings, by_launcher):
        leave(by_launcher, run_dir)
        return by_launcher
    (run_dir / READY).unlink(missing_ok=True)
    model = open_model(settings)
    if weights is not None and (weights / SUMS).is_file() and (found := faults(weights)):
        listed = "\n  ".join(found)
        raise ValueError(f"checkpoint {weights} is damaged; give another one by its folder:\n  {listed}")
    prepared = prepare_rows(settings, model)
    checkpoint = import_model(settings, model, weights=weights is None).absolute()
    save_config(settings)
    save_inputs(settings, named, weights)
    ready = Ready(checkpoint, False, weights)
    # Of ranks that are started again the state is their own.
    if not settings.run.resume and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        (run_dir / states.FILE).unlink(missing_ok=True)
    done = states.load(settings, ready).rows_done
    if done == 0:
        _start_anew(run_dir)
    if 0 < done < prepared.train_samples:
        print(f"analyze: goes on after {done} of {prepared.train_samples} rows", flush=True)
    ready = replace(ready, finished=done == prepared.train_samples)
    leave(ready, run_dir)
    return ready


def _start_anew(run_dir: Path) -> None:
    """Remove what is of other rows or weights, or not wanted: results that stay would look like those of this start."""
    from nemo_eaft.analyze.report import FILES

    if (run_dir / states.FILE).exists():
        print(
            f"analyze: starts anew, {run_dir / states.FILE} is of other rows or weights or cannot be read", flush=True
        )
    for name in (states.FILE, *FILES):
        (run_dir / name).unlink(missing_ok=True)


def _rank(settings: Settings, model: str, weights: Path | None, rank: int, ranks: int) -> int:
    from nemo_eaft import stop
    from nemo_eaft.orphans import end_with_agent
    from nemo_eaft.restart import check_store, name_this_start

    end_with_agent()
    stop.listen()
    # As for a training (cli.py).
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    run_dir = Path(settings.run.dir)
    try:
        # Before write_error can act: until these pass, run.dir may be another run's.
        check_world(settings, ranks)
        check_store()
        check_folder(settings, model, weights)
    except ValueError as error:
        tell_torchrun(error)
        raise
    try:
        name_this_start()
        if rank == 0:
            forget_errors(run_dir)
            stop.clear(run_dir)
        ready = _make_ready(settings, model, weights) if rank == 0 else wait_ready(settings)
        from nemo_eaft.analyze.run import analyze

        done = ready.finished or analyze(settings, ready)
        if done and rank == 0 and LAUNCHER not in os.environ:
            _report(settings, ready)
    except (Exception, SystemExit) as error:
        write_error(run_dir, rank, error)
        raise
    return 0


def _report(settings: Settings, ready: Ready) -> None:
    from nemo_eaft.analyze.page import FILE as PAGE
    from nemo_eaft.analyze.report import PICTURE, write_report
    from nemo_eaft.analyze.summary import FILE

    run_dir = Path(settings.run.dir)
    model = open_model(settings)
    name = spoken(settings.model.hf, ready.resume_from)
    state = states.load(settings, ready)
    content = write_report(settings, state, name, int(model.config.vocab_size), model.tokenizer)
    if state.tally.not_finite:
        print(f"analyze: {state.tally.not_finite} tokens gave NaN or infinity and are left out", flush=True)
    print(f"analyze: {run_dir / FILE}, {run_dir / PICTURE}, {run_dir / PAGE}")
    print(f"advice: {content['advice']['text']}", flush=True)
