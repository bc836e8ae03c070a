"""Real Megatron models of every kind of rank, without memory: right ones pass every check, and each wrong one fails the
check that is its own."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.plan import rehearsal
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.memory import state_bytes
from nemo_eaft.plan.parameters import rank_parameters
from nemo_eaft.plan.rehearsal import rehearse
from nemo_eaft.plan.rehearsal.checks import check, memory_by_stage
from nemo_eaft.plan.rehearsal.records import Built
from nemo_eaft.plan.shape import ModelShape, find_config
from nemo_eaft.settings import Settings
from tests.harness import alive, kill, wait_for
from tests.plan import rehearsal_cases as cases
from tests.plan.rehearsal_variants import VARIANTS

ROOT = Path(__file__).parents[2]
GIGABYTES = 1e9

# The first test of the module builds what all of them look at: a minute or two, on a machine with nothing else to do.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What each variant built, by family and name."""
    found: dict[tuple[str, str], Any] = {}
    for family in VARIANTS:
        result = tmp_path_factory.mktemp("variants") / f"{family}.json"
        command = [sys.executable, "-m", "tests.plan.rehearsal_variants", str(result), family]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found |= {(family, name): built for name, built in json.loads(result.read_text()).items()}
    return found


def faults(built: Any, hf_config: dict[str, Any], settings: Settings) -> dict[str, str]:
    """Faults of the checks that failed, by name."""
    assert "error" not in built, built
    checks = check(Built.from_mapping(built), settings, ModelShape.from_hf(hf_config))
    return {each.name: "\n".join(each.faults) for each in checks if each.faults}


@pytest.mark.parametrize(
    "family, name, hf_config, settings",
    [
        ("qwen2", "right", cases.QWEN2, cases.TIED),
        ("qwen2", "right_in_float32", cases.QWEN2, cases.STAGES),
        ("qwen2", "right_with_whole_optimizer", cases.QWEN2, cases.WHOLE_OPTIMIZER),
        ("qwen3_moe", "right", cases.QWEN3_MOE, cases.EXPERTS),
        ("glm4", "right", cases.GLM4, cases.SANDWICHED),
    ],
)
def test_what_is_built_is_what_was_planned(
    variants: dict[tuple[str, str], Any], family: str, name: str, hf_config: dict[str, Any], settings: Settings
) -> None:
    """To the byte, on models this small."""
    built = variants[family, name]
    assert faults(built, hf_config, settings) == {}
    layout, shape = Layout.of(settings), ModelShape.from_hf(hf_config)
    assert len(built["ranks"]) == layout.tensor * layout.pipeline * layout.expert
    for stage, there in memory_by_stage(Built.from_mapping(built).ranks).items():
        planned = state_bytes(rank_parameters(shape, layout, stage), settings, layout)
        assert there == {"weights": planned.weights, "gradients": planned.gradients, "optimizer": planned.optimizer}


def test_sizes_of_a_rank_by_hand(variants: dict[tuple[str, str], Any]) -> None:
    """A quarter of the layers, half of each matrix; bytes without the padding that a distributed optimizer adds."""
    ranks = Built.from_mapping(variants["qwen2", "right"]).ranks
    chunk = ranks[0].chunks[0]
    assert chunk.parameters["embedding.word_embeddings.weight"].shape == (260, 64)
    assert chunk.parameters["decoder.layers.1.self_attention.linear_qkv.weight"].shape == (64, 64)
    assert chunk.parameters["decoder.layers.1.mlp.linear_fc1.weight"].shape == (96, 64)
    assert {name.split(".")[2] for name in chunk.parameters if "layers" in name} == {"0", "1"}
    assert {name.split(".")[2] for name in ranks[0].chunks[1].parameters if "layers" in name} == {"4", "5"}
    layer = 64 * 64 + 64 + 32 * 64 + 96 * 64 + 64 * 48 + 2 * 64
    count = 260 * 64 + 4 * layer
    assert count <= ranks[0].weights / 2 < 1.02 * count
    assert ranks[0].gradients == 2 * ranks[0].weights
    # Two data-parallel ranks share float32 weights and two moments.
    assert ranks[0].optimizer == 3 * ranks[0].weights


@pytest.mark.parametrize(
    "name, check_name, message",
    [
        ("attached_everywhere", "loss", "stage 0, TP rank 0, chunk 0 has an EAFT loss; expected none"),
        ("attached_nowhere", "loss", "stage 1, TP rank 1, chunk 1 has no EAFT loss; expected one"),
        ("vocabulary_too_small", "vocabulary", "the loss was given 512 tokens; expected 520"),
        ("untied", "conversion", "output_layer.weight"),
        ("uneven_stages", "parameters", "the plan says"),
    ],
)
def test_a_fault_fails_its_check(
    variants: dict[tuple[str, str], Any], name: str, check_name: str, message: str
) -> None:
    settings = cases.STAGES if name == "uneven_stages" else cases.TIED
    found = faults(variants["qwen2", name], cases.QWEN2, settings)
    assert message in found[check_name], found


