"""`nemo_eaft.cpu.enable`: what it changes it can put back, and where it does not fit it says so and changes nothing."""

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nemo_eaft.cpu.patch import Patch, PatchSet
from tests.nemo.ranks import run_ranks

LINE = "nemo_eaft: CPU backend on (real NeMo and Megatron-Core, gloo, no GPU)\n"


class Base:
    def inherited(self) -> str:
        return "theirs"


class Target(Base):
    @staticmethod
    def static() -> str:
        return "theirs"

    def method(self) -> str:
        return "theirs"


def patch(name: str, value: Any, owner: Any = Target) -> Patch:
    return Patch(owner=owner, name=name, value=value, reason="a test")


def test_undo_restores_own_inherited_and_static_attributes() -> None:
    before = dict(vars(Target))
    patches = PatchSet()
    patches.apply(
        [
            patch("method", lambda self: "ours"),
            patch("method", lambda self: "ours twice"),
            patch("inherited", lambda self: "ours"),
            patch("static", staticmethod(lambda: "ours")),
        ]
    )
    assert (Target().method(), Target().inherited(), Target().static()) == ("ours twice", "ours", "ours")
    assert [applied.name for applied in patches.applied] == ["method", "method", "inherited", "static"]
    patches.undo()
    assert dict(vars(Target)) == before
    assert "inherited" not in vars(Target)
    assert isinstance(vars(Target)["static"], staticmethod)
    assert patches.applied == []


def test_a_missing_target_leaves_nothing_patched() -> None:
    before = dict(vars(Target))
    patches = PatchSet()
    with pytest.raises(RuntimeError, match=r"not there: Target\.gone: a test"):
        patches.apply([patch("method", lambda self: "ours"), patch("gone", None)])
    assert dict(vars(Target)) == before
    assert patches.applied == []


def test_a_name_imported_before_the_patch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    owner, early, foreign = (types.ModuleType(name) for name in ("acme.owner", "acme.early", "other"))
    for module in (owner, early, foreign):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    owner.call = lambda: "theirs"  # type: ignore[attr-defined]
    early.by_value = owner.call  # type: ignore[attr-defined]
    foreign.by_value = owner.call  # type: ignore[attr-defined]
    patches = PatchSet()
    patches.apply([patch("call", lambda: "ours", owner)])
    assert patches.bypassed(("acme",)) == ["acme.early.by_value (replaced in acme.owner.call: a test)"]
    early.by_value = owner.call  # type: ignore[attr-defined]
    assert patches.bypassed(("acme",)) == []


# --- the patches themselves, in a process that has them


def described() -> list[tuple[str, str]]:
    import nemo_eaft.cpu

    return [(str(patch), patch.reason) for patch in nemo_eaft.cpu.applied_patches()]


def test_every_patch_names_the_upstream_file_it_answers() -> None:
    (found,) = run_ranks(described, 1)
    assert len(found) > 25
    for text, reason in found:
        assert re.search(r"\w+/[\w*]+", reason), text


