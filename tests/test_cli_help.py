"""What the command line says of itself: usage, versions, hints, and where a run has left everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_eaft import cli, ready
from nemo_eaft.compose import compose
from tests.commands import home, make_checkpoint, run, started  # noqa: F401, fixtures

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "demo", "--fast"], ["export", "x"]])
def test_wrong_usage_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: nemo-eaft" in capsys.readouterr().err


def test_as_a_program() -> None:
    """One process of its own: the exit code reaches the shell, and help does not wait for NeMo."""
    program = [sys.executable, "-m", "nemo_eaft.cli"]
    wrong = subprocess.run(
        [*program, "train", "demo", "trainer.max_stpes=5"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert wrong.returncode == 2
    assert "did you mean trainer.max_steps?" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    code = "import sys; from nemo_eaft import cli\ntry: cli.main(['--help'])\nfinally:\n"
    code += "    assert not {'nemo', 'megatron', 'transformers', 'hydra'} & set(sys.modules), 'help is slow'"
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert helped.returncode == 0, helped.stderr
    assert {"import", "train", "export"} <= set(helped.stdout.split())


@pytest.mark.parametrize(
    "option, hint",
    [
        ("--max-steps", "a setting is given as trainer.max_steps=VALUE"),
        ("--trainer.max_steps=5", "a setting is given as trainer.max_steps=VALUE"),
        ("--lr", "settings are given as group.key=VALUE"),
    ],
)
def test_an_option_of_another_program(option: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "demo", option, "5"])
    assert end.value.code == 2
    assert f"unrecognized argument {option.partition('=')[0]}; {hint}" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines.keys() >= {"nemo-eaft", "nemo-toolkit", "megatron-core"}


@pytest.mark.parametrize("finished", [False, True])
def test_the_end_says_where_everything_is(
    home: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    ready.make_ready(compose(str(home / "own.yaml")))
    checkpoint = make_checkpoint(home / "run" / "checkpoints" / f"step={1 if finished else 0}")
    code, said, _ = run(capsys, "train", str(home / "own.yaml"))
    assert code == 0
    assert len(started) == (not finished)
    for part in ("metrics.jsonl", "report.png", f"checkpoint: {checkpoint}", f"nemo-eaft export {home / 'run'} OUTPUT"):
        assert part in said
