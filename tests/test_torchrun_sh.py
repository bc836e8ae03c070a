"""examples/torchrun.sh: the command that it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_eaft.compose import compose
from nemo_eaft.restart import OWN_STORES
from tests.cluster import CALL, cluster, records  # noqa: F401
from tests.test_packaging import ROOT, run

SCRIPT = ROOT / "examples" / "torchrun.sh"


def test_the_same_line_starts_every_machine(cluster: dict[str, str], tmp_path: Path) -> None:
    given = {"HEAD": "node7", "NODES": "2", "RESTARTS": "3", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    done = run(SCRIPT, *CALL, cwd=tmp_path, env=cluster | given)
    assert done.returncode == 0, done.stderr
    [torchrun] = records(cluster)
    words = torchrun["words"]
    assert words[: words.index("-m")] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=3",
        "--rdzv-id=nemo-eaft",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:29500",
    ]
    assert words[words.index("-m") :][:2] == ["-m", "nemo_eaft.train"]
    conf, *overrides = words[words.index("-m") + 2 :]
    settings = compose(conf, overrides)
    assert (settings.world_size, settings.data.train) == (16, "/data/a b.jsonl")
    assert torchrun["env"][OWN_STORES] == "1"
    assert torchrun["env"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


@pytest.mark.parametrize("missing", ["HEAD", "NODES", "CONF"])
def test_what_is_missing_is_named(cluster: dict[str, str], tmp_path: Path, missing: str) -> None:
    given = {name: "2" for name in ("HEAD", "NODES") if name != missing}
    done = run(SCRIPT, *(() if missing == "CONF" else CALL), cwd=tmp_path, env=cluster | given)
    assert done.returncode != 0
    assert ("usage" if missing == "CONF" else f"set {missing} to") in done.stderr
    assert records(cluster) == []
