"""The script of docs/tutorial.md, `examples/nemo_script.py`, as the page starts it on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_eaft import recorder
from tests.nemo import reference
from tests.nemo.conftest import Workshop
from tests.test_packaging import ROOT, readme_commands


@pytest.mark.slow
def test_the_script_of_the_tutorial(workshop: Workshop, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (command,) = (each for each in readme_commands(page) if "examples/nemo_script.py" in each and "--cpu" in each)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=tmp_path,
        env=os.environ
        | {"CHECKPOINT": str(workshop.nemo("llama")), "ROWS": str(workshop.rows), "PYTHONPATH": str(ROOT)}
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    rows = [row for row in recorder.read(metrics) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Before the first update every row has the cross-entropy that transformers gives it.
    sums = reference.row_sums(workshop.model("llama"), workshop.train_rows).values()
    each = [one.cross_entropy / one.tokens for one in sums]
    assert min(each) <= rows[0]["cross_entropy"] <= max(each)
    assert all(row["loss"] < row["cross_entropy"] for row in rows)
    assert (metrics.parent / "report.png").is_file()
    assert list(tmp_path.rglob("*.distcp"))
