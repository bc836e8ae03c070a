"""What a stranger gets: wheel, pinned environment, scripts, the commands of the README."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# --- the wheel ---


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder whose old files would enter the next wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nemo_eaft", source / "nemo_eaft", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "conf").symlink_to("nemo_eaft/conf")
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    built = run(*pip, "--wheel-dir", out, source, cwd=source)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel alone; with it on PYTHONPATH the rest comes from this environment."""
    site = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    done = run(*pip, "--target", site, wheel, cwd=site)
    assert done.returncode == 0, done.stderr
    return site


def test_wheel_holds_every_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "nemo_eaft").rglob("*")
        if path.suffix in (".py", ".yaml", ".css", ".js") or path.name == "py.typed"
    }
    assert any(name.startswith("nemo_eaft/conf/") for name in shipped)
    assert shipped <= set(names), "the wheel lacks files; a package folder without __init__.py?"
    # Neither the link `conf` nor tests, examples or a second copy under another name.
    assert [name for name in names if ".dist-info/" not in name and name not in shipped] == []
    assert [name for name in names if name.endswith("/LICENSE")]


def test_installed_wheel_runs_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    env = dict(os.environ, PYTHONPATH=str(installed))
    script = installed / "bin" / "nemo-eaft"
    told = run(script, "--help", cwd=tmp_path, env=env)
    assert told.returncode == 0, told.stderr
    for command in ("import", "train", "export"):
        assert command in told.stdout
    code = (
        "import nemo_eaft.compose as c; print(c.__file__); "
        "print(c.compose('qwen3-0.6b', ['data.train=rows.jsonl']).model.hf)"
    )
    composed = run(sys.executable, "-c", code, cwd=tmp_path, env=env)
    assert composed.returncode == 0, composed.stderr
    origin, model = composed.stdout.split()
    assert Path(origin).is_relative_to(installed), "another copy of the package was imported"
    assert model == "Qwen/Qwen3-0.6B"
    assert list(tmp_path.iterdir()) == [], "reading a configuration left files behind"


def stated_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    return [Requirement(text) for text in chain(project["dependencies"], extras)]


def test_project_states_minimums_only() -> None:
    """An upper bound would make pip replace what a container brings."""
    project, requirements = PYPROJECT["project"], stated_requirements()
    for requirement in requirements:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators <= {">="}, f"{requirement} is more than a minimum"
    names = {canonicalize_name(requirement.name) for requirement in requirements}
    assert {"torch", "megatron-core", "nemo-toolkit", "nemo-run"} <= names
    assert project["scripts"] == {"nemo-eaft": "nemo_eaft.cli:main"}


def test_every_import_is_declared() -> None:
    """A module that only came along with something else is missing as soon as that something changes."""
    provided_by = metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in stated_requirements()}
    undeclared = set()
    for path in (ROOT / "nemo_eaft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - {"nemo_eaft", *sys.stdlib_module_names}:
                packages = {canonicalize_name(name) for name in provided_by.get(top, [top])}
                if not packages & declared:
                    undeclared.add(f"{path.relative_to(ROOT)} imports {top}")
    assert sorted(undeclared) == []


# --- constraints.txt ---

RESOLVED = "# --- Resolved together"


def undocumented_pins(text: str) -> list[str]:
    """Deliberate pins without a comment of a sentence's length directly above."""
    found, comment = [], ""
    for line in text.split(RESOLVED)[0].splitlines():
        if line.startswith("#"):
            comment += line.lstrip("# ") + " "
            continue
        if "==" in line and len(comment.split()) < 4:
            found.append(line)
        comment = ""
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return dict(zip(names, (version for _, version in pairs), strict=True))


def test_every_deliberate_pin_says_why() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert text.count(RESOLVED) == 1
    assert undocumented_pins(text) == []
    # The check can fail: no comment, a heading cut off by an empty line, a comment that says nothing.
    assert undocumented_pins("a==1\n# --- Deliberate pins: each has its reason ---\n\nb==1\n# old\nc==1\n") == [
        "a==1",
        "b==1",
        "c==1",
    ]


def test_everything_the_project_asks_for_is_pinned() -> None:
    pinned = pins()
    for requirement in stated_requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes the pin {version}"


def test_this_environment_is_the_pinned_one() -> None:
    if not (Path(sys.prefix) / ".nemo-eaft-installed").exists():
        pytest.skip("this environment was not made by `make install`")
    other = {}
    for name, wanted in pins().items():
        try:
            version = Version(metadata.version(name)).public  # 2.13.0+cpu satisfies 2.13.0
        except metadata.PackageNotFoundError:
            continue  # another platform's, or not an installed one
        if version != wanted:
            other[name] = (version, wanted)
    assert other == {}


# --- Makefile, continuous integration ---


def test_torch_index_applies_to_torch_alone(tmp_path: Path) -> None:
    def commands(*settings: str) -> str:
        told = run("make", "--dry-run", "install", f"VENV={tmp_path}/env", *settings, cwd=ROOT)
        assert told.returncode == 0, told.stderr
        return told.stdout

    lines = [line for line in commands("TORCH_INDEX=some-index").splitlines() if "--index-url" in line]
    assert len(lines) == 1
    assert lines[0].endswith("--index-url some-index --no-deps torch")
    assert "--index-url" not in commands()
    assert all("-c constraints.txt" in line for line in commands().splitlines() if "pip install" in line)


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)
    told = run("make", "--dry-run", "test", cwd=ROOT)
    for tool in ("ruff check", "ruff format --check", "mypy", "hadolint Dockerfile", "pytest"):
        assert tool in told.stdout


