"""``nemo-eaft export``: which checkpoint, whose configuration, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.compose import compose
from nemo_eaft.convert import MANIFEST
from nemo_eaft.hf_model import imported_folder
from tests.commands import home, make_checkpoint, run, started  # noqa: F401, fixtures
from tests.harness import alive


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


# Starts the conversion as run_in_own_process does, with one that takes long in place of NeMo's.
STARTER = """
    import subprocess, sys

    child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
    print(child.pid, flush=True)
    child.wait()
"""
CONVERSION = """
    import os, sys, time
    from pathlib import Path
    from nemo_eaft import convert
    from nemo_eaft.atomic import complete_folder

    def slow(checkpoint, output, hf_files):
        with complete_folder(output) as folder:
            (folder / "half").touch()
            time.sleep(600)

    convert.convert_to_hf = slow
    convert.main(["--parent", str(os.getppid()), "to-hf", "checkpoint", sys.argv[1], "hf"])
"""


def test_a_conversion_ends_with_who_started_it_and_leaves_nothing(tmp_path: Path) -> None:
    """Whoever is killed cannot end its child, which would hold memory and the disk for minutes."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", *map(textwrap.dedent, (STARTER, CONVERSION)), str(tmp_path / "out")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        try:
            wait_for(lambda: any(tmp_path.glob(".out.*/half")))
            starter.kill()
            wait_for(lambda: not any(tmp_path.iterdir()))
            wait_for(lambda: not alive(child))
        finally:
            starter.kill()
            if alive(child):
                os.kill(child, signal.SIGKILL)


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
