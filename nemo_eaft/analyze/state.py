"""``analyze.state.json``: how far an analysis is, whole at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_eaft.analyze.inputs import MAY_CHANGE, PATHS
from nemo_eaft.analyze.tally import Tally
from nemo_eaft.atomic import replacing
from nemo_eaft.integrity import SUMS
from nemo_eaft.ready import Ready
from nemo_eaft.settings import Settings
from nemo_eaft.settings_mapping import to_mapping

FILE = "analyze.state.json"
"""File in ``run.dir``."""
_FORMAT = 1  # raise when what is counted changes


@dataclass
class State:
    """What is known after the first `rows_done` rows of the prepared file."""

    identity: dict[str, Any]
    """What the numbers depend on."""
    rows_done: int
    tally: Tally


def identity(settings: Settings, ready: Ready) -> dict[str, Any]:
    """What must be the same for an analysis to go on: settings that are read but for the layout, rows, and
    weights. Rows and tokenizer are known by their content and weights by where they are, however that is written."""
    kept = to_mapping(settings)
    for key in (*MAY_CHANGE, *PATHS, "run.dir"):
        group, _, name = key.partition(".")
        kept[group].pop(name, None)
    weights = ready.resume_from or ready.checkpoint
    sums = weights / SUMS
    rows = json.loads((Path(settings.run.dir) / "data" / "prepared.json").read_text(encoding="utf-8"))["identity"]
    # Of a data set the name is as it was given, and may be a path.
    sources = {
        part: {key: value for key, value in source.items() if key not in ("file", "dataset")}
        for part, source in rows["sources"].items()
    }
    return {
        "format": _FORMAT,
        "settings": kept,
        "rows": rows | {"sources": sources},
        "weights": [
            os.path.realpath(weights),
            hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else None,
        ],
    }


def load(settings: Settings, ready: Ready) -> State:
    """The state in ``run.dir``, or the beginning where there is none of this analysis."""
    wanted = identity(settings, ready)
    try:
        plain = json.loads((Path(settings.run.dir) / FILE).read_text(encoding="utf-8"))
        if plain["identity"] == wanted:
            return State(wanted, plain["rows_done"], Tally.from_json(plain["tally"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return State(wanted, 0, Tally())


def save(state: State, run_dir: Path) -> None:
    """Replace the file in one rename."""
    plain = {"identity": state.identity, "rows_done": state.rows_done, "tally": state.tally.to_json()}
    with replacing(run_dir / FILE) as temporary:
        temporary.write_text(json.dumps(plain), encoding="utf-8")
