"""Preparing the rows of a run: what is refused, what is skipped, what is written, and when it is written
again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.data import prepare, read_prepared
from tests.data.support import chat, make_settings, make_tokenizer, write_jsonl

GOOD = [{"messages": chat(f"Question {n}?", f"Answer {n}.")} for n in range(4)]
PAIRS = [{"input": f"Question {n}?", "output": f"Answer {n}."} for n in range(4)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def written(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "run" / "data").glob("*")) if (run / "run" / "data").exists() else []


def test_chat_rows_become_tokens_with_answers(tmp_path: Path, tokenizer: Any) -> None:
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", GOOD), write_jsonl(tmp_path / "v.jsonl", GOOD))
    prepared = prepare(settings, tokenizer)
    assert (prepared.kind, prepared.train_rows, prepared.validation_rows) == ("chat", 4, 4)
    root = tmp_path / "run" / "data"
    lines = [json.loads(line) for line in (root / "training.jsonl").read_text().splitlines()]
    for row, source in zip(lines, GOOD, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(source["messages"])
        [(start, end)] = row["answers"]
        answer = source["messages"][-1]["content"]
        assert tokenizer.decode(row["input_ids"][start:end]) == f"{answer}<|im_end|>"
    assert prepared.train_answer_tokens == sum(end - start for row in lines for start, end in row["answers"])
    assert prepared.longest == max(len(row["input_ids"]) for row in lines)
    assert read_prepared(root) == prepared


def test_pair_rows_keep_their_text(tmp_path: Path, tokenizer: Any) -> None:
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", PAIRS))
    prepared = prepare(settings, tokenizer)
    assert (prepared.kind, prepared.train_rows, prepared.validation_rows) == ("pair", 4, 0)
    lines = (tmp_path / "run" / "data" / "training.jsonl").read_text().splitlines()
    # The number of the line in the source lets an error name the row.
    assert [json.loads(line) for line in lines] == [row | {"line": n} for n, row in enumerate(PAIRS, start=1)]


def bad_file(path: Path, tokenizer: Any) -> Path:
    long = {"messages": chat("word " * 200, "Answer.")}
    rows = [json.dumps(row) for row in GOOD]
    rows[1:1] = ['{"messages": ', json.dumps({"messages": chat("Question?")}), json.dumps(long)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_bad_rows_stop_the_run_with_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    settings = make_settings(tmp_path, bad_file(tmp_path / "t.jsonl", tokenizer))
    with pytest.raises(ValueError, match="3 of 7 rows cannot be used") as error:
        prepare(settings, tokenizer)
    text = str(error.value)
    assert "t.jsonl:2: not JSON" in text
    assert "t.jsonl:3: the last message must be the assistant's answer" in text
    assert "t.jsonl:4: " in text
    assert "trainer.seq_length=128" in text
    assert "data.on_bad_row=skip" in text
    assert written(tmp_path) == []


def test_only_the_first_ten_bad_rows_are_listed(tmp_path: Path, tokenizer: Any) -> None:
    rows = GOOD + [{"messages": chat("Question?")}] * 25
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", rows))
    with pytest.raises(ValueError, match="25 of 29 rows") as error:
        prepare(settings, tokenizer)
    assert str(error.value).count("t.jsonl:") == 10 + 1  # the file's own name once
    assert "and 15 more" in str(error.value)


def test_skip_counts_and_reports(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = make_settings(tmp_path, bad_file(tmp_path / "t.jsonl", tokenizer), data={"on_bad_row": "skip"})
    with caplog.at_level(logging.WARNING):
        prepared = prepare(settings, tokenizer)
    assert (prepared.train_rows, prepared.train_skipped) == (4, 3)
    assert "3 of 7 rows cannot be used" in caplog.text
    assert "t.jsonl:3" in caplog.text


def test_more_than_half_left_out_is_said_with_the_reasons(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    empty: dict[str, Any] = {"messages": chat("a", "")}
    unread: dict[str, Any] = {"messages": [{"role": "user", "content": 5}]}
    for count, loud in ((3, False), (4, True)):
        caplog.clear()
        rows: list[dict[str, Any]] = [*GOOD, *[empty] * count, unread]
        path = write_jsonl(tmp_path / "t.jsonl", rows)
        prepare(make_settings(tmp_path, path, data={"on_bad_row": "skip"}), tokenizer)
        assert ("MORE THAN HALF of data.train=" in caplog.text) == loud
    said = caplog.records[-1].getMessage().splitlines()
    assert "t.jsonl IS LEFT OUT: 5 of 9 rows" in said[0]
    assert said[1:] == [
        "  4 rows: message N (assistant) is empty",
        "  1 rows: message N: '...' must be text, got int",
    ]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_functions_and_a_template_that_writes_none_stop_the_run_at_the_first(
    tmp_path: Path, tokenizer: Any, on_bad_row: str
) -> None:
    rows: list[dict[str, Any]] = [*GOOD, {**GOOD[0], "tools": [{"name": "area"}]}, {"messages": "not reached"}]
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", rows), data={"on_bad_row": on_bad_row})
    with pytest.raises(ValueError, match=r"t\.jsonl:5: the function area: the chat template leaves it out\. The chat"):
        prepare(settings, tokenizer)
    assert written(tmp_path) == []


def test_nothing_left_after_skipping_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": chat("Question?")}] * 2
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", rows), data={"on_bad_row": "skip"})
    with pytest.raises(ValueError, match="2 of 2 rows cannot be used"):
        prepare(settings, tokenizer)
    assert written(tmp_path) == []


def test_length_limit_is_exact(tmp_path: Path, tokenizer: Any) -> None:
    length = len(tokenizer.apply_chat_template(GOOD[0]["messages"]))
    path = write_jsonl(tmp_path / "t.jsonl", GOOD[:1])
    fits = make_settings(tmp_path, path, trainer={"seq_length": length})
    assert prepare(fits, tokenizer).longest == length
    short = make_settings(tmp_path, path, trainer={"seq_length": length - 1})
    with pytest.raises(ValueError, match=rf"{length} tokens, trainer\.seq_length={length - 1}"):
        prepare(short, tokenizer)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "the file is empty"),
        ("\n\n", "there are no rows"),
        (
            '{"question": "a", "answer": "b"}\n',
            "t.jsonl:1 has the keys question, answer; a row needs 'messages'",
        ),
        ("not json\n", "no row can be read, the first is t.jsonl:1: not JSON"),
        ('{"input": "a", "output": ""}\n', "t.jsonl:1: 'output' is empty"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}\n', "t.jsonl:2: no 'output'"),
        ('{"input": "a", "output": 5}\n', "t.jsonl:1: 'output' must be text, got int"),
        # A data set's columns without a value are no form.
        (
            '{"input": "a", "output": "b"}\n{"input": "a", "output": null, "messages": null}\n',
            "t.jsonl:2: 'output' must be",
        ),
        (
            '{"input": "a", "output": "b"}\n{"messages": []}\n',
            "t.jsonl:2: has 'messages', but the first row has 'input' and 'output'",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, tokenizer: Any, content: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    settings = make_settings(tmp_path, tmp_path / "t.jsonl")
    with pytest.raises(ValueError) as error:
        prepare(settings, tokenizer)
    assert message in str(error.value)
    assert "data.train=" in str(error.value)
    assert written(tmp_path) == []


def test_training_and_validation_must_be_of_one_kind(tmp_path: Path, tokenizer: Any) -> None:
    settings = make_settings(
        tmp_path, write_jsonl(tmp_path / "t.jsonl", GOOD), write_jsonl(tmp_path / "v.jsonl", PAIRS)
    )
    with pytest.raises(ValueError, match=r"holds pair rows.*holds chat rows"):
        prepare(settings, tokenizer)


def test_bad_validation_leaves_no_training_file(tmp_path: Path, tokenizer: Any) -> None:
    settings = make_settings(
        tmp_path,
        write_jsonl(tmp_path / "t.jsonl", GOOD),
        write_jsonl(tmp_path / "v.jsonl", [*GOOD, {"messages": chat("Question?")}]),
    )
    with pytest.raises(ValueError, match=r"data.validation=.*v.jsonl: 1 of 5 rows"):
        prepare(settings, tokenizer)
    assert written(tmp_path) == []


def test_fewer_validation_rows_than_a_batch(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    train, validation = write_jsonl(tmp_path / "t.jsonl", GOOD), write_jsonl(tmp_path / "v.jsonl", GOOD[:3])
    batch = {"global_batch_size": 4}
    with pytest.raises(ValueError, match=r"gives 3 rows, fewer than one batch of trainer\.global_batch_size=4"):
        prepare(make_settings(tmp_path, train, validation, trainer=batch), tokenizer)
    prepare(make_settings(tmp_path, train, validation, trainer=batch | {"val_every": 0}), tokenizer)
    with caplog.at_level(logging.WARNING):
        prepare(make_settings(tmp_path, train, validation), tokenizer)
    assert "2 of 3 rows are used" in caplog.text


def test_validation_rows_takes_the_first(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    settings = make_settings(tmp_path, path, path, data={"validation_rows": 2})
    assert prepare(settings, tokenizer).validation_rows == 2
    lines = (tmp_path / "run" / "data" / "validation.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["input_ids"] == tokenizer.apply_chat_template(GOOD[1]["messages"])


def test_train_rows_takes_the_first_that_can_be_used_and_reads_no_further(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD[0], {"messages": []}, *GOOD[1:]])
    with open(path, "a") as file:
        file.write("no JSON\n")
    settings = make_settings(tmp_path, path, data={"train_rows": 3, "on_bad_row": "skip"})
    found = prepare(settings, tokenizer)
    assert (found.train_rows, found.train_skipped) == (3, 1)
    lines = (tmp_path / "run" / "data" / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 3, 4]
    # They are other rows than all of them.
    everything = make_settings(tmp_path, path, data={"on_bad_row": "skip"})
    assert prepare(everything, tokenizer).train_rows == 4


def test_without_validation_its_settings_change_no_row(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    prepare(make_settings(tmp_path, path), tokenizer)
    before = (tmp_path / "run" / "data" / "training.jsonl").stat().st_mtime_ns
    prepare(make_settings(tmp_path, path, trainer={"global_batch_size": 3, "val_batches": 7}), tokenizer)
    assert (tmp_path / "run" / "data" / "training.jsonl").stat().st_mtime_ns == before


def test_rows_of_an_earlier_version_stay_good(tmp_path: Path, tokenizer: Any) -> None:
    """It wrote the settings of a validation also where there are no rows for one."""
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    settings = make_settings(tmp_path, path)
    root = tmp_path / "run" / "data"

    def written_anew(given: Any) -> bool:
        """After the file took the earlier form."""
        content = json.loads((root / "prepared.json").read_text())
        content["identity"]["validation"] = [4, 100, 10]
        (root / "prepared.json").write_text(json.dumps(content))
        (mark := root / "training.jsonl.idx.npy").touch()
        prepare(given, tokenizer)
        return not mark.exists()

    prepare(settings, tokenizer)
    assert not written_anew(settings)
    assert written_anew(make_settings(tmp_path, path, trainer={"seq_length": 100}))
    # With rows for one they say whether these are enough.
    with_rows = make_settings(tmp_path, path, write_jsonl(tmp_path / "v.jsonl", GOOD[:2]), trainer={"val_every": 1})
    prepare(with_rows, tokenizer)
    assert written_anew(with_rows)


def test_second_time_reads_nothing_and_a_changed_source_is_read_again(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    settings = make_settings(tmp_path, path)
    first = prepare(settings, tokenizer)
    root = tmp_path / "run" / "data"
    before = (root / "training.jsonl").stat().st_mtime_ns
    (root / "training.jsonl.idx.npy").write_bytes(b"index of NeMo")
    assert prepare(settings, tokenizer) == first
    assert (root / "training.jsonl").stat().st_mtime_ns == before
    assert (root / "training.jsonl.idx.npy").exists()

    write_jsonl(path, GOOD[:2])
    assert prepare(settings, tokenizer).train_rows == 2
    # NeMo would have taken the old index for one of the new file.
    assert not (root / "training.jsonl.idx.npy").exists()


@pytest.mark.parametrize("change", ["template", "length", "file"])
def test_what_makes_rows_be_written_again(tmp_path: Path, tokenizer: Any, change: str) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    prepare(make_settings(tmp_path, path), tokenizer)
    prepared = tmp_path / "run" / "data" / "prepared.json"
    before = prepared.read_text()
    other = make_tokenizer(tokenizer.chat_template.replace("Be helpful.", "Be brief."))
    if change == "template":
        prepare(make_settings(tmp_path, path), other)
    elif change == "length":
        prepare(make_settings(tmp_path, path, trainer={"seq_length": 100}), tokenizer)
    else:
        (tmp_path / "run" / "data" / "training.jsonl").unlink()
        prepare(make_settings(tmp_path, path), tokenizer)
        assert (tmp_path / "run" / "data" / "training.jsonl").exists()
        return
    assert prepared.read_text() != before


def test_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, write_jsonl(tmp_path / "t.jsonl", GOOD))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepare(settings, tokenizer)


def test_a_part_of_a_file_is_said_to_be_the_whole(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The recipes hold out a part of one data set; with a file in its place nothing would be held out."""
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    parts = {"train_split": "train[2:]", "validation_split": "train[:2]", "subset": "en", "mapping": "messages"}
    settings = make_settings(tmp_path, path, path, data=parts)
    with caplog.at_level(logging.WARNING):
        assert prepare(settings, tokenizer).train_rows == 4
    for said in (
        "data.train_split=train[2:] has no effect",
        "data.validation_split=train[:2]",
        "data.subset=en has no",
    ):
        assert said in caplog.text
    assert "what is measured there was trained on" in caplog.text
    caplog.clear()
    other = write_jsonl(tmp_path / "v.jsonl", GOOD[:2])
    with caplog.at_level(logging.WARNING):
        prepare(make_settings(tmp_path, path, other), tokenizer)
    assert "no effect" not in caplog.text
    assert "trained on" not in caplog.text
