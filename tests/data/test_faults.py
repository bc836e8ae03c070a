"""What a file of rows can hold that is no row: each is named by file and line, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.data import prepare
from nemo_eaft.data.rows import LONGEST_LINE, Source
from tests.data.support import make_settings, make_tokenizer

GOOD = b'{"input": "a", "output": "b"}\n'
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


FAULTS: dict[str, tuple[bytes, str]] = {
    "broken line": (b'{"input": "a", "output": "b"', "not JSON: Expecting ',' delimiter"),
    "two rows in a line": (b'{"input": "a", "output": "b"} {"input": "a", "output": "b"}', "not JSON: Extra data"),
    "list": (b'["a", "b"]', "must be a JSON object, got list"),
    "empty answer": (b'{"input": "a", "output": ""}', "'output' is empty: there is no answer to learn"),
    "blank answer": (b'{"input": "a", "output": " \\n "}', "'output' is empty: there is no answer to learn"),
    "null": (b'{"input": null, "output": "b"}', "'input' must be text, got NoneType"),
    "number": (b'{"input": 5, "output": "b"}', "'input' must be text, got int"),
    "list of texts": (b'{"input": ["a"], "output": "b"}', "'input' must be text, got list"),
    "not UTF-8": (b'{"input": "\xe9", "output": "b"}', "not UTF-8 at byte 12 of the line"),
    "UTF-16": ('{"input": "a"}'.encode("utf-16-le"), "not JSON"),
    "same name twice": (b'{"input": "a", "output": "b", "output": "c"}', "has 'output' 2 times"),
    "same name twice, deeper": (b'{"input": "a", "output": "b", "x": {"y": 1, "y": 1}}', "has 'y' 2 times"),
    "NaN": (b'{"input": "a", "output": "b", "score": NaN}', "not JSON: NaN"),
    "infinity": (b'{"input": "a", "output": "b", "score": -Infinity}', "not JSON: -Infinity"),
    "huge number": (b'{"input": "a", "output": "b", "n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "deep": (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON: maximum recursion depth"),
    "raw NUL": (b'{"input": "a\x00", "output": "b"}', "not JSON: Invalid control character"),
    "half a surrogate pair": (b'{"input": "\\ud83d", "output": "b"}', "holds half of a surrogate pair"),
    "too many tokens": (
        json.dumps({"input": "a", "output": "b " * 500}).encode(),
        "1002 tokens, trainer.seq_length=128 allows no more",
    ),
    "too long": (b'{"input": "' + b"a" * LONGEST_LINE + b'", "output": "b"}', "longer than 16 MiB"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, tokenizer: Any, name: str) -> None:
    line, message = FAULTS[name]
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError) as error:
        prepare(make_settings(tmp_path, path), tokenizer)
    assert f"data.train={path}: 1 of 3 rows cannot be used" in str(error.value)
    assert f"t.jsonl:2: {message}" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_line_is_left_out_where_that_is_asked_for(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(GOOD + FAULTS[name][0] + b"\n" + GOOD)
    settings = make_settings(tmp_path, tmp_path / "t.jsonl", data={"on_bad_row": "skip"})
    prepared = prepare(settings, tokenizer)
    assert (prepared.train_rows, prepared.train_skipped) == (2, 1)


HARMLESS = {
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "carriage returns": GOOD.replace(b"\n", b"\r\n"),
    "blank lines": b"\n  \n" + GOOD + b"\n",
    "no newline at the end": GOOD.rstrip(b"\n"),
    "whole surrogate pair": b'{"input": "\\ud83d\\ude00", "output": "b"}\n',
    "escaped NUL": b'{"input": "a\\u0000", "output": "b"}\n',
    "as long as allowed": b'{"input": "a", "output": "b", "x": "' + b"a" * (LONGEST_LINE - 39) + b'"}\n',
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_looks_odd_and_is_a_row(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(HARMLESS[name])
    assert prepare(make_settings(tmp_path, tmp_path / "t.jsonl"), tokenizer).train_rows == 1


READ = """
import resource, sys, time
from nemo_eaft.data.rows import Source
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
rows = list(Source("data.train", sys.argv[1], "train").rows())
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print([row.error for row in rows], grown, time.monotonic() - started)
"""


def test_a_line_of_200_megabytes_takes_neither_its_memory_nor_long(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"input": "')
        for _ in range(200):
            file.write(b"a" * 1_000_000)
        file.write(b'", "output": "b"}\n' + GOOD)
    read = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    errors, rest = read.stdout.rsplit("]", 1)
    grown, seconds = map(float, rest.split())
    assert errors == "[None, 'longer than 16 MiB', None"
    # Kibibytes: the longest line that is taken, and what joins it together.
    assert grown < 3 * (LONGEST_LINE >> 10)
    assert seconds < 10


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD * 3)
    rows = Source.rows

    def growing(self: Source) -> Any:
        for row in rows(self):
            with path.open("ab") as file:
                file.write(GOOD)
            yield row
            if path.stat().st_size > 1000:
                return

    monkeypatch.setattr(Source, "rows", growing)
    with pytest.raises(ValueError, match=r"data\.train=.*t\.jsonl changed while it was read"):
        prepare(make_settings(tmp_path, path), tokenizer)
    assert not (tmp_path / "run" / "data").exists()


def test_what_is_no_file(tmp_path: Path, tokenizer: Any) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"data\.train=.*fifo\.jsonl: not a regular file"):
        prepare(make_settings(tmp_path, tmp_path / "fifo.jsonl"), tokenizer)
    assert time.monotonic() - started < 5


def test_a_file_that_may_not_be_read(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD)
    opened = open

    def refusing(file: Any, *args: Any, **kwargs: Any) -> Any:
        # Permissions do not hold for root.
        if Path(file) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(ValueError, match=r"data\.train=.*t\.jsonl: cannot be read: Permission denied"):
        prepare(make_settings(tmp_path, path), tokenizer)
