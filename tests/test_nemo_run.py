"""examples/nemo_run_slurm.py: the batch scripts that NeMo-Run writes for it, run with stand-ins for a cluster."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from nemo_eaft.compose import compose
from tests.cluster import CALL, STOPPING, cluster, records  # noqa: F401
from tests.test_packaging import ROOT, run

EXAMPLE = ROOT / "examples" / "nemo_run_slurm.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nemo-run")


@pytest.fixture(scope="module")
def scripts(folder: Path) -> dict[str, Path]:
    """The batch scripts of a dry run, by job."""
    given = {"account": "acc", "partition": "part", "image": "/images/a b.sqsh", "data": "/my data"}
    given["hf-home"] = str(folder / "hub")
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    words += ["--run", str(folder / "my run"), "--retries", "2", "--warn", "300", "--dryrun", *CALL]
    env = {"NEMORUN_HOME": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = run(sys.executable, EXAMPLE, *words, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    found = {path.name.removesuffix("_sbatch.sh"): path for path in folder.rglob("*_sbatch.sh")}
    assert found.keys() == {"import", "train"}
    return found


def options(script: Path) -> set[str]:
    return set(re.findall(r"^#SBATCH (\S+)", script.read_text(), re.MULTILINE))


def test_what_is_asked_of_slurm(scripts: dict[str, Path]) -> None:
    wanted = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--mem=0", "--open-mode=append"}
    assert wanted | {"--signal=B:USR1@300", "--account=acc", "--partition=part"} <= options(scripts["train"])
    wanted = {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=256G", "--cpus-per-task=8"}
    assert wanted <= options(scripts["import"])
    # NeMo-Run submits with it.
    assert "Run with: sbatch --requeue" in scripts["train"].read_text()


def test_one_torchrun_a_node_with_the_words_of_the_import(
    scripts: dict[str, Path],
    cluster: dict[str, str],
    tmp_path: Path,
    folder: Path,
) -> None:
    for job in ("import", "train"):
        for mounted in ("my run", "hub"):
            shutil.rmtree(folder / mounted, ignore_errors=True)
        done = run("bash", scripts[job], cwd=tmp_path, env=cluster)
        assert done.returncode == 0, done.stderr
        assert (folder / "my run").is_dir(), "nothing to mount"
        assert (folder / "hub").is_dir(), "nothing to mount"
    started = records(cluster)
    # scontrol and srun of each script ask for the head node.
    assert [record["program"] for record in started] == ["scontrol", "srun", "srun"] * 2
    importing, training = started[2], started[5]
    for step in (importing, training):
        words = dict(pairwise(step["words"]))
        assert words["--container-image"] == "/images/a b.sqsh"
        assert words["--container-mounts"].startswith(
            f"/my data:/data,{folder / 'my run'}:/results,{folder}/hub:{folder}/hub,"
        )
        assert step["words"].count("--container-mounts") == 1
        assert "--no-container-mount-home" in step["words"]
        assert step["env"]["HF_HOME"] == str(folder / "hub")
        assert step["env"]["NEMO_HOME"] == "/results/home/nemo"
    assert importing["env"]["SRUN_CPUS_PER_TASK"] == "8"
    words = training["words"]
    torchrun = words[words.index("torchrun") :]
    given = dict(pairwise(torchrun))
    assert (given["--nnodes"], given["--nproc-per-node"], given["--rdzv-backend"]) == ("2", "8", "c10d")
    assert given["-m"] == "nemo_eaft.train"
    settings = torchrun[torchrun.index("nemo_eaft.train") + 1 :]
    composed = compose(settings[0], settings[1:])
    assert (composed.world_size, composed.data.train, composed.run.dir) == (16, "/data/a b.jsonl", "/results")
    assert importing["words"][-len(settings) - 2 :] == ["import", "--data", *settings]
    assert training["env"]["HF_HUB_OFFLINE"] == "1"
    assert importing["env"]["HF_HUB_OFFLINE"] is None
    assert training["env"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    [named] = [word for word in words if word.startswith("--container-env=")]
    assert {"CUDA_DEVICE_MAX_CONNECTIONS", "HF_HOME", "NEMO_HOME"} <= set(named.partition("=")[2].split(","))


@pytest.fixture
def shell(
    scripts: dict[str, Path],
    cluster: dict[str, str],
    tmp_path: Path,
    folder: Path,
) -> Iterator[subprocess.Popen[bytes]]:
    """The training's script, while the training runs."""
    environment = cluster | {"RUN": str(folder / "my run")}
    (folder / "my run").mkdir(exist_ok=True)
    (folder / "my run" / "training").unlink(missing_ok=True)
    srun = STOPPING.format(python=sys.executable, import_seconds=0, code=0)
    head = 'if "hostname" in sys.argv:\n    sys.exit(print("192.0.2.1"))\n'
    (tmp_path / "bin" / "srun").write_text(srun.replace("assert ", head + "assert ", 1))
    process = subprocess.Popen(["bash", scripts["train"]], cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (folder / "my run" / "training").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_slurms_warning_becomes_a_checkpoint_and_a_requeue(
    shell: subprocess.Popen[bytes],
    cluster: dict[str, str],
) -> None:
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(30) == 75
    assert [record["words"] for record in records(cluster) if record["words"][0] != "show"] == [["requeue", "123456"]]


def test_a_stop_by_its_owner_is_no_failure_to_be_tried_again(
    shell: subprocess.Popen[bytes],
    cluster: dict[str, str],
    folder: Path,
) -> None:
    (folder / "my run" / "stop").write_text("batch shell of job 123456, says the stand-in")
    assert shell.wait(30) == 75
    assert "requeue" not in shlex.join(word for record in records(cluster) for word in record["words"])


def test_a_failure_is_tried_again(
    scripts: dict[str, Path],
    cluster: dict[str, str],
    tmp_path: Path,
    folder: Path,
) -> None:
    (folder / "my run").mkdir(exist_ok=True)
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\ncase "$*" in *torchrun*) exit 9;; esac\n')
    for restarts, requeued in (("1", True), ("2", False)):
        Path(cluster["RECORD"]).unlink(missing_ok=True)
        done = run("bash", scripts["train"], cwd=tmp_path, env=cluster | {"SLURM_RESTART_COUNT": restarts})
        assert done.returncode == 9
        assert (["requeue", "123456"] in [record["words"] for record in records(cluster)]) == requeued
