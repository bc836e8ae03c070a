"""Reading rows: each bad one is named by file and line, and none stops the others."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from nemo_eaft.data.rows import Source


def source(path: Path | str) -> Source:
    return Source("data.train", str(path), "train")


def test_rows_come_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\r\n{"a": 3}')
    assert [(row.where, row.values["a"]) for row in source(path).rows()] == [
        ("rows.jsonl:1", 1),
        ("rows.jsonl:3", 2),
        ("rows.jsonl:4", 3),
    ]


def test_bad_lines_say_why_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1\n\xff\xfe\n[1]\n"text"\n{"a": 5}\n')
    rows = list(source(path).rows())
    assert [row.where for row in rows] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    reasons = [row.error for row in rows]
    assert reasons[0] is not None
    assert reasons[0].startswith("not JSON")
    assert reasons[1] == "not UTF-8 at byte 1 of the line"
    assert reasons[2] == "must be a JSON object, got list"
    assert reasons[3] == "must be a JSON object, got str"
    assert reasons[4] is None


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert next(iter(source(path).rows())).values == {"a": 1}


def test_a_line_separator_of_unicode_does_not_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n', encoding="utf-8")
    assert [row.values for row in source(path).rows()] == [{"a": "x\u2028y"}]


def test_a_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"a": "x" * 10_000}) + "\n"
    path.write_text(line * 2_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in source(path).rows()) == 2_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.jsonl", "data.train=.*missing.jsonl: no such file"),
        ("rows.csv", "must be .jsonl"),
        ("empty.jsonl", "the file is empty"),
    ],
)
def test_nothing_to_read(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=message):
        source(tmp_path / name).check()


def test_missing_absolute_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        source(tmp_path / "nowhere").check()


def test_datasets_folder_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"input": "a", "output": "b"}, {"input": "c", "output": "d"}])
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "saved"))
    rows = list(source(tmp_path / "saved").rows())
    assert rows[1].where.endswith("saved[train]:2")
    assert rows[1].values == {"input": "c", "output": "d"}
    wrong = Source("data.validation", str(tmp_path / "saved"), "validation")
    with pytest.raises(ValueError, match="no split validation; there are train"):
        next(iter(wrong.rows()))


def test_a_part_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written alike for a folder of save_to_disk, a single data set and a folder of files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ten = datasets.Dataset.from_list([{"a": number} for number in range(10)])
    datasets.DatasetDict({"train": ten, "test": ten}).save_to_disk(str(tmp_path / "saved"))
    ten.save_to_disk(str(tmp_path / "single"))
    (tmp_path / "files").mkdir()
    ten.to_parquet(str(tmp_path / "files" / "train.parquet"))
    for name in ("saved", "single", "files"):
        # One that ends after the last row ends with it.
        parts = {"train[7:]": (7, 9, 3), "train[:2]": (0, 1, 2), "train[:50%]": (0, 4, 5), "train[8:90]": (8, 9, 2)}
        for split, (first, last, count) in parts.items():
            rows = list(Source("data.train", str(tmp_path / name), split).rows())
            assert [rows[0].values["a"], rows[-1].values["a"], len(rows)] == [first, last, count], (name, split)
            assert (rows[0].where, rows[0].number) == (f"{tmp_path / name}[{split}]:1", 1)
    for split in ("valid[:3]", "train[1:", "train[:12]x"):
        with pytest.raises(ValueError, match="split"):
            list(Source("data.train", str(tmp_path / "saved"), split).rows())


def test_a_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "two"
    folder.mkdir()
    for language in ("en", "zh"):
        (folder / f"{language}.json").write_text(json.dumps({"a": language}) + "\n")
    configs = [{"config_name": name, "data_files": f"{name}.json"} for name in ("en", "zh")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for language in ("en", "zh"):
        rows = list(Source("data.train", str(folder), "train", language).rows())
        assert [row.values for row in rows] == [{"a": language}]
    with pytest.raises(ValueError, match="Config name is missing"):
        list(source(folder).rows())
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"data\.subset=en means nothing"):
        list(Source("data.train", str(tmp_path / "saved"), "train", "en").rows())


def test_datasets_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    assert [row.values for row in source(folder).rows()] == [{"input": "a", "output": "b"}]


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    before = source(path).identity()
    assert source(path).identity() == before
    path.write_text('{"a": 12}\n')
    assert source(path).identity() != before
