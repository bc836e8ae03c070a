"""Rows of data sets in their own columns become the messages that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.compose import compose, from_mapping
from nemo_eaft.data import RowError, prepare
from nemo_eaft.data.mapping import kind_of, needed_columns, to_chat
from nemo_eaft.settings_data import DataSettings
from tests.data import support
from tests.data.support import AREA, domain_rows, make_settings, make_tokenizer, write_jsonl

WRAPPED = {"type": "function", "function": AREA}
CALL = {"name": "area", "arguments": {"base": 10, "height": 5}}
CALLED = [{"type": "function", "function": CALL}]
SHAREGPT = [
    {"from": "human", "value": "Area?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": '{"area": 25}'},
    {"from": "gpt", "value": "It is 25."},
]
MESSAGES = [
    {"role": "user", "content": "Area?"},
    {"role": "assistant", "content": "", "tool_calls": CALLED},
    {"role": "tool", "content": '{"area": 25}'},
    {"role": "assistant", "content": "It is 25."},
]


def data(**values: Any) -> DataSettings:
    return DataSettings(train="t.jsonl", **values)


def user_and_assistant(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_column_for_each_part() -> None:
    settings = data(mapping="prompt_response", prompt_column="Question", response_column="Response")
    row = {"Question": "Why?", "Complex_CoT": "Hm.\n", "Response": "Because.", "tools": ""}
    assert to_chat(settings, row) == {"messages": user_and_assistant("Why?", "Because."), "tools": None}
    thinking = data(
        mapping="prompt_response",
        prompt_column="Question",
        response_column="Response",
        reasoning_column="Complex_CoT",
        system="Be brief.",
    )
    system = {"role": "system", "content": "Be brief."}
    answer = "<think>\nHm.\n</think>\n\nBecause."
    assert to_chat(thinking, row)["messages"] == [system, *user_and_assistant("Why?", answer)]
    assert to_chat(thinking, row | {"Complex_CoT": None})["messages"][2]["content"] == "Because."


def test_sharegpt_turns() -> None:
    settings = data(mapping="conversations")
    assert to_chat(settings, {"conversations": SHAREGPT, "tools": json.dumps([AREA])}) == {
        "messages": MESSAGES,
        "tools": [WRAPPED],
    }
    # The whole column as JSON text; two calls at once; the other names of the speakers.
    turns = [
        {"from": "user", "value": "Both?"},
        {"from": "function_call", "value": json.dumps([CALL, CALL])},
        {"from": "tool", "value": "25"},
        {"from": "assistant", "value": "Done."},
    ]
    row = to_chat(data(mapping="conversations", messages_column="dialogue"), {"dialogue": json.dumps(turns)})
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"] == CALLED * 2
    assert row["tools"] is None


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "area", "arguments": json.dumps(CALL["arguments"])},
        {"type": "function", "function": CALL},
        {"function": {"name": "area", "arguments": json.dumps(CALL["arguments"])}},
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_calls_have_one_form(call: dict[str, Any], as_text: bool) -> None:
    calls = json.dumps([call]) if as_text else [call]
    messages = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    assert to_chat(data(mapping="messages"), {"messages": messages})["messages"][1]["tool_calls"] == CALLED
    # Without a mapping as well: a template would write text as text, quoted once more.
    assert to_chat(data(), {"messages": messages})["messages"][1]["tool_calls"] == CALLED


def test_an_identifier_of_a_call_is_kept() -> None:
    messages = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": CALL}]}]
    [call] = to_chat(data(mapping="messages"), {"messages": messages})["messages"][1]["tool_calls"]
    assert call == {"id": "c1", "type": "function", "function": CALL}


@pytest.mark.parametrize("value", [[AREA], [WRAPPED], json.dumps([AREA]), json.dumps([WRAPPED]), [json.dumps(AREA)]])
def test_functions_have_one_form(value: Any) -> None:
    row = to_chat(data(mapping="messages", tools_column="functions"), {"messages": MESSAGES, "functions": value})
    assert row["tools"] == [WRAPPED]


def test_whose_system_message_comes_first() -> None:
    own = [{"role": "system", "content": "own"}, *user_and_assistant("a", "b")]
    row = {"messages": own, "instruction": "column"}
    first = data(mapping="messages", system="setting", system_column="instruction")
    assert to_chat(first, row)["messages"] == own
    assert to_chat(first, row | {"messages": own[1:]})["messages"][0]["content"] == "column"
    assert to_chat(first, {"messages": own[1:], "instruction": None})["messages"][0]["content"] == "setting"


@pytest.mark.parametrize(
    "settings, row, named",
    [
        (
            {"mapping": "prompt_response"},
            {"prompt": "a", "answer": "b"},
            r"no column 'response' \(data.resp",
        ),
        ({"mapping": "prompt_response"}, {"prompt": "a", "response": 5}, "'response' must be text, got int"),
        ({"mapping": "prompt_response"}, {"prompt": " ", "response": "b"}, "'prompt' is empty"),
        ({"mapping": "prompt_response"}, {"prompt": "a", "response": None}, "'response' is empty"),
        ({"mapping": "prompt_response", "reasoning_column": "r"}, {"prompt": "a", "response": "b"}, "no column 'r'"),
        ({"mapping": "conversations"}, {"messages": []}, r"no column 'conversations' \(data.messages_column"),
        ({"mapping": "conversations"}, {"conversations": []}, "at least one turn"),
        ({"mapping": "conversations"}, {"conversations": "hello"}, "'conversations' is text, but not JSON"),
        ({"mapping": "conversations"}, {"conversations": MESSAGES}, "data.mapping=messages reads 'role' and 'content'"),
        ({"mapping": "conversations"}, {"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narr"),
        ({"mapping": "conversations"}, {"conversations": [{"from": "gpt", "value": None}]}, "turn 1: 'value' must be"),
        ({"mapping": "conversations"}, {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "not JSON"),
        ({"mapping": "conversations"}, {"conversations": SHAREGPT, "tools": "area"}, "'tools' is text, but not JSON"),
        ({"mapping": "conversations"}, {"conversations": SHAREGPT, "tools": [{"x": 1}]}, "function 1 must be an obj"),
        ({"mapping": "messages"}, {"messages": [{"role": "assistant", "tool_calls": [{"f": 1}]}]}, "message 1: a call"),
        (
            {"mapping": "messages"},
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "the arguments of f must be an object",
        ),
    ],
)
def test_a_bad_row_says_which_part(settings: dict[str, Any], row: dict[str, Any], named: str) -> None:
    with pytest.raises(RowError, match=named):
        to_chat(data(**settings), row)


def test_kinds() -> None:
    pair = {"input": "a", "output": "b"}
    assert kind_of(data(), pair) == "pair"
    assert kind_of(data(), pair | {"messages": MESSAGES}) == "chat"
    assert kind_of(data(), {"prompt": "a"}) is None
    assert kind_of(data(mapping="prompt_response", prompt_column="input", response_column="output"), pair) == "chat"


@pytest.mark.parametrize(
    "values, named",
    [
        ({"prompt_column": "q"}, "data.prompt_column has no effect with data.mapping=auto; it is read with prompt_r"),
        ({"mapping": "messages", "reasoning_column": "r"}, "data.reasoning_column has no effect"),
        ({"system": "s"}, "data.system has no effect with data.mapping=auto"),
        ({"mapping": "prompt_response", "messages_column": "m"}, "it is read with messages or conversations"),
        ({"mapping": "messages", "prompt_template": "{input}{output}"}, "data.prompt_template has no effect"),
    ],
)
def test_a_setting_without_effect_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.warns(UserWarning, match=named):
        data(**values)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"data\.prompt_column is empty"):
        data(mapping="prompt_response", prompt_column=" ")
    groups = {"model": {"hf": "m"}, "data": {"train": "t.jsonl", "mapping": "sharegpt"}, "run": {"dir": "r"}}
    with pytest.raises(ValueError, match="must be one of auto, messages, conversations, prompt_response"):
        from_mapping(groups)
    # A system message may have lines.
    from_mapping(groups | {"data": {"train": "t.jsonl", "mapping": "messages", "system": "One.\nTwo."}})


# How conf/data/ reads the three domains, and the first answers of `domain_rows`.
DOMAINS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "math": ({"mapping": "messages"}, ["It is 2.<|im_end|>"]),
    "medical": (
        {
            "mapping": "prompt_response",
            "prompt_column": "Question",
            "response_column": "Response",
            "reasoning_column": "Complex_CoT",
        },
        ["<think>\nWeigh 1.\n</think>\n\n5 mg.<|im_end|>"],
    ),
    "agent": (
        {"mapping": "conversations"},
        [
            '<tool_call>\n{"name": "area", "arguments": {"base": 1, "height": 5}}\n</tool_call><|im_end|>',
            "It is 2.5.<|im_end|>",
        ],
    ),
}


def test_these_are_the_mappings_of_conf() -> None:
    for domain, (mapping, _) in DOMAINS.items():
        shipped = compose("qwen3-8b", [f"data={domain}"]).data
        assert {name: getattr(shipped, name) for name in mapping} == mapping
        assert set(needed_columns(shipped).values()) <= domain_rows(domain, 1)[0].keys()


@pytest.mark.parametrize("place", ["jsonl", "save_to_disk", "parquet"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_from_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str, place: str
) -> None:
    """What is trained on is the same text, wherever the rows lie."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, (mapping, expected) = domain_rows(domain, 2), DOMAINS[domain]
    path = tmp_path / "rows"
    if place == "jsonl":
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif place == "save_to_disk":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    else:
        path.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(str(path / "train.parquet"))
    tokenizer = make_tokenizer(support.QWEN3)
    settings = make_settings(tmp_path, path, data=mapping, trainer={"seq_length": 512})
    prepared = prepare(settings, tokenizer)
    assert (prepared.kind, prepared.train_rows, prepared.train_skipped) == ("chat", 2, 0)
    row = json.loads((tmp_path / "run" / "data" / "training.jsonl").read_text().splitlines()[0])
    assert [tokenizer.decode(row["input_ids"][start:end]) for start, end in row["answers"]] == expected
    text = tokenizer.decode(row["input_ids"])
    shown = [json.loads(line) for line in text.splitlines() if line.startswith('{"type"')]
    assert shown == ([WRAPPED] if domain == "agent" else [])