def test_line_numbers_in_reasons_are_right() -> None:
    """Each `file.py:line` of a reason names a line that holds what the reason is about."""
    import importlib.util

    about = {
        "optimizer/distrib_optimizer.py:637": 's["step"].item()',
        "optimizer/distrib_optimizer.py:821": 's["step"] = step',
        "optimizer/distrib_optimizer.py:927": "for key in dst_tensors",
        "optimizer/distrib_optimizer.py:952": "_get_main_param_and_optimizer_states",
        "optimizer/optimizer.py:667": "param.type()",
        "pipeline_parallel/schedules.py:573": 'device="cuda"',
        "pipeline_parallel/p2p_communication.py:398": "torch.cuda.synchronize",
        "tensor_parallel/random.py:41": "_get_cuda_rng_state",
        "tensor_parallel/random.py:72": "_set_cuda_rng_state",
        "tensor_parallel/random.py:196": "torch.cuda.get_rng_state",
        "tensor_parallel/random.py:204": "def fork",
        "tensor_parallel/random.py:370": "torch.cuda.manual_seed",
        "transformer/dot_product_attention.py:143": "assert packed_seq_params is None",
        "transformer/dot_product_attention.py:58": "self.config.context_parallel_size == 1",
        "models/gpt/gpt_layer_specs.py:306": '"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"',
        "transformer/moe/moe_utils.py:958": "te_general_gemm is not None",
        "transformer/moe/token_dispatcher.py:822": "def _maybe_dtoh_and_synchronize",
        "collections/llm/peft/lora.py:703": "m.__class__ == te.Linear",
        "collections/llm/peft/utils.py:54": "HAVE_TE = all(",
        "collections/llm/gpt/model/base.py:103": ".cuda(",
        "collections/llm/gpt/data/utils.py:777": "torch.cuda.LongTensor",
        "callbacks/progress_printer.py:155": "log_megatron_timers",
        "lightning/io/pl.py:493": "_fix_tensors_device",
        "lightning/megatron_init.py:238": "torch.cuda.device_count",
        "lightning/megatron_parallel.py:617": "torch.cuda.Stream",
    }
    (found,) = run_ranks(described, 1)
    named = {name for _, reason in found for name in re.findall(r"[\w/]+\.py:\d+", reason)}
    named = {re.sub(r"^(core|nemo)/", "", name) for name in named}
    assert named == about.keys()
    folders = []
    for package in ("megatron.core", "nemo"):
        specification = importlib.util.find_spec(package)
        assert specification is not None
        folders += [*(specification.submodule_search_locations or [])]
    roots = [folders[0], folders[1], f"{folders[1]}/lightning/pytorch"]
    for name, text in about.items():
        path, line = name.split(":")
        lines = [_line(f"{root}/{path}", int(line)) for root in roots]
        assert any(text in found for found in lines), (name, lines)


def _line(path: str, number: int) -> str:
    try:
        with open(path) as file:
            return file.read().splitlines()[number - 1]
    except FileNotFoundError:
        return ""


def owners() -> dict[str, Any]:
    import nemo_eaft.cpu

    return {repr(patch.owner): patch.owner for patch in nemo_eaft.cpu.applied_patches()}


def cycle() -> dict[str, Any]:
    """disable, enable, disable: the attributes of every owner in between."""
    import nemo_eaft.cpu
    from nemo_eaft.cpu.patch import PatchSet

    places = owners()
    patched = [(patch.owner, patch.name) for patch in nemo_eaft.cpu.applied_patches()]
    nemo_eaft.cpu.disable()
    assert not nemo_eaft.cpu.is_enabled()
    assert nemo_eaft.cpu.applied_patches() == []
    before = {name: dict(vars(owner)) for name, owner in places.items()}
    ours = [
        f"{owner}.{name}"
        for owner, name in patched
        if "nemo_eaft" in str(getattr(vars(owner).get(name), "__module__", ""))
    ]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        nemo_eaft.cpu.enable()
        nemo_eaft.cpu.enable()
    assert nemo_eaft.cpu.is_enabled()
    during = {name: dict(vars(owner)) for name, owner in places.items()}
    again = len(nemo_eaft.cpu.applied_patches())
    nemo_eaft.cpu.disable()
    nemo_eaft.cpu.disable()
    after = {name: dict(vars(owner)) for name, owner in places.items()}
    assert isinstance(nemo_eaft.cpu._APPLIED, PatchSet)
    return {
        "said": said.getvalue(),
        "ours left": ours,
        "patches": (len(patched), again),
        "changed": [name for name in places if not _same(before[name], during[name])],
        "owners": list(places),
        "restored": [name for name in places if _same(before[name], after[name])],
    }


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def test_enable_and_disable_leave_no_trace_and_can_be_repeated() -> None:
    found = run_ranks(cycle, 2)
    assert [rank["said"] for rank in found] == [LINE, ""], "one line, and one for all ranks of a job"
    for rank in found:
        assert rank["ours left"] == []
        assert rank["patches"][0] == rank["patches"][1]
        assert rank["changed"] == rank["owners"]
        assert rank["restored"] == rank["owners"]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def cuda_available() -> contextlib.AbstractContextManager[None]:
    import torch

    return replaced(torch.cuda, "is_available", lambda: True)


