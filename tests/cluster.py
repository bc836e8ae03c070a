"""Stand-ins for what only a SLURM cluster has: programs that record how they are called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

CALL = ("qwen3-0.6b", "data.train=/data/a b.jsonl", "parallel.tensor=8", "parallel.pipeline=2")
"""Configuration and settings of the training that is started."""

RECORDER = """#!{python}
import json, os, subprocess, sys
keys = ("CUDA_DEVICE_MAX_CONNECTIONS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME")
keys += ("NEMO_HOME", "NEMO_EAFT_HOME", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "SRUN_CPUS_PER_TASK")
with open(os.environ["RECORD"], "a") as out:
    env = {{key: os.environ.get(key) for key in keys}}
    out.write(json.dumps({{"program": "{name}", "words": sys.argv[1:], "env": env}}) + "\\n")
if "{name}" == "scontrol":
    print("node7\\nnode8")
words = sys.argv[1:]
if "{name}" == "srun" and "bash" in words:
    # What the second node of the job does with it: its own number, and none of the host's variables changed.
    sys.exit(subprocess.run(words[words.index("bash"):], env=dict(os.environ, SLURM_NODEID="1")).returncode)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, with programs that record how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "torchrun"):
        (folder / name).write_text(RECORDER.format(python=sys.executable, name=name))
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:/usr/bin:/bin",
        "RECORD": str(tmp_path / "record"),
        "IMAGE": "/images/nemo_eaft.sqsh",
        "DATA": str(tmp_path / "my data"),
        "RUN": str(tmp_path / "run"),
        "HF_HOME": str(tmp_path / "hub"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
        "SLURM_GPUS_ON_NODE": "8",
    }


def records(cluster: dict[str, str]) -> list[dict[str, Any]]:
    """The programs that were started, in order."""
    path = Path(cluster["RECORD"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# A training that goes on until its folder asks it to stop; what it does then is its first argument.
STOPPING = """#!{python}
import os, sys, time
from pathlib import Path
from typing import Any
folder = Path(os.environ["RUN"])
if "import" in sys.argv:
    sys.exit({import_seconds} and time.sleep({import_seconds}))
assert os.environ["NEMO_EAFT_STOP_CLEARED"] == "1"
assert not (folder / "stopped.json").exists()
(folder / "training").touch()
deadline = time.monotonic() + 30
while not (folder / "stop").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
assert "batch shell of job 123456" in (folder / "stop").read_text()
time.sleep(1.0)  # the save; the shell must wait for it
(folder / "stop").unlink()
if {code} == 0:
    (folder / "stopped.json").write_text("{{}}")
sys.exit({code})
"""
