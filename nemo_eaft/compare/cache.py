"""Measurements that need not be made again: kept by the content of the weights and all that a measurement depends
on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_eaft.atomic import replacing
from nemo_eaft.compare.record import Measures, from_json, to_json
from nemo_eaft.integrity import SUMS, files, sums


def content_digest(folder: Path) -> str:
    """SHA-256 of a folder's files. A checkpoint of ours has them in ``SHA256SUMS``, which every export checks first."""
    known = folder / SUMS
    if known.is_file():
        return hashlib.sha256(known.read_bytes()).hexdigest()
    return digest({name: found.digest for name, found in sorted(sums(folder, files(folder)).items())})


def digest(value: Any) -> str:
    """SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Store:
    """Measurements in one folder, a file each."""

    def __init__(self, folder: Path, depends_on: dict[str, Any]) -> None:
        """depends_on: plain values of everything but the weights that a number depends on."""
        self.folder = folder
        self.depends_on = depends_on

    def get(self, content: str) -> Measures | None:
        """What was measured of weights with this digest; None: nothing whole."""
        try:
            return from_json(json.loads(self._path(content).read_text(encoding="utf-8"))["measures"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, content: str, measures: Measures) -> Measures:
        """Keep a measurement, and return it as it will be read again."""
        kept: dict[str, Any] = {"weights": content, "depends_on": self.depends_on, "measures": to_json(measures)}
        with replacing(self._path(content)) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return from_json(kept["measures"])

    def _path(self, content: str) -> Path:
        return self.folder / f"{digest([content, self.depends_on])[:24]}.json"