@pytest.mark.parametrize(
    "name, check_name, message",
    [
        ("heads_of_another_size", "parameters", "of the Hugging Face model"),
        ("too_few_experts", "parameters", "of the Hugging Face model"),
    ],
)
def test_a_field_of_the_importer_that_is_lost(
    variants: dict[tuple[str, str], Any], name: str, check_name: str, message: str
) -> None:
    found = faults(variants["qwen3_moe", name], cases.QWEN3_MOE, cases.EXPERTS)
    assert message in found[check_name], found
    assert "conversion" in found, found


def test_a_vocabulary_above_the_model_is_refused(variants: dict[tuple[str, str], Any]) -> None:
    assert variants["qwen2", "vocabulary_too_large"]["error"].startswith("vocab_size: 528; allowed: 2 to 520")


def test_qwen3_30b_a3b(variants: dict[tuple[str, str], Any]) -> None:
    """PP 2, EP 4: each rank holds 32 of 128 experts."""
    built = variants["qwen3_moe", "qwen3_30b_a3b"]
    assert faults(built, find_config("Qwen/Qwen3-30B-A3B"), cases.QWEN3_30B_A3B) == {}
    assert built["whole"]["hf_parameters"] == 30_532_122_624
    assert len(built["ranks"]) == 8


def test_glm_4_32b(variants: dict[tuple[str, str], Any]) -> None:
    """TP 2, PP 4, with the layers that conf/ gives to the last stage."""
    built = variants["glm4", "glm_4_32b"]
    assert faults(built, find_config("THUDM/GLM-4-32B-0414"), cases.GLM_4_32B) == {}
    assert len(built["ranks"]) == 8
    layers = [
        {name.split(".")[2] for chunk in rank["chunks"] for name in chunk["parameters"] if "layers" in name}
        for rank in built["ranks"]
    ]
    assert [len(held) for held in layers] == [16] * 6 + [13] * 2


@pytest.mark.slow
def test_qwen_32b_on_1024_ranks() -> None:
    """TP 8, PP 4, DP 32, through the process that the command starts."""
    settings = cases.settings_of("Qwen/Qwen2.5-32B-Instruct", 1024, tensor=8, pipeline=4, sequence=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = rehearse(settings, fused_linear=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.passed, "\n".join(found.lines())
    assert found.built.whole.hf_parameters == 32_763_876_352
    assert len(found.built.ranks) == 32
    assert found.built.peak_bytes < 8 * GIGABYTES
    # Of the processor, the import of NeMo included: a machine that is busy does not change it much.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    # A quarter of the layers, an eighth of each matrix, two bytes each, and the norms whole.
    last = memory_by_stage(found.built.ranks)[3]
    assert last["weights"] == pytest.approx(2 * 1_072_679_936, rel=1e-3)


# The real process, whose build is refused at once; NeMo is not imported.
REFUSES = """
import sys
import nemo_eaft.cpu, nemo_eaft.launch
from nemo_eaft.plan.rehearsal import worker

def build(*_):
    raise ValueError("vocab_size: 528;\\nallowed: 2 to 520")

nemo_eaft.cpu.enable = lambda: print("a line", file=sys.stderr)
nemo_eaft.launch.is_users = lambda error: True
worker.build = build
sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "worker, error, message",
    [
        ("refuses", ValueError, "^vocab_size: 528;\nallowed: 2 to 520$"),
        ("breaks", RuntimeError, "(?s)exit code 1.*KeyError: 'gone'"),
    ],
)
def test_how_the_process_that_builds_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, worker: str, error: type[Exception], message: str
) -> None:
    lines = {"refuses": REFUSES, "breaks": "raise KeyError('gone')"}
    (tmp_path / "stand_in.py").write_text(lines[worker])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(rehearsal, "_WORKER", "stand_in")
    with pytest.raises(error, match=message):
        rehearse(cases.settings_of("Qwen/Qwen3-0.6B", 1), fused_linear=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_building_process_ends_with_the_plan(tmp_path: Path, number: signal.Signals) -> None:
    """It would go on building for minutes, and nobody would know whose it is."""
    # A shell has SIGINT ignored in what it starts with `&`, which would be inherited.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from nemo_eaft.plan import rehearsal; rehearsal._WORKER = 'tests.plan.endless_worker'; "
        "from nemo_eaft.cli import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", code, "plan", "qwen3-0.6b", "--rehearse"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, cwd=ROOT, env=environment) as plan:
        building: list[int] = []

        def builds() -> bool:
            assert plan.poll() is None
            building[:] = map(int, Path(f"/proc/{plan.pid}/task/{plan.pid}/children").read_text().split())
            # The worker's folder, which it makes when it has imported NeMo.
            return any(tmp_path.glob("tmp*/config.json"))

        try:
            wait_for(builds, 600)
            assert building
            plan.send_signal(number)
            wait_for(lambda: not any(map(alive, building)))
            assert plan.wait(60) != 0
            assert not any(tmp_path.glob("tmp*/config.json"))
            # What was asked is the plan's, which cannot remove it when it is killed.
            assert any(tmp_path.glob("tmp*/request.json")) == (number is signal.SIGKILL)
        finally:
            kill([*building, plan.pid])
