"""Files and folders that are either the old one or the whole new one, whenever the process dies."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; at the end of a clean ``with`` block rename it over ``path``.

    The block creates the file and closes it. If the block raises, the temporary file is removed and ``path``
    keeps what it had. The parent folder is created if missing. One writer at a time per ``path``.

    Example::

        with replacing(Path("summary.json")) as temporary:
            temporary.write_text("{}")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own per process: ranks that report the same failure do not write into one temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # The rename may reach the disk before the content does; a crash between would leave an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def numbered(path: Path) -> Path:
    """A name beside ``path`` that nothing has: ``<stem>.1<suffix>``, or the next number."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return free


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `target` when the block ends well and removed when it does not.

    An existing `target` is replaced only then, so a failed attempt leaves the previous one as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
