"""Rows of data sets in their own columns become the messages that they stand for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from nemo_eaft.compose import compose
from nemo_eaft.data import RowError, prepare
from nemo_eaft.data.mapping import kind_of, needed_columns, to_chat
from nemo_eaft.settings_data import DataSettings
from nemo_eaft.settings_mapping import from_mapping
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
        ({"mapping": "messages", "prompt_column": "q"}, "data.prompt_column has no effect with data.mapping=messages"),
        ({"mapping": "prompt_response", "messages_column": "m"}, "it is read with auto or messages or conversations"),
        ({"mapping": "messages", "prompt_template": "{input}{output}"}, "data.prompt_template has no effect"),
    ],
)
def test_a_setting_without_effect_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.warns(UserWarning, match=named):
        data(**values)


@pytest.mark.parametrize("name", ["messages_column", "tools_column", "system_column", "system"])
def test_without_a_mapping_rows_of_messages_read_the_same_settings(name: str) -> None:
    row = {"chat": [*MESSAGES], "functions": [AREA], "instruction": "Be brief."}
    values = {
        "messages_column": "chat",
        "tools_column": "functions",
        "system_column": "instruction",
        "system": "Be brief.",
    }
    chosen = {"messages_column": "chat", name: values[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = data(**chosen)
    assert kind_of(settings, row) == "chat"
    found = to_chat(settings, row)
    assert found == to_chat(data(mapping="messages", **chosen), row)
    assert (found["tools"] == [WRAPPED]) == (name == "tools_column")
    assert (found["messages"] == MESSAGES) == (not name.startswith("system"))


def test_what_the_rows_themselves_do_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"input": "a", "output": "b"}])
    prepare(make_settings(tmp_path, pairs, data={"system": "Be brief."}), make_tokenizer())
    assert "data.system has no effect: the rows of data.train have 'input' and 'output'" in caplog.text
    caplog.clear()
    turns = write_jsonl(tmp_path / "turns.jsonl", [{"chat": user_and_assistant("a", "b")}])
    given = {"messages_column": "chat", "system": "Be brief.", "prompt_template": "{input}: {output}"}
    prepare(make_settings(tmp_path, turns, data=given), make_tokenizer())
    assert [record.getMessage() for record in caplog.records] == [
        "data.prompt_template has no effect: the rows of data.train have 'chat'"
    ]


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


def put(rows: list[dict[str, Any]], folder: Path, place: str) -> Path:
    import datasets

    if place == "jsonl":
        return write_jsonl(folder / "rows.jsonl", rows)
    path = folder / "rows"
    if place == "save_to_disk":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    else:
        path.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(str(path / "train.parquet"))
    return path


FUNCTION = '{"type": "function", "function": {"name": '


def with_parameters(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("place", ["jsonl", "save_to_disk", "parquet"])
def test_functions_that_are_structs_keep_their_own_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A struct column has the keys of all rows, those of other rows as nulls."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    number, text = {"type": "number"}, {"type": "string", "enum": ["a", "b"]}
    tools = [
        [with_parameters("area", {"base": number, "height": number}, required=["base"])],
        [with_parameters("mayor", {"city": text}), with_parameters("now", {})],
        None,
    ]
    rows = [{"messages": user_and_assistant("Which?", "None."), "tools": functions} for functions in tools]
    tokenizer = make_tokenizer(support.QWEN3)
    settings = make_settings(tmp_path, put(rows, tmp_path, place), trainer={"seq_length": 512})
    assert prepare(settings, tokenizer).train_rows == 3
    shown = []
    for line in (tmp_path / "run" / "data" / "training.jsonl").read_text().splitlines():
        lines = tokenizer.decode(json.loads(line)["input_ids"]).splitlines()
        shown.append([json.loads(line) for line in lines if line.startswith(FUNCTION)] or None)
    assert shown == tools


def test_nulls_in_lists_stay() -> None:
    function = with_parameters("area", {"unit": {"enum": ["cm", None], "default": None}})
    [found] = to_chat(data(), {"messages": MESSAGES, "tools": [function]})["tools"]
    assert found["function"]["parameters"]["properties"] == {"unit": {"enum": ["cm", None]}}


@pytest.mark.parametrize("place", ["jsonl", "save_to_disk", "parquet"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_from_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str, place: str
) -> None:
    """What is trained on is the same text, wherever the rows lie."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, (mapping, expected) = domain_rows(domain, 2), DOMAINS[domain]
    path = put(rows, tmp_path, place)
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