def test_columns_that_are_not_there_stop_before_a_row_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", domain_rows("medical", 2))
    settings = make_settings(tmp_path, path, data={"mapping": "prompt_response", "on_bad_row": "skip"})
    with pytest.raises(ValueError) as error:
        prepare(settings, make_tokenizer())
    assert "data.prompt_column=prompt: data.train=" in str(error.value)
    assert "rows.jsonl:1 has the keys Question, Complex_CoT, Response" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_mapping_is_another_preparation(tmp_path: Path) -> None:
    path, mapping = write_jsonl(tmp_path / "rows.jsonl", domain_rows("medical", 2)), DOMAINS["medical"][0]
    tokenizer = make_tokenizer()
    first = prepare(make_settings(tmp_path, path, data=mapping), tokenizer)
    bare = {key: value for key, value in mapping.items() if key != "reasoning_column"}
    second = prepare(make_settings(tmp_path, path, data=bare), tokenizer)
    assert second.train_answer_tokens < first.train_answer_tokens
    prepare(make_settings(tmp_path, path, data=bare | {"system": "Be brief."}), tokenizer)
    row = json.loads((tmp_path / "run" / "data" / "training.jsonl").read_text().splitlines()[0])
    assert "Be brief." in tokenizer.decode(row["input_ids"])
