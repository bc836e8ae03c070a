"""What ranks do in the tests of `nemo-eaft analyze`."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_eaft.analyze import run, state
from nemo_eaft.ready import Ready
from nemo_eaft.settings import Settings
from tests.nemo.ranks import DIES


def analyze(settings: Settings, checkpoint: Path, dies_after: int | None = None) -> bool:
    """`run.analyze`; every rank dies once `dies_after` states are written."""
    if dies_after is not None:
        save, left = state.save, [dies_after]

        def saved(reached: state.State, run_dir: Path) -> None:
            save(reached, run_dir)
            left[0] -= 1
            if left[0] == 0:
                os._exit(DIES)

        state.save = saved  # type: ignore[assignment]
    return run.analyze(settings, Ready(checkpoint, False))
