"""The process that builds: `python -m nemo_eaft.plan.rehearsal.worker PARENT REQUEST RESULT`.

PARENT is the number of the process that started it, with which it ends. A process of its own, because Megatron's
process groups are global, and because the CPU backend must be on before NeMo is imported. It builds one rank after the
other.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_eaft.own_process import end_cleanly_with
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.rehearsal.records import Built
from nemo_eaft.settings import (
    LossSettings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    Settings,
    TrainerSettings,
)
from nemo_eaft.settings_data import DataSettings


def build(settings: Settings, hf_config: Mapping[str, Any], fused_linear: bool) -> Built:
    """Build the whole model and one rank of every kind. The CPU backend must be on."""
    from nemo_eaft.plan.rehearsal.build import build_rank, build_whole, places
    from nemo_eaft.plan.rehearsal.model import write_hf_files

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf_files(hf_config, folder)
        whole = build_whole(_on_one_rank(settings), folder)
        ranks = tuple(
            build_rank(settings, folder, place, vocab_size=whole.vocab_size, fused_linear=fused_linear)
            for place in places(Layout.of(settings))
        )
    return Built(
        whole=whole,
        ranks=ranks,
        seconds=time.monotonic() - started,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _on_one_rank(settings: Settings) -> Settings:
    return dataclasses.replace(
        settings,
        parallel=ParallelSettings(),
        trainer=dataclasses.replace(settings.trainer, num_nodes=1, gpus_per_node=1),
    )


def settings_from(mapping: Mapping[str, Any]) -> Settings:
    """Settings from `dataclasses.asdict` of them; what they warn of was said before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Settings(
            model=ModelSettings(**mapping["model"]),
            data=DataSettings(**mapping["data"]),
            loss=LossSettings(**mapping["loss"]),
            parallel=ParallelSettings(**mapping["parallel"]),
            trainer=TrainerSettings(**mapping["trainer"]),
            run=RunSettings(**mapping["run"]),
        )


def main(argv: list[str]) -> int:
    """Entry point. 0: RESULT holds what was built; 2: the settings are refused, and RESULT holds the reason."""
    import nemo_eaft.cpu
    from nemo_eaft.launch import is_users

    end_cleanly_with(int(argv[0]))
    request, result = map(Path, argv[1:])
    asked = json.loads(request.read_text())
    nemo_eaft.cpu.enable()
    try:
        built = build(settings_from(asked["settings"]), asked["hf_config"], asked["fused_linear"])
    except ValueError as error:
        if not is_users(error):
            raise
        result.write_text(json.dumps({"refused": str(error)}))
        return 2
    result.write_text(json.dumps(built.as_mapping()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
