"""metrics.jsonl: strict JSON, whole lines, and a resume that loses nothing but what is done again."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_eaft.atomic import replacing
from nemo_eaft.metrics import StepMetrics
from nemo_eaft.recorder import STEP_KEYS, MetricsFile, read


def metrics(loss: float = 0.1) -> StepMetrics:
    return StepMetrics(loss=loss, cross_entropy=0.2, entropy=1.5, weight=1 / 3, conflict_fraction=0.01, tokens=4321)


def record(path: Path, steps: range, start_step: int = 0, loss: float = 0.1) -> None:
    with MetricsFile(path, start_step=start_step) as file:
        for step in steps:
            file.append_step(step, metrics(loss), tokens_per_second=812.5, learning_rate=2e-5, seconds=5.3)


def test_a_line_holds_every_promised_key_and_comes_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    record(path, range(1, 3))
    promised = "step loss cross_entropy entropy weight conflict_fraction tokens tokens_per_second learning_rate"
    assert set(promised.split()) <= set(STEP_KEYS)
    first, second = read(path)
    assert tuple(first) == STEP_KEYS
    assert first == {
        "step": 1,
        "loss": 0.1,
        "cross_entropy": 0.2,
        "entropy": 1.5,
        "weight": 1 / 3,
        "conflict_fraction": 0.01,
        "tokens": 4321,
        "tokens_per_second": 812.5,
        "learning_rate": 2e-5,
        "seconds": 5.3,
    }
    assert second["step"] == 2
    assert type(first["tokens"]) is int
    assert path.read_bytes().count(b"\n") == 2


def test_validation_rows_stand_between_the_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.append_validation(0, 1.25)
        file.append_step(1, metrics(), tokens_per_second=1.0, learning_rate=0.0, seconds=1.0)
        file.append_validation(1, 1.125)
    assert [row["step"] for row in read(path)] == [0, 1, 1]
    assert read(path)[0] == {"step": 0, "val_loss": 1.25}


def test_each_line_is_there_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in (1, 2, 3):
            file.append_step(step, metrics(), tokens_per_second=1.0, learning_rate=0.0, seconds=1.0)
            assert [row["step"] for row in read(path)] == list(range(1, step + 1))


def test_lines_survive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys\n"
        "from nemo_eaft.metrics import StepMetrics, zero_sums\n"
        "from nemo_eaft.recorder import MetricsFile\n"
        "file = MetricsFile(sys.argv[1])\n"
        "metrics = StepMetrics.from_sums(zero_sums('cpu'))\n"
        "for step in (1, 2):\n"
        "    file.append_step(step, metrics, tokens_per_second=1.0, learning_rate=0.0, seconds=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=root, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["step"] for row in read(path)] == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_null_in_strict_json(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 2), loss=value)
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["loss"] is None
    assert read(path)[0]["loss"] is None
    assert read(path)[0]["cross_entropy"] == 0.2


def test_resume_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in range(1, 7):
            file.append_step(step, metrics(), tokens_per_second=1.0, learning_rate=0.0, seconds=1.0)
            if step % 3 == 0:
                file.append_validation(step, 1.0)
    before = path.read_bytes().split(b"\n")[:4]
    record(path, range(4, 7), start_step=3, loss=0.7)
    assert path.read_bytes().split(b"\n")[:4] == before, "kept lines stay as they are, byte for byte"
    rows = read(path)
    assert [(row["step"], "val_loss" in row) for row in rows] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
        (4, False),
        (5, False),
        (6, False),
    ]
    assert [row["loss"] for row in rows if "loss" in row] == [0.1, 0.1, 0.1, 0.7, 0.7, 0.7]
    assert sorted(os.listdir(tmp_path)) == ["metrics.1.jsonl", "metrics.jsonl"]
    assert [(row["step"], "val_loss" in row) for row in read(tmp_path / "metrics.1.jsonl")] == [
        (4, False),
        (5, False),
        (6, False),
        (6, True),
    ]


def test_a_new_run_starts_at_step_one_again_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 5))
    first = path.read_bytes()
    record(path, range(1, 3), loss=0.9)
    second = path.read_bytes()
    assert [row["loss"] for row in read(path)] == [0.9, 0.9]
    record(path, range(1, 2), loss=0.8)
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == first
    assert (tmp_path / "metrics.2.jsonl").read_bytes() == second


@pytest.mark.parametrize("cut", [1, 2, 7, 60])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 4))
    content = path.read_bytes()
    path.write_bytes(content[: -1 - cut])
    assert [row["step"] for row in read(path)] == [1, 2]
    record(path, range(3, 4), start_step=2)
    assert path.read_bytes() == content


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 4))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert [row["step"] for row in read(path)] == [1, 2, 3]
    MetricsFile(path, start_step=3).close()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "tail", [b"\0" * 40, b"\xff\xfe", b"12", b'{"step": true}', b'{"loss": 1}', b'{"step": 4, "loss": NaN}']
)
def test_rubbish_after_the_last_newline_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 3))
    content = path.read_bytes()
    path.write_bytes(content + tail)
    assert len(read(path)) == 2
    MetricsFile(path, start_step=2).close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b'{"loss": 1}', b'{"step": 2, "loss": NaN}', b"\0\0"])
def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 4))
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    broken = b"\n".join(lines)
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not "):
        read(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not "):
        MetricsFile(path, start_step=3)
    assert path.read_bytes() == broken, "a file we do not understand is left as it is"


def test_nothing_is_rewritten_when_nothing_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 4))
    before = path.stat().st_ino
    MetricsFile(path, start_step=3).close()
    assert path.stat().st_ino == before


def test_a_crash_during_the_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 7))
    content = path.read_bytes()

    def crash(source: Path, target: Path) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        MetricsFile(path, start_step=3)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_missing_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(FileNotFoundError):
        read(path)
    path.touch()
    assert read(path) == []
    record(path, range(1, 2))
    assert len(read(path)) == 1


def test_steps_out_of_order_are_our_mistake(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record(path, range(1, 4))
    with pytest.raises(AssertionError, match="step 3 does not follow step 3"):
        record(path, range(3, 4), start_step=3)
    with pytest.raises(ValueError, match=r"start_step must be >= 0, got -1"):
        MetricsFile(path, start_step=-1)


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["summary.json"]
