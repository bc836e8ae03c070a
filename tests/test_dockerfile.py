"""The Dockerfile without a Docker engine: its text, and its steps, run where packages stand as they do in an image.

The image's part is played by a virtual environment that sees what this one has installed, but for nemo_eaft.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Literal

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_packaging import PYPROJECT, ROOT, run

Target = Literal["bridge", "nemo"]
TEXT = (ROOT / "Dockerfile").read_text()


def stage(target: Target) -> list[str]:
    """The instructions of a target, continued lines joined."""
    lines = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    [start] = [number for number, line in enumerate(lines) if re.fullmatch(rf"FROM \S+ AS {target}", line)]
    later = [number for number, line in enumerate(lines) if line.startswith("FROM ") and number > start]
    return lines[start : later[0] if later else None]


def runs(target: Target) -> tuple[str, str]:
    """The commands of its two steps: install, and try."""
    install, smoke = (line.removeprefix("RUN ") for line in stage(target) if line.startswith("RUN "))
    return install, smoke


def test_the_targets_stand_on_the_images_that_the_readme_names() -> None:
    assert "\nARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11.01\nARG BRIDGE_IMAGE=nvcr.io/nvidia/nemo:26.04\n" in TEXT
    # The last one is built where none is named.
    assert re.findall(r"^FROM .*", TEXT, re.MULTILINE) == [
        "FROM ${BRIDGE_IMAGE} AS bridge",
        "FROM ${BASE_IMAGE} AS nemo",
    ]


@pytest.mark.parametrize("target", ["nemo", "bridge"])
def test_the_package_is_tried_where_its_source_is_not(target: Target) -> None:
    """In the source folder Python would import the package from there."""
    steps = [line.split()[:2] for line in stage(target) if line.split()[0] in ("WORKDIR", "RUN")]
    assert [step[0] for step in steps] == ["WORKDIR", "RUN", "WORKDIR", "RUN"]
    assert steps[0] != steps[2]
    install, smoke = runs(target)
    for word in ("--no-deps", "--no-build-isolation", "--no-cache"):
        assert word in install
    modules = {"nemo": "nemo.collections.llm, nemo_eaft.nemo", "bridge": "nemo_eaft.megatron, nemo_eaft.bridge"}
    assert f'-c "import {modules[target]}" &&' in smoke


@pytest.mark.parametrize("target", ["nemo", "bridge"])
def test_docker_context_holds_what_is_copied(target: Target) -> None:
    sources = [word for line in stage(target) if line.startswith("COPY ") for word in line.split()[1:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", "nemo_eaft", PYPROJECT["project"]["readme"]} <= allowed


# What images bring, by NVIDIA's tables of software versions.
IMAGES = {
    "25.09": {"nemo-toolkit": "2.5.0", "megatron-core": "0.14.0", "torch": "2.8.0a0", "nemo-run": "0.6.0"},
    "25.11.01": {"nemo-toolkit": "2.6.0", "megatron-core": "0.15.0", "torch": "2.9.0a0", "nemo-run": "0.7.0"},
    "26.04": {"megatron-core": "0.17.0", "torch": "2.11.0a0", "nemo-run": "0.9.0"},
}


@pytest.mark.parametrize("image", IMAGES)
def test_the_stated_minimums_admit_the_images(image: str) -> None:
    """Otherwise `pip check` would complain in them, and an install without --no-deps replace what they bring."""
    project = PYPROJECT["project"]
    assert project["requires-python"] == ">=3.11"
    stated = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["nemo"])]
    found = {canonicalize_name(one.name): one.specifier for one in stated}
    for name, version in IMAGES[image].items():
        assert found[canonicalize_name(name)].contains(version, prereleases=True), f"{name} {version}"


@pytest.mark.skipif(
    shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
    reason="hadolint is not installed",
)
def test_hadolint_has_no_objection(tmp_path: Path) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = run("hadolint", ROOT / "Dockerfile", cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /x\n")
    assert "DL3003" in run("hadolint", tmp_path / "Dockerfile", cwd=ROOT, env=env).stdout


# --- the steps, run ---


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A virtual environment that sees every package of this one but nemo_eaft, and has no pip of its own."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in {Path(entry) for entry in sys.path if entry.endswith("site-packages")}:
        for entry in folder.iterdir():
            if "nemo_eaft" not in entry.name and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    made = tmp_path / "venv"
    venv.create(made, symlinks=True)
    (own,) = made.glob("lib/python*/site-packages")
    (own / "image.pth").write_text(f"{site}\n")
    return made


def packages(image: Path) -> dict[str, str]:
    """Everything that is installed there: version and place by name."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({d.name: f'{d.version} {d.locate_file(str())}' for d in m.distributions()}))"
    )
    done = run(image / "bin" / "python", "-c", code, cwd=image)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def step(command: str, image: Path, cwd: Path, *more: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the Dockerfile as Docker does, by the shell, with the environment's programs first."""
    path = ":".join(map(str, (image / "bin", *more, "/usr/bin", "/bin")))
    # No index: what the step cannot do with what is there fails, as it would change the image.
    env = {"PATH": path, "HOME": str(image), "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "PIP_CONSTRAINT": "/none"}
    return run("sh", "-c", command.replace("/opt/venv", str(image)), cwd=cwd, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["nemo", "bridge"])
def test_an_install_changes_nothing_of_the_image(image: Path, tmp_path: Path, target: Target) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if target == "bridge" and uv is None:
        pytest.skip("uv is not installed")
    source, workspace = tmp_path / "opt", tmp_path / "workspace"
    workspace.mkdir()
    source.mkdir()
    for line in stage(target):
        if line.startswith("COPY "):
            *names, to = line.split()[1:]
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / to)
    before = packages(image)
    assert "torch" in before
    assert "nemo_eaft" not in before
    install, smoke = runs(target)
    done = step(install, image, source, *([Path(uv).parent] if uv else []))
    assert done.returncode == 0, done.stdout + done.stderr
    after = packages(image)
    assert {name: place for name, place in after.items() if before.get(name) != place}.keys() == {"nemo_eaft"}
    assert before.keys() < after.keys()
    (installed,) = image.glob("lib/python*/site-packages/nemo_eaft")
    assert (installed / "py.typed").exists()
    assert (installed / "conf" / "demo.yaml").exists()
    if target == "bridge":
        # Megatron-Bridge needs Transformer Engine, which no machine without a GPU has.
        smoke = smoke.replace(", nemo_eaft.bridge", "")
    tried = step(smoke, image, workspace)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert list(workspace.iterdir()) == []
