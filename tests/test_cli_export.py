"""``nemo-eaft export``: which checkpoint, whose configuration, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.compose import compose
from nemo_eaft.convert import MANIFEST
from nemo_eaft.hf_model import imported_folder
from tests.commands import home, make_checkpoint, run, started  # noqa: F401, fixtures
from tests.harness import alive, kill, wait_for


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str | None]]:
    from nemo_eaft import convert

    calls: list[tuple[list[str], str | None]] = []
    monkeypatch.setattr(
        convert, "run_in_own_process", lambda arguments, backend=None: calls.append((arguments, backend))
    )
    return calls


def test_export_takes_the_newest_checkpoint_of_a_run(
    home: Path, started: list[list[str]], converted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", str(home / "own.yaml"))
    for name in ("step=9", "step=10"):
        make_checkpoint(home / "run" / "checkpoints" / name)
    (home / "imported" / "hf").mkdir()
    (home / "imported" / "hf" / "config.json").write_text("{}")
    expected = [
        "to-hf",
        str(home / "run" / "checkpoints" / "step=10"),
        str(home / "out"),
        str(home / "imported" / "hf"),
    ]
    assert run(capsys, "export", str(home / "run"), str(home / "out"))[0] == 0
    assert converted == [(expected, None)]  # what this machine has
    assert run(capsys, "export", str(home / "run" / "checkpoints" / "step=9"), str(home / "out"))[0] == 0
    assert converted[1][0][1].endswith("step=9")


def test_export_needs_nothing_but_the_checkpoint(
    home: Path, converted: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own copy of the configuration comes first: no run.dir, no model, no hub, from any folder."""
    checkpoint = make_checkpoint(home / "moved" / "step=9")
    (checkpoint / "context" / "hf").mkdir()
    (checkpoint / "context" / "hf" / "config.json").write_text("{}")
    monkeypatch.chdir(home / "moved")
    assert run(capsys, "export", "step=9", "out", "--backend", "cpu")[0] == 0
    assert converted == [(["to-hf", str(checkpoint), "out", "step=9/context/hf"], "cpu")]


def test_export_after_the_model_has_changed(
    home: Path,
    started: list[list[str]],
    converted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The import is the one that the run was made with, which it remembers, and not the one of the model now."""
    monkeypatch.setenv("NEMO_EAFT_HOME", str(home / "cache"))
    conf = home / "own.yaml"
    conf.write_text(conf.read_text().replace(f", imported: '{home}/imported'", ""))
    made = imported_folder(compose(str(conf)).model, home / "model")
    (made / "hf").mkdir(parents=True)
    (made / MANIFEST).write_text("{}")
    (made / "hf" / "config.json").write_text("{}")
    assert run(capsys, "train", str(conf))[0] == 0
    make_checkpoint(home / "run" / "checkpoints" / "step=1")
    shutil.rmtree(home / "model")
    code, _, err = run(capsys, "export", str(home / "run"), str(home / "out"))
    assert code == 0, err
    assert converted[0][0][-1] == str(made / "hf")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["{0}/nowhere", "{0}/out"], "nowhere: no such folder"),
        (["{0}/model", "{0}/out"], "neither a complete NeMo checkpoint nor a run with one"),
        (["{0}/imported", "{0}/model"], "exists and is not an empty folder"),
        (["{0}/imported", "{0}/out"], "--hf: "),
        (["{0}/imported", "{0}/out", "--hf", "{0}/nowhere"], "no config.json there"),
    ],
)
def test_export_of_nothing(
    home: Path, converted: list[Any], capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    code, _, err = run(capsys, "export", *[argument.format(home) for argument in arguments])
    assert code == 2
    assert named in err
    assert converted == []
    assert not (home / "out").exists()


# Starts the conversion as run_in_own_process does, with one that takes long in place of NeMo's, and a disk that takes
# two seconds to remove anything. Megatron writes with processes that are forked.
STARTER = """
    import signal, sys
    from nemo_eaft.own_process import run_to_its_end

    # However these tests were started: a shell without job control has SIGINT ignored in what it starts with `&`, nohup
    # SIGHUP, and both are inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, getattr(signal, sys.argv.pop(1)))

    print(run_to_its_end([sys.executable, "-c", *sys.argv[1:]]))
"""
CONVERSION = """
    import multiprocessing, os, shutil, sys, time
    from pathlib import Path
    from nemo_eaft import convert
    from nemo_eaft.atomic import complete_folder

    def write(folder):
        for number in range(10**6):
            folder.mkdir(exist_ok=True)
            (folder / f"part{number}").touch()
            time.sleep(0.01)

    def slow(checkpoint, output, hf_files):
        with complete_folder(output) as folder:
            writer = multiprocessing.get_context("fork").Process(target=write, args=(folder,))
            writer.start()
            Path(sys.argv[2]).write_text(f"{os.getpid()} {writer.pid}")
            time.sleep(600)

    remove = shutil.rmtree
    shutil.rmtree = lambda *words, **named: (time.sleep(2), remove(*words, **named))
    convert.convert_to_hf = slow
    convert.main(["--parent", str(os.getppid()), "to-hf", "checkpoint", sys.argv[1], "hf"])
"""


@contextmanager
def conversion(folder: Path, hang_up: str = "SIG_DFL") -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """One that writes into `folder`: who started it, and the numbers of the conversion and of its writer."""
    pids = folder.parent / "pids"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    starter_code, conversion_code = map(textwrap.dedent, (STARTER, CONVERSION))
    words = [sys.executable, "-c", starter_code, hang_up, conversion_code, str(folder / "out"), str(pids)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as starter:
        found: list[int] = []
        try:
            wait_for(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
            found = [int(pid) for pid in pids.read_text().split()]
            wait_for(lambda: any(folder.glob(".out.*/part*")))
            yield starter, found
        finally:
            kill([*found, starter.pid])


@pytest.mark.parametrize(
    "number, to_all",
    [
        (signal.SIGKILL, False),
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, True),
        (signal.SIGHUP, True),
    ],
    ids=["killed", "ended", "job-ended", "ctrl-c", "hung-up"],
)
def test_a_conversion_ends_with_who_started_it_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, to_all: bool
) -> None:
    """It would hold memory and the disk for minutes. `to_all`: to both, as from a terminal or a batch system; the
    conversion then gets another SIGTERM while it cleans up, for its parent is gone."""
    folder = tmp_path / "to"
    with conversion(folder) as (starter, found):
        (os.killpg if to_all else os.kill)(starter.pid, number)
        if number is signal.SIGINT:
            # What is told of Ctrl-C waits until all is gone.
            assert starter.wait(60) in (-number, 1)
            assert not any(map(alive, found))
        wait_for(lambda: not any(map(alive, found)))
        assert not any(folder.iterdir())
        assert starter.wait(60) in (-number, 1), "it did not go on"


def test_a_conversion_under_nohup_outlives_a_hang_up(tmp_path: Path) -> None:
    folder = tmp_path / "to"
    with conversion(folder, hang_up="SIG_IGN") as (starter, found):
        os.killpg(starter.pid, signal.SIGHUP)
        before = len(list(folder.glob(".out.*/part*")))
        time.sleep(4)  # its end would take two
        assert all(map(alive, [starter.pid, *found]))
        wait_for(lambda: len(list(folder.glob(".out.*/part*"))) > before + 10)
        os.killpg(starter.pid, signal.SIGTERM)
        wait_for(lambda: not any(map(alive, found)))
        assert not any(folder.iterdir())
