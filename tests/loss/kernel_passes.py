"""Running the kernels in tests: the device, all ranks at once, and kernels with a changed source."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eaft import EAFTConfig
from nemo_eaft.loss import kernels, selection
from nemo_eaft.loss.shard import Shard
from tests.loss.interpreter import INTERPRETED, LOCK, repair
from tests.loss.parallel import Ranked, run_sharded

DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    repair()


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss runs in the kernels, one rank at a time in the interpreter."""
    monkeypatch.setenv("NEMO_EAFT_BACKEND", "triton")
    if INTERPRETED:
        monkeypatch.setattr(kernels, "local_records", _locked(kernels.local_records))
        monkeypatch.setattr(kernels, "write_gradient", _locked(kernels.write_gradient))


def _locked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with LOCK:
            return function(*args)

    return call


def run(
    logits: Tensor, labels: Tensor, config: EAFTConfig, world_size: int = 1, *, vocab: int, **kwargs: Any
) -> Ranked:
    """``run_sharded`` on the device, its results on the CPU."""
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    got = run_sharded(logits.to(DEVICE), labels.to(DEVICE), config, world_size, vocab_size=vocab, **moved)
    return Ranked([type(out)(*(value.cpu() for value in out)) for out in got.outs], got.gradient.cpu())


def records(logits: Tensor, target: list[int], columns: int, top_k: int | None, module: Any = kernels) -> Tensor:
    """``local_records`` of one shard on the device, on the CPU."""
    local = torch.tensor(target, dtype=torch.int32, device=DEVICE)
    return module.local_records(logits.to(DEVICE), local, Shard(0, columns, max(columns, 2)), top_k).cpu()


@contextlib.contextmanager
def mutated(module: str, old: str, new: str, folder: Path) -> Iterator[ModuleType]:
    """The kernels with ``old`` replaced by ``new`` in ``kernels`` or ``selection``.

    From a file of its own: Triton reads the source of a kernel from the file that it stands in.
    """
    original = {"kernels": kernels, "selection": selection}[module]
    assert original.__file__ is not None
    source = Path(original.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module}"
    path = folder / f"wrong_{module}.py"
    path.write_text(source.replace(old, new))
    name = f"nemo_eaft.loss.wrong_{module}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    try:
        spec.loader.exec_module(changed)
        if module == "kernels":
            yield changed
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "selection", changed.selection)
            yield kernels
    finally:
        del sys.modules[name]
