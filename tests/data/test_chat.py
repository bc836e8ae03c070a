"""The tokens in the loss are the assistant's and no others: shown by decoding them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_eaft.data import RowError, Tokens, tokenize_chat
from nemo_eaft.data.chat import FunctionsError, check_template
from tests.data import support
from tests.data.support import CHATML, chat, make_tokenizer


def answers(tokenizer: Any, tokens: Tokens) -> list[str]:
    """The text of each range in the loss."""
    return [tokenizer.decode(tokens.input_ids[start:end]) for start, end in tokens.answers]


def assert_same_ids(tokenizer: Any, tokens: Tokens, messages: list[dict[str, Any]], **options: Any) -> None:
    assert tokens.input_ids == tokenizer.apply_chat_template(messages, **options)
    assert sum(tokens.loss_mask) == sum(end - start for start, end in tokens.answers)


@pytest.mark.parametrize("name", CHATML)
def test_single_turn_trains_the_answer_and_its_end_token_only(name: str) -> None:
    tokenizer = make_tokenizer(CHATML[name])
    messages = chat("What is two plus two?", "The answer is four.", system="Be brief.")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == ["The answer is four.<|im_end|>"]
    assert_same_ids(tokenizer, tokens, messages)
    # The newline after the end token is the template's, and stays out.
    assert tokens.answers[0][1] < len(tokens.input_ids)


@pytest.mark.parametrize("name", CHATML)
def test_every_turn_of_the_assistant_is_trained(name: str) -> None:
    tokenizer = make_tokenizer(CHATML[name])
    messages = chat("Two plus two?", "Four.", "And the capital of France?", "Paris.", "Thanks", "Bye")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == ["Four.<|im_end|>", "Paris.<|im_end|>", "Bye<|im_end|>"]
    assert_same_ids(tokenizer, tokens, messages)


def test_answer_text_that_also_stands_in_the_prompt() -> None:
    tokenizer = make_tokenizer()
    messages = chat("Say: Paris", "Paris", "Paris", "Paris")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == ["Paris<|im_end|>", "Paris<|im_end|>"]
    text = tokenizer.decode(tokens.input_ids)
    first = tokenizer.decode(tokens.input_ids[: tokens.answers[0][0]])
    assert first.endswith("<|im_start|>assistant\n")
    assert text.startswith(first + "Paris<|im_end|>")


def test_qwen3_empty_think_block_is_prompt_and_given_reasoning_is_answer() -> None:
    tokenizer = make_tokenizer(support.QWEN3)
    bare = chat("Two plus two?", "Four.")
    tokens = tokenize_chat(tokenizer, {"messages": bare})
    assert "<think>\n\n</think>\n\n" in tokenizer.decode(tokens.input_ids)
    assert answers(tokenizer, tokens) == ["Four.<|im_end|>"]

    reasoned = chat("Two plus two?", "<think>\nCount.\n</think>\n\nFour.")
    tokens = tokenize_chat(tokenizer, {"messages": reasoned})
    assert answers(tokenizer, tokens) == ["<think>\nCount.\n</think>\n\nFour.<|im_end|>"]
    assert_same_ids(tokenizer, tokens, reasoned)


def test_qwen3_reasoning_of_earlier_turns_is_dropped_and_does_not_confuse() -> None:
    tokenizer = make_tokenizer(support.QWEN3)
    messages = chat("Two plus two?", "<think>\nCount.\n</think>\n\nFour.", "And three?", "Six.")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert "Count." not in tokenizer.decode(tokens.input_ids)
    assert answers(tokenizer, tokens) == ["Four.<|im_end|>", "Six.<|im_end|>"]
    assert_same_ids(tokenizer, tokens, messages)


def test_tools_and_tool_calls() -> None:
    tokenizer = make_tokenizer(support.QWEN25)
    tools = [{"name": "area", "parameters": {}}]
    call = {"name": "area", "arguments": {"base": 10}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Area?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "25"},
        {"role": "assistant", "content": "It is 25.", "tool_calls": None},
    ]
    tokens = tokenize_chat(tokenizer, {"messages": messages, "tools": tools})
    called, said = answers(tokenizer, tokens)
    assert called.strip().startswith("<tool_call>")
    assert called.endswith("</tool_call><|im_end|>")
    assert said == "It is 25.<|im_end|>"
    assert "# Tools" in tokenizer.decode(tokens.input_ids)


CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Area?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "area", "arguments": {"base": 10}}}]},
    {"role": "tool", "content": "25"},
    {"role": "assistant", "content": "It is 25."},
]
CALL = '<tool_call>\n{"name": "area", "arguments": {"base": 10}}\n</tool_call><|im_end|>'


def test_qwen3_opens_a_call_otherwise_when_it_is_last() -> None:
    """In the whole conversation no <think> block stands before the call; in the conversation up to it, one does."""
    tokenizer = make_tokenizer(support.QWEN3)
    tokens = tokenize_chat(tokenizer, {"messages": CALLING, "tools": [{"name": "area"}]})
    assert answers(tokenizer, tokens) == [CALL, "It is 25.<|im_end|>"]
    assert_same_ids(tokenizer, tokens, CALLING, tools=[{"name": "area"}])
    alone = tokenize_chat(tokenizer, {"messages": CALLING[:2]})
    assert answers(tokenizer, alone) == [CALL]
    assert "<think>\n\n</think>" in tokenizer.decode(alone.input_ids[: alone.answers[0][0]])


def test_a_template_that_always_thinks() -> None:
    """Its prompt opens a block that only the last answer continues."""
    tokenizer = make_tokenizer(support.QWEN3_THINKING)
    messages = chat("Two?", "<think>\nCount.\n</think>\n\nTwo.", "Three?", "<think>\nAgain.\n</think>\n\nThree.")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == ["Two.<|im_end|>", "Again.\n</think>\n\nThree.<|im_end|>"]
    tokens = tokenize_chat(tokenizer, {"messages": CALLING})
    assert answers(tokenizer, tokens) == [CALL, "\n</think>\n\nIt is 25.<|im_end|>"]


def test_a_turn_that_ends_where_the_next_role_begins() -> None:
    """As in GLM-4: the model stops by producing the token of the role that speaks next."""
    template = (
        "{% for m in messages %}{{ ('<s>' if m.role == 'user' else '</s>') + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '</s>' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    messages = chat("Two?", "Four.", "Three?", "Six.")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == ["\nFour.<s>", "\nSix.<|endoftext|>"]


GLM4_CALL = 'area\n{"base": 10}<|observation|>'


def test_glm4_writes_a_call_as_metadata_and_its_result_as_observation() -> None:
    tokenizer = make_tokenizer(support.GLM4)
    tokens = tokenize_chat(tokenizer, {"messages": CALLING, "tools": [{"name": "area"}]})
    assert answers(tokenizer, tokens) == [GLM4_CALL, "\nIt is 25.<|endoftext|>"]
    assert tokenizer.decode(tokens.input_ids) == (
        '[gMASK]<sop><|system|>\n# Tools\n## area\n{"name": "area"}\n<|user|>\nArea?'
        '<|assistant|>area\n{"base": 10}<|observation|>\n25<|assistant|>\nIt is 25.<|endoftext|>'
    )


def test_glm4_hands_over_after_its_last_call_and_begins_each_call_anew() -> None:
    tokenizer = make_tokenizer(support.GLM4)
    calls = [{"function": {"name": name, "arguments": {"city": "Zürich"}}} for name in ("area", "mayor")]
    messages = [CALLING[0], {"role": "assistant", "content": "Let me see.", "tool_calls": calls}]
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == [
        "\nLet me see.<|assistant|>",
        'area\n{"city": "Zürich"}<|assistant|>',
        'mayor\n{"city": "Zürich"}<|observation|>',
    ]


@pytest.mark.parametrize(
    "name, messages, tools, named",
    [
        ("LLAMA2", chat("a", "b", system="Be brief."), None, r"message 1 \(system\)"),
        ("GLM4", [*CALLING[:1], {"role": "critic", "content": "x"}, *CALLING[3:]], None, r"message 2 \(critic\)"),
        ("QWEN25", [CALLING[0], CALLING[1] | {"content": "Let me see."}], None, r"message 2 \(assistant\)"),
    ],
)
def test_what_the_template_leaves_out_is_a_bad_row(
    name: str, messages: list[dict[str, Any]], tools: Any, named: str
) -> None:
    with pytest.raises(RowError, match=f"^{named}: the chat template leaves it out"):
        tokenize_chat(make_tokenizer(getattr(support, name)), {"messages": messages, "tools": tools})


@pytest.mark.parametrize(
    "messages, tools, named",
    [
        (CALLING, None, r"message 2 \(assistant\): the call of area"),
        (chat("a", "b"), [{"name": "area"}], "the function area"),
    ],
)
def test_a_template_that_writes_no_functions(messages: list[dict[str, Any]], tools: Any, named: str) -> None:
    """SmolLM2's would give an empty answer for the call, and not show the function."""
    with pytest.raises(FunctionsError, match=f"^{named}: the chat template leaves it out"):
        tokenize_chat(make_tokenizer(support.SMOLLM2), {"messages": messages, "tools": tools})


