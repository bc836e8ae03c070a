"""How `make test` installs Megatron-Bridge: beside the environment, so that nothing there changes."""

import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_bridge_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    told = subprocess.run(
        ["make", "--dry-run", "test", f"VENV={tmp_path}/env"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in told.stdout.splitlines() if "megatron-bridge" in line and "pip install" in line]
    words = shlex.split(line)
    assert words[words.index("--target") + 1] == f"{tmp_path}/env/megatron-bridge"
    assert {"--no-deps", "--only-binary=:all:"} <= set(words)
    assert words[words.index("-c") + 1] == "constraints-bridge.txt"
    pins = [line for line in (ROOT / "constraints-bridge.txt").read_text().splitlines() if line and line[0] != "#"]
    assert {pin.split("==")[0] for pin in pins} == set(words[-2:]), "each is pinned, and nothing else is installed"