def test_summary_counts_gpu_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = gpu: x\n")
    pytester.makepyfile(
        "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_a(n): raise RuntimeError\ndef test_b(): pass\n"
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*tests marked gpu: 2 skipped (no CUDA device here)*"])


# --- scripts ---


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(path for kind in ("*.sh", "*.sbatch") for path in (ROOT / "examples").rglob(kind))
    assert len(scripts) >= 6
    done = run(shellcheck, "-x", *scripts, ROOT / ".ci" / "run", cwd=ROOT)
    assert done.returncode == 0, done.stdout


# --- README ---

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# Every command that the README or a page of docs/ shows, and the test or program that runs it.
EXERCISED = {
    "make demo": "Makefile:demo",
    "make test": ".ci/run:make test",
    "make install": "Makefile:install",
    "docker build": "tests/test_dockerfile.py:test_an_install_changes_nothing_of_the_image",
    "sbatch": "tests/test_sbatch.py:test_sbatch_starts_one_torchrun_per_node",
    "examples/torchrun.sh": "tests/nemo/test_two_machines.py:torchrun.sh",
    "python examples/nemo_run_slurm.py": "tests/test_nemo_run.py:nemo_run_slurm.py",
    "nemo-eaft import": 'tests/test_cli.py:"import"',
    "nemo-eaft train": 'tests/test_cli.py:"train"',
    "nemo-eaft plan": 'tests/plan/test_command.py:"plan"',
    "nemo-eaft analyze": 'tests/nemo/test_analyze.py:"analyze"',
    "nemo-eaft compare": 'tests/compare/test_command.py:"compare"',
    "nemo-eaft export": 'tests/test_cli_export.py:"export"',
    "torchrun --nproc-per-node 2 examples/nemo_script.py": "tests/nemo/test_tutorial.py:examples/nemo_script.py",
    "torchrun --nproc-per-node 8 examples/nemo_script.py": "tests/nemo/test_tutorial.py:examples/nemo_script.py",
    "torchrun": "tests/test_packaging.py:nemo_eaft.train",
    "lm_eval run": "tests/nemo/test_evaluate.py:lm_eval",
    "pip install": "tests/test_packaging.py:def installed",
}


def readme_commands(text: str) -> list[str]:
    """Commands of the ```bash blocks: continued lines joined, comments and VAR=value prefixes removed."""
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*$", "", line).strip()
            command = re.sub(r"^(?:[A-Z_]+=\S+\s+)+", "", command)
            if command and not command.startswith("#"):
                commands.append(re.sub(r"\s+", " ", command))
    return commands


def test_readme_opens_with_the_two_commands() -> None:
    assert readme_commands((ROOT / "README.md").read_text())[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_only_commands_that_are_run(page: Path) -> None:
    for command in readme_commands(page.read_text()):
        keys = [key for key in EXERCISED if command == key or command.startswith(key + " ")]
        assert keys, f"{page.name} shows {command!r}, which nothing runs"
        file, needle = EXERCISED[keys[0]].split(":", 1)
        assert needle in (ROOT / file).read_text(), f"{file} no longer covers {command!r}"
        for option in re.findall(r"\bexamples/\S+", command):
            assert (ROOT / option).exists(), f"{page.name} names {option}, which does not exist"


def test_pages_name_configurations_that_exist() -> None:
    from nemo_eaft.compose import compose, shipped

    checked = 0
    for command in (command for page in PAGES for command in readme_commands(page.read_text())):
        found = re.match(
            r"(?:nemo-eaft (?:train|import)|sbatch \S+|torchrun .*-m nemo_eaft\.train|examples/torchrun\.sh) (\S+)(.*)",
            command,
        )
        if not found:
            continue
        conf, words = found[1], found[2].split()
        assert conf in shipped(), f"{conf} is used, which conf/ does not hold"
        if "import" in command and not any(word.startswith("data.train=") for word in words):
            words.append("data.train=rows.jsonl")
        if "sbatch" in command or "torchrun.sh" in command:
            words += ["trainer.num_nodes=2", "trainer.gpus_per_node=8"]
        compose(conf, words)
        checked += 1
    assert checked >= 4


def test_readme_commands_are_found_in_a_text() -> None:
    """The parser sees what a reader would copy: a misread block would let a dead command through."""
    text = "```bash\nA=1 B=x make demo  # why\n# note\nsbatch a \\\n  b\n```\n```python\nmake nothing\n```\n"
    assert readme_commands(text) == ["make demo", "sbatch a b"]