def test_one_call_of_two_left_out_is_the_rows_fault_and_not_the_templates() -> None:
    template = support.QWEN25.replace("for c in m.tool_calls", "for c in m.tool_calls[:1]")
    twice = CALLING[1] | {"tool_calls": CALLING[1]["tool_calls"] * 2}
    with pytest.raises(RowError, match="the call of area: the chat template leaves it out"):
        tokenize_chat(make_tokenizer(template), {"messages": [CALLING[0], twice, *CALLING[2:]]})
    assert tokenize_chat(make_tokenizer(template), {"messages": CALLING}).answers


def test_template_without_generation_prompt_that_trims() -> None:
    tokenizer = make_tokenizer(support.LLAMA2, eos="</s>")
    messages = chat(" Two plus two? ", "  Four.  ", "Three?", "Six.")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert [text.strip() for text in answers(tokenizer, tokens)] == ["Four. </s>", "Six. </s>"]
    assert_same_ids(tokenizer, tokens, messages)


def test_template_without_end_token_gets_the_end_of_sequence_token() -> None:
    tokenizer = make_tokenizer(support.PLAIN)
    tokens = tokenize_chat(tokenizer, {"messages": chat("Two?", "Four.")})
    assert answers(tokenizer, tokens) == [" Four.<|im_end|>"] or answers(tokenizer, tokens) == ["Four.<|im_end|>"]
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokens.input_ids.count(tokenizer.eos_token_id) == 1


