"""The batch scripts of examples/slurm, run by a real shell with stand-ins for what only a cluster has."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import CALL, STOPPING, cluster, records  # noqa: F401
from tests.test_packaging import ROOT, SBATCH, run

IMPORT = SBATCH.with_name("import.sbatch")


def test_sbatch_starts_one_torchrun_per_node(cluster: dict[str, str], tmp_path: Path) -> None:
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster)
    assert done.returncode == 0, done.stderr
    started = records(cluster)
    host, converting, training, rank = started
    assert [record["program"] for record in started] == ["scontrol", "srun", "srun", "torchrun"]
    assert host["words"] == ["show", "hostnames", "node[7-8]"]

    mounts = f"{cluster['DATA']}:/data,{cluster['RUN']}:/results,{cluster['HF_HOME']}:{cluster['HF_HOME']}"
    for step in (converting, training):
        assert [word for word in step["words"] if word.startswith("--container-mounts")] == [
            f"--container-mounts={mounts}"
        ]
        assert f"--container-image={cluster['IMAGE']}" in step["words"]
        assert step["env"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
        # What the image has for a variable would hold otherwise.
        [named] = [word for word in step["words"] if word.startswith("--container-env=")]
        assert {"CUDA_DEVICE_MAX_CONNECTIONS", "HF_HOME", "NEMO_HOME"} <= set(named.partition("=")[2].split(","))

    settings = [*CALL, "trainer.num_nodes=2", "trainer.gpus_per_node=8", "run.dir=/results"]
    assert {"--nodes=1", "--ntasks=1"} <= set(converting["words"])
    assert converting["words"][-len(settings) - 2 :] == ["import", "--data", *settings]
    assert converting["env"]["HF_HUB_OFFLINE"] is None, "the import could not reach a hub"

    assert "--kill-on-bad-exit=1" in training["words"]
    assert not [word for word in training["words"] if word.startswith(("--ntasks", "--nodes"))]
    assert rank["env"]["HF_HUB_OFFLINE"] == rank["env"]["TRANSFORMERS_OFFLINE"] == "1"
    assert rank["words"] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--node-rank=1",  # read inside the task; 0 would be the host's
        "--rdzv-id=123456",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=node7:{15000 + 123456 % 10000}",
        "-m",
        "nemo_eaft.train",
        *settings,
    ]


def test_sbatch_shares_converted_checkpoints(cluster: dict[str, str], tmp_path: Path) -> None:
    for shared in (None, str(tmp_path / "shared")):
        Path(cluster["RECORD"]).unlink(missing_ok=True)
        more = {} if shared is None else {"NEMO_EAFT_HOME": shared}
        done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster | more)
        assert done.returncode == 0, done.stderr
        _, converting, training, rank = records(cluster)
        expected = "/results/home" if shared is None else shared
        for step in (converting, training, rank):
            assert step["env"]["NEMO_EAFT_HOME"] == expected
            assert step["env"]["NEMO_HOME"] == f"{expected}/nemo"
        for step in (converting, training):
            [mounts] = [word for word in step["words"] if word.startswith("--container-mounts=")]
            assert mounts.endswith(f",{shared}:{shared}") == (shared is not None)
    assert (tmp_path / "shared").is_dir()


def test_sbatch_passes_settings_that_are_accepted(cluster: dict[str, str], tmp_path: Path) -> None:
    from nemo_eaft.compose import compose

    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster)
    assert done.returncode == 0, done.stderr
    words = records(cluster)[-1]["words"]
    conf, *overrides = words[words.index("nemo_eaft.train") + 1 :]
    settings = compose(conf, overrides)
    assert settings.world_size == 16
    assert settings.data_parallel == 1
    # Without what the script adds the same words are refused, on one GPU.
    with pytest.raises(ValueError, match=r"parallel\.tensor=8"):
        compose(conf, CALL[1:])


@pytest.mark.parametrize("missing", ["IMAGE", "DATA", "RUN", "HF_HOME"])
def test_sbatch_names_a_missing_variable(cluster: dict[str, str], tmp_path: Path, missing: str) -> None:
    del cluster[missing]
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster)
    assert done.returncode != 0
    assert f"set {missing} to" in done.stderr
    assert not Path(cluster["RECORD"]).exists(), "a step was started"


def test_sbatch_needs_a_configuration(cluster: dict[str, str], tmp_path: Path) -> None:
    done = run("bash", SBATCH, cwd=tmp_path, env=cluster)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_sbatch_says_where_it_looks_for_its_neighbours(cluster: dict[str, str], tmp_path: Path) -> None:
    """SLURM runs a copy of a batch script, in a folder of its own."""
    for script in (SBATCH, IMPORT):
        done = run("bash", script, *CALL, cwd=tmp_path, env=cluster | {"SLURM_SUBMIT_DIR": str(tmp_path)})
        assert done.returncode == 2
        assert f"no {tmp_path}/examples/slurm/job.sh" in done.stderr
        assert records(cluster) == []
        more = {"SLURM_SUBMIT_DIR": str(tmp_path), "EXAMPLES": str(ROOT / "examples")}
        done = run("bash", script, *CALL, cwd=tmp_path, env=cluster | more)
        assert done.returncode == 0, done.stderr
        Path(cluster["RECORD"]).unlink()


def test_every_variable_of_the_environment_is_named_for_the_container(tmp_path: Path) -> None:
    script = ROOT / "examples" / "environment.sh"
    told = run("bash", "-c", '. "$0"; echo "$ENVIRONMENT"; env', script, cwd=tmp_path, env={"NCCL_NVLS_ENABLE": "1"})
    named, *lines = told.stdout.splitlines()
    exported = re.findall(r"^export (\w+)=", script.read_text(), re.MULTILINE)
    assert named.split(",") == exported
    assert set(exported) <= {line.partition("=")[0] for line in lines}
    assert "NCCL_NVLS_ENABLE=1" in lines, "the user's own value was lost"


def test_an_import_on_its_own_reads_the_settings_of_the_training(cluster: dict[str, str], tmp_path: Path) -> None:
    """Then a training without a hub: its own import finds all, and asks for nothing."""
    from nemo_eaft.compose import compose

    done = run("bash", IMPORT, *CALL, cwd=tmp_path, env=cluster)
    assert done.returncode == 0, done.stderr
    [alone] = records(cluster)
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    _, _, again, *_ = records(cluster)
    assert alone["env"]["HF_HUB_OFFLINE"] is None
    assert again["env"]["HF_HUB_OFFLINE"] == "1"
    assert alone["words"] == again["words"]
    *_, command, data, conf = alone["words"][: alone["words"].index(CALL[1])]
    assert (command, data, conf) == ("import", "--data", CALL[0])
    compose(conf, alone["words"][alone["words"].index(conf) + 1 :])


def test_folders_may_be_relative(cluster: dict[str, str], tmp_path: Path) -> None:
    """To where sbatch was called; pyxis takes absolute ones alone."""
    for script in (IMPORT, SBATCH):
        relative = cluster | {"DATA": "my data", "RUN": "runs/../runs/one", "HF_HOME": "hub", "NEMO_EAFT_HOME": "home"}
        done = run("bash", script, *CALL, cwd=tmp_path, env=relative)
        assert done.returncode == 0, done.stderr
    for record in records(cluster):
        if record["program"] == "srun":
            [mounts] = [word for word in record["words"] if word.startswith("--container-mounts=")]
            folders = f"{tmp_path}/my data:/data,{tmp_path}/runs/one:/results,{tmp_path}/hub:{tmp_path}/hub"
            assert mounts == f"--container-mounts={folders},{tmp_path}/home:{tmp_path}/home"
            assert record["env"]["HF_HOME"] == f"{tmp_path}/hub"
            assert record["env"]["NEMO_HOME"] == f"{tmp_path}/home/nemo"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["bin", "home", "hub", "runs"]


@pytest.mark.parametrize("name", ["DATA", "RUN", "HF_HOME", "NEMO_EAFT_HOME"])
@pytest.mark.parametrize("sign", [",", ":"])
def test_a_folder_that_would_be_two_mounts_is_refused(
    cluster: dict[str, str], tmp_path: Path, name: str, sign: str
) -> None:
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster | {name: f"{tmp_path}/a{sign}b"})
    assert done.returncode == 2
    assert f"{name}={tmp_path}/a{sign}b: a folder" in done.stderr
    assert records(cluster) == []
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "something was made"


def test_the_import_has_the_cpus_it_asks_for(cluster: dict[str, str], tmp_path: Path) -> None:
    run("bash", IMPORT, *CALL, cwd=tmp_path, env=cluster | {"SLURM_CPUS_PER_TASK": "12"})
    [step] = records(cluster)
    assert step["env"]["SRUN_CPUS_PER_TASK"] == "12"


SWEEP = "sft loss=sft\neaft\n\nstrong loss.alpha=2 loss.top_k=40\n../away loss=sft\n..\n.\n1\n01\n"


@pytest.mark.parametrize(
    "task, name, more", [(1, "sft", ["loss=sft"]), (2, "eaft", []), (4, "strong", 2), (8, "1", []), (9, "01", [])]
)
def test_an_array_is_one_run_a_line(
    cluster: dict[str, str], tmp_path: Path, task: int, name: str, more: list[str] | int
) -> None:
    (tmp_path / "sweep.txt").write_text(SWEEP)
    array = {"SWEEP": str(tmp_path / "sweep.txt"), "SLURM_ARRAY_TASK_ID": str(task)}
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster | array)
    assert done.returncode == 0, done.stderr
    training, rank = records(cluster)[-2:]
    [mounts] = [word for word in training["words"] if word.startswith("--container-mounts=")]
    assert f",{cluster['RUN']}/{name}:/results," in mounts
    added = rank["words"][rank["words"].index(CALL[-1]) + 1 : -3]
    assert added == (["loss.alpha=2", "loss.top_k=40"] if more == 2 else more)


@pytest.mark.parametrize("task", ["3", "5", "10", None])
def test_a_line_without_a_name_starts_nothing(cluster: dict[str, str], tmp_path: Path, task: str | None) -> None:
    """Empty, a way out of the folder, past the end, no array."""
    (tmp_path / "sweep.txt").write_text(SWEEP)
    array = {"SWEEP": str(tmp_path / "sweep.txt")} | ({} if task is None else {"SLURM_ARRAY_TASK_ID": task})
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster | array)
    assert done.returncode != 0
    assert ("does not begin with a name" if task else "SWEEP is for a job array") in done.stderr
    assert records(cluster) == []


@pytest.mark.parametrize("line", ["..", ".", "sft loss.alpha=2"])
def test_a_line_that_has_no_folder_of_its_own_starts_nothing(
    cluster: dict[str, str], tmp_path: Path, line: str
) -> None:
    (tmp_path / "sweep.txt").write_text(f"sft loss=sft\n{line}\n")
    array = {"SWEEP": str(tmp_path / "sweep.txt"), "SLURM_ARRAY_TASK_ID": "2"}
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster | array)
    assert done.returncode == 2
    word = line.split()[0]
    assert f"line 2: {word} is {'the name of two lines' if word == 'sft' else 'no name'}" in done.stderr
    assert records(cluster) == []


def test_sbatch_ends_when_the_import_fails(cluster: dict[str, str], tmp_path: Path) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\necho x >> "{tmp_path}/steps"\nexit 3\n')
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster)
    assert done.returncode == 3
    assert (tmp_path / "steps").read_text() == "x\n"


@pytest.mark.parametrize("code, requeued", [(0, True), (9, False)])
def test_sbatch_asks_to_stop_when_slurm_warns_it_and_requeues(
    cluster: dict[str, str], tmp_path: Path, code: int, requeued: bool
) -> None:
    """A real USR1 to the real shell; srun and scontrol are stand-ins. Nobody gets TERM."""
    folder = Path(cluster["RUN"])
    folder.mkdir()
    (folder / "stop").write_text("of an older job")
    (folder / "stopped.json").write_text("{}")
    (tmp_path / "bin" / "srun").write_text(STOPPING.format(python=sys.executable, import_seconds=0, code=code))
    log = tmp_path / "log"
    with log.open("w") as out:
        shell = subprocess.Popen(["bash", SBATCH, *CALL], cwd=tmp_path, env=cluster, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 30
        while not (folder / "training").exists():
            assert shell.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        for _ in range(2):  # the second one while it waits for the save
            shell.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        assert shell.wait(30) == (75 if requeued else code)
    finally:
        shell.kill()
        shell.wait()
    calls = [record["words"] for record in records(cluster)]
    assert [words for words in calls if words[0] != "show"] == ([["requeue", "123456"]] if requeued else [])
    assert "it asked for a stop before this job was started" in log.read_text()


def test_sbatch_told_during_the_import_trains_nothing(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text(STOPPING.format(python=sys.executable, import_seconds=1.5, code=0))
    shell = subprocess.Popen(["bash", SBATCH, *CALL], cwd=tmp_path, env=cluster)
    try:
        time.sleep(1.0)
        shell.send_signal(signal.SIGUSR1)
        assert shell.wait(30) == 75
    finally:
        shell.kill()
        shell.wait()
    assert not (Path(cluster["RUN"]) / "training").exists()
    calls = [record["words"] for record in records(cluster)]
    assert calls[-1] == ["requeue", "123456"]


def test_sbatch_stopped_by_its_owner_is_not_requeued(cluster: dict[str, str], tmp_path: Path) -> None:
    """`touch $RUN/stop`: the run ends with the code of a stopped one, and nothing starts it again."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/sh\ncase "$*" in *torchrun*) echo "{}" > "$RUN/stopped.json";; esac\n')
    done = run("bash", SBATCH, *CALL, cwd=tmp_path, env=cluster)
    assert done.returncode == 75
    assert "requeue" not in Path(cluster["RECORD"]).read_text()


def test_sbatch_asks_for_one_task_per_node() -> None:
    options = re.findall(r"^#SBATCH (\S+)", SBATCH.read_text(), re.MULTILINE)
    assert "--ntasks-per-node=1" in options
    assert {"--exclusive", "--mem=0", "--open-mode=append", "--requeue", "--signal=B:USR1@600"} <= set(options)
