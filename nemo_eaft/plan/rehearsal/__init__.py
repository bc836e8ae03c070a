"""``nemo-eaft plan --rehearse``: the real Megatron model of every kind of rank, built without memory, and compared with
the plan.

NeMo and Megatron-Core build each rank on torch's meta device, in fake process groups of the whole world, with EAFT,
Megatron's DDP buffers and optimizer (:mod:`.build`, in a process of its own, :mod:`.worker`). What was built comes back
as plain data (:mod:`.records`) and is checked (:mod:`.checks`). Nothing is trained, and no weights are read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_eaft.own_process import run_to_its_end
from nemo_eaft.plan.rehearsal.checks import check
from nemo_eaft.plan.rehearsal.records import Built
from nemo_eaft.plan.rehearsal.report import Rehearsal
from nemo_eaft.plan.shape import ModelShape, find_config
from nemo_eaft.settings import Settings

_WORKER = "nemo_eaft.plan.rehearsal.worker"


def check_environment() -> None:
    """Whether a rehearsal can be built here, without an import of what it needs.

    Raises:
        ValueError: NeMo or Megatron-Core is missing, or there is what the CPU backend refuses (:mod:`nemo_eaft.cpu`).
    """
    for name, title in (("nemo", "NeMo"), ("megatron.core", "Megatron-Core")):
        if not _installed(name):
            raise ValueError(f"--rehearse: {title} is not installed; without --rehearse the plan needs none")
    for name, title in (("transformer_engine", "Transformer Engine"), ("apex", "Apex")):
        if _installed(name):
            raise ValueError(
                f"--rehearse: {title} is installed here, and the CPU backend, which builds, does not run beside it; "
                "rehearse where it is not, or plan without --rehearse"
            )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def rehearse(settings: Settings, fused_linear: bool) -> Rehearsal:
    """Build what the ranks of a run would build, and check it against the plan.

    settings: of a run that fits its model (:func:`nemo_eaft.hf_model.check_layout`).
    fused_linear: what ``loss.fused_linear`` means on the GPUs of the run.

    Raises:
        ValueError: EAFT refuses what is asked for, or the model is not known here.
        RuntimeError: building failed otherwise, as where NeMo or Megatron-Core refuses.
    """
    hf_config = find_config(settings.model.hf)
    built = _in_own_process(settings, hf_config, fused_linear)
    return Rehearsal(settings, built, tuple(check(built, settings, ModelShape.from_hf(hf_config))))


def _in_own_process(settings: Settings, hf_config: Mapping[str, Any], fused_linear: bool) -> Built:
    with tempfile.TemporaryDirectory() as name:
        request, result = Path(name, "request.json"), Path(name, "result.json")
        asked = {"settings": asdict(settings), "hf_config": dict(hf_config), "fused_linear": fused_linear}
        request.write_text(json.dumps(asked))
        command = [sys.executable, "-m", _WORKER, str(os.getpid()), str(request), str(result)]
        # Nothing is computed; a GPU that is there would be taken for the place to build.
        code, said = run_to_its_end(command, {"CUDA_VISIBLE_DEVICES": ""}, silent=True)
        if code == 2:
            raise ValueError(json.loads(result.read_text())["refused"])
        if code:
            raise RuntimeError(f"the rehearsal failed (exit code {code}):\n{said[-4000:]}")
        return Built.from_mapping(json.loads(result.read_text()))