def test_marks_of_the_template_are_kept() -> None:
    tokenizer = make_tokenizer(support.MARKED)
    messages = chat("Two?", "Four.", "Three?", "Six.")
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == ["Four.<|im_end|>", "Six.<|im_end|>"]
    assert_same_ids(tokenizer, tokens, messages)


words = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), min_size=1, max_size=40).map(str.strip)
contents = words.filter(bool)


@pytest.mark.parametrize("name", CHATML)
@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), system=contents | st.none())
def test_any_text(name: str, turns: list[tuple[str, str]], system: str | None) -> None:
    tokenizer = _cached(name)
    messages = chat(*[text for turn in turns for text in turn], system=system)
    tokens = tokenize_chat(tokenizer, {"messages": messages})
    assert answers(tokenizer, tokens) == [answer + "<|im_end|>" for _, answer in turns]
    assert_same_ids(tokenizer, tokens, messages)


_tokenizers: dict[str, Any] = {}


def _cached(name: str) -> Any:
    if name not in _tokenizers:
        _tokenizers[name] = make_tokenizer(CHATML[name])
    return _tokenizers[name]


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "'messages' must be a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        ({"messages": [{"content": "x"}]}, "'role'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1: 'content' must be text, got list"),
        ({"messages": chat("Two?")}, "the last message must be the assistant's answer, got role 'user'"),
        ({"messages": chat("Two?", "")}, r"message 2 \(assistant\) is empty"),
        ({"messages": chat("Two?", " \n")}, r"message 2 \(assistant\) is empty"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
            "is empty",
        ),
    ],
)
def test_bad_rows_say_why(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        tokenize_chat(make_tokenizer(), values)


def test_a_template_that_refuses_the_row_is_a_bad_row() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="roles must alternate"):
        tokenize_chat(tokenizer, {"messages": chat("a", "b")})


def test_a_template_that_rewrites_the_prompt_is_refused_not_guessed() -> None:
    template = (
        "{% for m in messages %}{{ (messages | length) ~ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    with pytest.raises(RowError, match="cannot tell prompt from answer"):
        tokenize_chat(make_tokenizer(template), {"messages": chat("a", "b")})


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        check_template(make_tokenizer(template=None))
