"""A run that goes on is trained with the loss that it was begun with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_eaft.config import EAFTConfig
from nemo_eaft.loss.collectives import on_rank_zero


def check_same(path: Path, settings: dict[str, Any]) -> None:
    """Refuse, on every rank, to go on with a loss that the run was not trained with; how it is computed may differ.

    Args:
        path: `eaft.json` of the run; a run without one is taken as it is. A setting that is not in it was added since,
            and the run was trained with its default.
        settings: of the loss, as they are to be written there.

    Raises:
        ValueError: naming every setting that differs, with both values, and what this version does not know. Or the
            file holds no JSON.
        RuntimeError: rank 0 could not read the file.
    """
    # Rank 0 reads for all: another machine may not see the folder, and an error is everybody's.
    differing = on_rank_zero(lambda: _differing(path, settings))
    if differing:
        raise ValueError(
            f"{path}: the run was trained with another loss up to this checkpoint: {', '.join(differing)}; go back to "
            "it, or accept the change with EAFTCallback(..., allow_config_change=True)"
        )


def _differing(path: Path, settings: dict[str, Any]) -> list[str]:
    try:
        # What an older version did not write had its default.
        old = dataclasses.asdict(EAFTConfig()) | {"measure_only": False} | json.loads(path.read_text())
    except FileNotFoundError:
        old = settings
    return [
        f"{name}: {value} -> {settings.get(name, 'unknown to this version of nemo_eaft')}"
        for name, value in old.items()
        if name != "fused_linear" and (name not in settings or value != settings[name])
    ]
