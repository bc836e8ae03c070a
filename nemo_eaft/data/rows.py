"""Reading rows one by one, each with the place it came from, so that a bad one can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LONGEST_LINE = 16 << 20
"""Bytes of a line, at most. A longer one is a bad row, and is neither held in memory nor parsed."""

_PIECE = 1 << 20


class RowError(ValueError):
    """Why one row cannot be used. The place is added by whoever knows it."""


@dataclass(frozen=True)
class Row:
    """One row, or the reason why it could not be read."""

    where: str
    """``file:line``, or ``name[split]:row`` for a data set; both count from 1."""
    values: dict[str, Any]
    error: str | None = None

    @property
    def number(self) -> int:
        """The line of its file, or the row of its data set, from 1."""
        return int(self.where.rsplit(":", 1)[1])


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        key: the setting that named it, for messages: ``data.train``.
        name: a ``.jsonl`` file, a folder, or the name of a data set.
        split: used where ``name`` is no file; a part of one is written as in ``datasets``, ``train[100:]``.
        subset: configuration of a data set that has several.
    """

    key: str
    name: str
    split: str
    subset: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the name means a file (which may be missing), not a data set."""
        path = Path(self.name)
        return path.is_file() or (path.suffix in (".jsonl", ".json") and not path.is_dir())

    def check(self) -> None:
        """Raise ``ValueError`` if there is nothing to read; touches no network."""
        path = Path(self.name)
        if self.is_file:
            if not path.is_file():
                what = "not a regular file" if path.exists() else "no such file"
                raise ValueError(f"{self.key}={self.name}: {what}")
            if path.suffix not in (".jsonl", ".json"):
                raise ValueError(f"{self.key}={self.name}: a file must be .jsonl, one JSON object a line")
            try:
                open(path, "rb").close()
            except OSError as error:
                raise ValueError(f"{self.key}={self.name}: cannot be read: {error.strerror}") from error
            if path.stat().st_size == 0:
                raise ValueError(f"{self.key}={self.name}: the file is empty")
        elif path.is_absolute() and not path.exists():
            raise ValueError(f"{self.key}={self.name}: no such file or folder")

    def ignored(self) -> list[str]:
        """Settings without effect: a file has no splits and no configurations."""
        if not self.is_file:
            return []
        part = [f"{self.key}_split={self.split}"] if "[" in self.split else []
        return part + ([f"data.subset={self.subset}"] if self.subset is not None else [])

    def identity(self) -> dict[str, Any]:
        """What must be unchanged for rows read earlier to be those of now."""
        if self.is_file:
            with open(self.name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"file": str(Path(self.name).resolve()), "sha256": digest}
        return {"dataset": self.name, "split": self.split, "fingerprint": self._dataset()._fingerprint}

    def rows(self) -> Iterator[Row]:
        """Yield every row, one at a time, never the whole file at once.

        Raises:
            ValueError: nothing can be read at all. One bad row never raises: it comes with its ``error``.
        """
        self.check()
        return self._jsonl() if self.is_file else self._records()

    def _jsonl(self) -> Iterator[Row]:
        path = Path(self.name)
        with open(path, "rb") as file:
            for number, raw in enumerate(_lines(file), start=1):
                where = f"{path.name}:{number}"
                if raw is None:
                    yield Row(where, {}, f"longer than {LONGEST_LINE >> 20} MiB")
                    continue
                try:
                    # A byte order mark, which some editors write, is no part of the first row.
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield Row(where, {}, f"not UTF-8 at byte {error.start + 1} of the line")
                    continue
                if not text.strip():
                    continue
                try:
                    values = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse)
                    if "\\ud" in text or "\\uD" in text:
                        # Half of a pair of escapes is JSON, but no text.
                        json.dumps(values, ensure_ascii=False).encode()
                except RowError as error:
                    yield Row(where, {}, str(error))
                    continue
                except UnicodeEncodeError:
                    yield Row(where, {}, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
                    continue
                except (ValueError, RecursionError) as error:
                    yield Row(where, {}, f"not JSON: {error}")
                    continue
                if not isinstance(values, dict):
                    yield Row(where, {}, f"must be a JSON object, got {type(values).__name__}")
                    continue
                yield Row(where, values)

    def _records(self) -> Iterator[Row]:
        for number, values in enumerate(self._dataset(), start=1):
            yield Row(f"{self.name}[{self.split}]:{number}", dict(values))

    def _dataset(self) -> Any:
        import datasets

        path = Path(self.name)
        try:
            if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
                if self.subset is not None:
                    raise ValueError(f"data.subset={self.subset} means nothing for a folder of save_to_disk")
                return _saved(datasets.load_from_disk(str(path)), self.split)
            return datasets.load_dataset(self.name, self.subset, split=self.split)
        except ValueError as error:
            hint = f"; data.subset={self.subset}, null: the only one" if "BuilderConfig" in str(error) else ""
            raise ValueError(f"{self.key}={self.name}, split {self.split}: {error}{hint}") from error
        except Exception as error:
            # datasets raises many unrelated types for what is one thing to the user: it is not there.
            raise ValueError(
                f"{self.key}={self.name} is neither a .jsonl file nor a data set that can be read: "
                f"{type(error).__name__}: {error}"
            ) from error


def _saved(loaded: Any, split: str) -> Any:
    """A split, or a part of one, of what ``load_from_disk`` returned; a single data set counts as split ``train``."""
    import datasets

    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {split.partition("[")[0]: loaded}
    try:
        [part] = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(it) for name, it in splits.items()})
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"no split {split}; there are {', '.join(splits)}") from error
    whole = splits[part.splitname]
    return whole.select(range(*slice(part.from_, part.to).indices(len(whole))))


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file, None for one that is too long."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_PIECE)) and not rest.endswith(b"\n"):
            pass
        yield None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose names stands once: Python would keep the last in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in values if names.count(name) > 1)
        raise RowError(f"has {twin!r} {names.count(twin)} times")
    return values


def _refuse(name: str) -> NoReturn:
    raise RowError(f"not JSON: {name}")
