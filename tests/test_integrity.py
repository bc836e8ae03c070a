"""Sums of a folder: `sha256sum` agrees, and every kind of damage is found and named."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_eaft import integrity
from nemo_eaft.integrity import SUMS, Sum, faults, files, sums, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "step=3"
    for name, size in (("weights/__0_0.distcp", 100_000), ("weights/common.pt", 17), ("context/model.yaml", 0)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(size))
    write_sums(root)
    return root


def test_sha256sum_reads_it(folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines()
    names = ["context/model.yaml", "weights/__0_0.distcp", "weights/common.pt"]
    assert [line.split("  ")[1] for line in lines] == [name for name in names for _ in range(2)]
    for name, line in zip(names, lines[1::2], strict=True):
        assert line == f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
    check = ["sha256sum", "--check", "--strict", SUMS]
    assert subprocess.run(check, cwd=folder, capture_output=True, check=False).returncode == 0
    (folder / names[2]).write_bytes(b"x" * 17)
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "weights/common.pt: FAILED" in done.stdout


def flip(path: Path, at: int = 0, bit: int = 0) -> None:
    """One bit of a file; its size and its time of change stay."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (
        lambda root: flip(root / "weights/__0_0.distcp", 99_999, 7),
        "weights/__0_0.distcp",
        "its bytes are not those that were saved",
    ),
    "cut short": (
        lambda root: os.truncate(root / "weights/__0_0.distcp", 99_999),
        "weights/__0_0.distcp",
        "99999 bytes, but 100000 were saved",
    ),
    "grown": (
        lambda root: (root / "context/model.yaml").write_text("a"),
        "context/model.yaml",
        "1 bytes, but 0 were saved",
    ),
    "removed": (lambda root: (root / "weights/common.pt").unlink(), "weights/common.pt", "is missing"),
    "a folder in its place": (
        lambda root: to_folder(root / "weights/common.pt"),
        "weights/common.pt",
        "bytes, but 17 were saved",
    ),
    "no sums": (lambda root: (root / SUMS).unlink(), SUMS, "is missing"),
    "sums emptied": (lambda root: (root / SUMS).write_text(""), SUMS, "cut short or changed"),
    "sums cut short": (
        lambda root: os.truncate(root / SUMS, (root / SUMS).stat().st_size - 1),
        SUMS,
        "cut short or changed",
    ),
    "sums without their last file": (
        lambda root: (root / SUMS).write_text("".join((root / SUMS).read_text().splitlines(True)[:-1])),
        SUMS,
        "cut short or changed",
    ),
    "a bit of the sums": (lambda root: flip(root / SUMS, 30, 7), SUMS, ""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_name(folder: Path, kind: str) -> None:
    assert faults(folder) == []
    damage, name, what = DAMAGE[kind]
    damage(folder)
    (found,) = faults(folder)
    assert found.startswith(f"{folder / name}: ")
    assert what in found


def test_every_bit_of_a_small_file_counts(folder: Path) -> None:
    path = folder / "weights/common.pt"
    for bit in range(17 * 8):
        flip(path, bit // 8, bit % 8)
        assert [line.partition(":")[0] for line in faults(folder)] == [str(path)]
        flip(path, bit // 8, bit % 8)
    assert faults(folder) == []


def test_all_damaged_files_are_named_and_only_those_asked_for(folder: Path) -> None:
    flip(folder / "weights/common.pt")
    flip(folder / "weights/__0_0.distcp")
    assert len(faults(folder)) == 2
    assert faults(folder, lambda name: not name.startswith("weights/")) == []
    (folder / "notes.txt").write_text("of the user")
    assert len(faults(folder)) == 2


def test_sums_of_other_ranks_are_taken_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_PATIENCE", 0.0)
    monkeypatch.setattr(integrity, "_AGAIN", 0.0)
    name = "weights/__0_0.distcp"
    before = (folder / SUMS).read_text()
    write_sums(folder, sums(folder, [name]))
    assert (folder / SUMS).read_text() == before
    write_sums(folder, {name: Sum("0" * 64, 100_000)})
    assert f"{'0' * 64}  {name}\n" in (folder / SUMS).read_text()
    with pytest.raises(ValueError, match=r"weights/__9_0\.distcp was hashed by another rank but is not seen here"):
        write_sums(folder, {"weights/__9_0.distcp": Sum("0" * 64, 1)})


def test_a_listing_that_lags_behind_loses_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system, where another machine has just written a part."""
    name = "weights/__0_0.distcp"
    before = (folder / SUMS).read_text()
    known = sums(folder, [name])
    monkeypatch.setattr(integrity, "files", lambda folder: [there for there in files(folder) if there != name])
    write_sums(folder, known)
    assert (folder / SUMS).read_text() == before

    # Not even the file itself is seen at first.
    aside = (folder / name).rename(folder.parent / "aside")
    waits: list[float] = []

    def arrive(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            aside.rename(folder / name)

    monkeypatch.setattr("nemo_eaft.integrity.time.sleep", arrive)
    write_sums(folder, known)
    assert len(waits) == 3
    assert (folder / SUMS).read_text() == before
    assert faults(folder) == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_that_cannot_be_looked_at_for_a_moment_is_not_seen_yet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    name = "weights/__0_0.distcp"
    before = (folder / SUMS).read_text()
    known = sums(folder, [name])
    is_file = Path.is_file
    looks: list[Path] = []

    def look(path: Path) -> bool:
        if path == folder / name:
            looks.append(path)
            if len(looks) <= 3:
                raise OSError(number, os.strerror(number))
        return is_file(path)

    monkeypatch.setattr(integrity, "_AGAIN", 0.0)
    monkeypatch.setattr(Path, "is_file", look)
    write_sums(folder, known)
    assert len(looks) > 3
    assert (folder / SUMS).read_text() == before


def test_a_failed_write_leaves_no_sums(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / SUMS).unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_sums(folder)
    assert files(folder) == ["context/model.yaml", "weights/__0_0.distcp", "weights/common.pt"]
    assert not (folder / SUMS).exists()
