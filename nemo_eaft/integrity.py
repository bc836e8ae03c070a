"""SHA-256 of a checkpoint's files. `torch.load` and distributed checkpoints load a flipped bit in silence.

``SHA256SUMS`` lies in the checkpoint's folder, in the format of ``sha256sum``, so ``sha256sum -c SHA256SUMS`` checks it
without this package. Sizes stand in its comments: a file that was cut short is found without reading the others.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nemo_eaft.atomic import replacing

SUMS = "SHA256SUMS"
"""File in a checkpoint's folder, written last: a checkpoint without it is not complete."""

_CHUNK = 8 * 1024 * 1024  # bytes
_THREADS = 16  # at most; hashlib lets go of the interpreter, so they run side by side
_SIZE = "# bytes"
_PATIENCE = 120.0  # seconds; NFS keeps what it knows of a folder for 60 (`acdirmax`)
_AGAIN = 1.0  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class Sum:
    """What a file held when it was saved."""

    digest: str
    """SHA-256, 64 lower-case hexadecimal digits."""
    size: int
    """Bytes."""


def sums(folder: Path, names: Iterable[str]) -> dict[str, Sum]:
    """Bring files to the disk and hash them.

    Args:
        folder: the checkpoint.
        names: paths relative to it.

    Raises:
        OSError: a file cannot be read, or the disk reports that it could not keep what was written to it.
    """
    return _in_threads(lambda name: _sum(folder / name, sync=True), names)


def files(folder: Path) -> list[str]:
    """Paths of all files below ``folder`` but ``SHA256SUMS``, relative and sorted."""
    # What cannot be looked at now counts: it is waited for, or hashing it says why it cannot be read.
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if _seen(path, where_it_fails=True))
    return sorted(name for name in found if name != SUMS)


def write_sums(folder: Path, known: Mapping[str, Sum] | None = None) -> None:
    """Write ``SHA256SUMS`` of a folder that is complete, and bring it to the disk; it is whole or absent at any moment.

    Args:
        folder: the checkpoint.
        known: sums of files that were hashed already, by relative path; the others are hashed here. They are listed
            even if the folder's listing lags behind, as that of a network file system does where another machine wrote
            them, but each must be seen here within two minutes.

    Raises:
        ValueError: a file of ``known`` is not seen here, or a name has a line break.
        OSError: as for :func:`sums`.
    """
    known = known or {}
    there = sorted({*files(folder), *known})
    deadline = time.monotonic() + _PATIENCE
    while gone := [name for name in known if not _seen(folder / name)]:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: {gone[0]} was hashed by another rank but is not seen here: is the disk shared?"
            )
        time.sleep(_AGAIN)
    broken = [name for name in there if "\n" in name or "\\" in name]
    if broken:
        raise ValueError(f"{folder}: {broken[0]!r} has a line break or backslash in its name")
    found = {**known, **sums(folder, (name for name in there if name not in known))}
    lines = [f"{_SIZE} {found[name].size}  {name}\n{found[name].digest}  {name}\n" for name in there]
    for inner in {folder, *(folder / name for name in there)}:
        if inner.is_dir():
            _sync_folder(inner)
    with replacing(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    _sync_folder(folder)
    _sync_folder(folder.parent)


def faults(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with a folder, one line a file, `<file>: <what>`; empty if it is as it was saved.

    Files that were added later do not matter.

    Args:
        folder: the checkpoint. It must have ``SHA256SUMS``; without one, that is the fault.
        wanted: which files to look at, by relative path.
    """
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{folder / SUMS}: {_reason(error)}"]
    try:
        expected = {name: it for name, it in _parse(text).items() if wanted(name)}
    except ValueError as error:
        return [f"{folder / SUMS}: {error}"]
    found = {name: _size_fault(folder / name, it.size) for name, it in expected.items()}
    # What has another size need not be read, and then nothing else has to be: the checkpoint is of no use.
    if not any(found.values()):
        found = _in_threads(lambda name: _content_fault(folder / name, expected[name].digest), expected)
    return [f"{folder / name}: {what}" for name, what in sorted(found.items()) if what]


def _parse(text: str) -> dict[str, Sum]:
    sizes: dict[str, int] = {}
    found: dict[str, Sum] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        first, _, name = line.partition("  ")
        if line.startswith(_SIZE) and first[len(_SIZE) :].strip().isdigit():
            sizes[name] = int(first[len(_SIZE) :])
        elif len(first) == 64 and set(first) <= set("0123456789abcdef") and name in sizes:
            found[name] = Sum(first, sizes[name])
        else:
            raise ValueError(f"line {number} is not one of a list of sums: the file was cut short or changed")
    if not found or len(found) != len(sizes) or not text.endswith("\n"):
        raise ValueError(f"{len(found)} sums of {len(sizes)} files: the file was cut short or changed")
    return found


def _seen(path: Path, where_it_fails: bool = False) -> bool:
    """Whether a file is there. A network file system may fail for a moment (ESTALE, EIO), and tell at the next look."""
    try:
        return path.is_file()
    except OSError:
        return where_it_fails


def _size_fault(path: Path, expected: int) -> str:
    try:
        size = path.stat().st_size
    except OSError as error:
        return _reason(error)
    return "" if size == expected else f"{size} bytes, but {expected} were saved"


def _content_fault(path: Path, expected: str) -> str:
    try:
        found = _sum(path).digest
    except OSError as error:
        return _reason(error)
    return "" if found == expected else f"its bytes are not those that were saved (SHA-256 {found}, saved {expected})"


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sum(path: Path, sync: bool = False) -> Sum:
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return Sum(digest.hexdigest(), size)


def _in_threads(function: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    listed = list(names)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(listed, pool.map(function, listed), strict=True))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