def imported_early() -> contextlib.AbstractContextManager[None]:
    import nemo_eaft.cpu

    return replaced(nemo_eaft.cpu, "_WAS_ENABLED", False)


def newer_megatron() -> contextlib.AbstractContextManager[None]:
    import megatron.core

    return replaced(megatron.core, "__version__", "0.151.0")


def newer_nemo() -> contextlib.AbstractContextManager[None]:
    import nemo

    return replaced(nemo, "__version__", "2.8.0")


def other_norm() -> contextlib.AbstractContextManager[None]:
    from megatron.core.transformer import transformer_block

    return replaced(transformer_block, "LayerNormImpl", type("TENorm", (), {}))


@contextlib.contextmanager
def target_gone() -> Iterator[None]:
    from nemo.lightning.io import pl

    before = pl._fix_tensors_device
    del pl._fix_tensors_device
    try:
        yield
    finally:
        pl._fix_tensors_device = before


@contextlib.contextmanager
def call_site_by_value() -> Iterator[None]:
    from nemo.collections.llm.gpt.model import llama
    from nemo.lightning.io import state

    llama.apply_transforms = state.apply_transforms
    try:
        yield
    finally:
        del llama.apply_transforms


def refusal(situation: Callable[[], contextlib.AbstractContextManager[None]]) -> dict[str, Any]:
    import nemo_eaft.cpu

    places = owners()
    nemo_eaft.cpu.disable()
    said = io.StringIO()
    with situation():
        before = {name: dict(vars(owner)) for name, owner in places.items()}
        with contextlib.redirect_stderr(said), pytest.raises(RuntimeError) as error:
            nemo_eaft.cpu.enable()
        after = {name: dict(vars(owner)) for name, owner in places.items()}
    enabled = nemo_eaft.cpu.is_enabled()
    nemo_eaft.cpu.enable()
    return {
        "message": str(error.value),
        "said": said.getvalue(),
        "untouched": all(_same(before[name], after[name]) for name in places),
        "enabled": enabled,
        "works afterwards": nemo_eaft.cpu.is_enabled(),
    }


@pytest.mark.parametrize(
    "situation, message",
    [
        (cuda_available, "a CUDA device is available"),
        (imported_early, "must run before megatron.core and nemo is imported"),
        (newer_megatron, r"megatron-core 0\.15\.x, found 0\.151\.0"),
        (newer_nemo, r"nemo_toolkit 2\.7\.x, found 2\.8\.0"),
        (other_norm, "chose TENorm as its norm"),
        (target_gone, r"not there: nemo\.lightning\.io\.pl\._fix_tensors_device"),
        (call_site_by_value, r"not reached by the CPU backend: nemo\..*llama\.apply_transforms"),
    ],
)
def test_refusals_say_why_and_patch_nothing(situation: Any, message: str) -> None:
    (found,) = run_ranks(refusal, 1, situation)
    assert re.search(message, found.pop("message"))
    assert found == {"said": "", "untouched": True, "enabled": False, "works afterwards": True}


FRESH = """
import sys
import torch
before = {place: dict(vars(place)) for place in (torch, torch.cuda, torch.Tensor)}
import nemo_eaft.cpu
nemo_eaft.cpu.enable()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert not torch.cuda.is_available()
patched = [(patch.owner, patch.name) for patch in nemo_eaft.cpu.applied_patches() if patch.owner in before]
during = {name for owner, name in patched if vars(owner)[name] is not before[owner].get(name)}
nemo_eaft.cpu.disable()
# Lightning and torch's compiler wrap some functions of torch while they load: those are not ours to restore.
after = {name for owner, name in patched if vars(owner).get(name) is not before[owner].get(name)}
print("patched", len(patched), len(during), "left", after)
print("still there", [name for name in ("megatron.core", "nemo") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_fresh_process_says_one_line_and_gets_its_torch_back() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], capture_output=True, text=True, check=True, timeout=200
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("nemo_eaft")] == [LINE.strip()]
    first, second = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"patched (\d+) \1 left set\(\)", first)
    assert second == "still there ['megatron.core', 'nemo']"
