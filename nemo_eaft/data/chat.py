"""Which tokens of a rendered conversation are the assistant's.

NeMo 2.7.3 (``_chat_preprocess`` in ``llm/gpt/data/utils.py``) knows the answer tokens only where the chat
template marks them with ``{% generation %}``. The templates of SmolLM2, Qwen2.5 and Qwen3 do not, and then it
trains on the whole conversation, prompts included, and appends a second end token. So the answer is located
here, with the template alone:

* an answer starts where the prompt ends that the template gives for the messages before it;
* it ends after the end-of-turn token, which the model must learn to produce, but before what follows it (a
newline).

The token ids are those of ``apply_chat_template``, always. A row of which it would leave something out is a bad row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nemo_eaft.data import glm4_calls
from nemo_eaft.data.kept import check_kept, has_functions, writes_functions
from nemo_eaft.data.rows import RowError
from nemo_eaft.data.tokens import Tokens

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_THOUGHTS = re.compile(r"\A(<think>)?\s*</think>\s*")
_SENTINEL = "\u2603end-of-answer\u2603"


class FunctionsError(ValueError):
    """The chat template writes no functions, so no row in which they play a part can be used."""


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot be used for chat rows.

    Raises:
        ValueError: naming what is missing.
    """
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} is a slow one: chat rows need a fast one (tokenizer.json)")
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            f"the tokenizer of {name} has no chat template: use one of an instruct model (model.tokenizer), "
            f"or input/output rows"
        )


def tokenize_chat(tokenizer: Any, values: dict[str, Any]) -> Tokens:
    """Tokenize a row with ``messages`` and, if it has them, ``tools``.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        values: the row; ``messages`` is a list of ``{"role", "content"}``, the last by the assistant.

    Returns:
        The ids of ``tokenizer.apply_chat_template``, and every assistant turn as an answer. GLM-4-0414's template is
        given calls in the form that it takes (:mod:`nemo_eaft.data.glm4_calls`). What the template puts before an
        answer by itself (Qwen3's empty ``<think>`` block) is prompt, reasoning the row gives is answer. A template that
        ends turns with no end token gets the end-of-sequence token appended, as in NeMo.

    Raises:
        RowError: the row is malformed, has no answer, or the template refuses it or leaves something out.
        FunctionsError: that, because the template writes no functions at all.
    """
    messages, tools = _checked(values.get("messages")), values.get("tools") or None

    def text_of(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        return _Conversation(tokenizer, messages, tools).text

    try:
        check_kept(text_of, messages, tools)
    except RowError as error:
        if has_functions(messages, tools) and not writes_functions(text_of):
            raise FunctionsError(str(error)) from error
        raise
    chat = _Conversation(tokenizer, messages, tools)
    messages = chat.messages
    encoded = tokenizer(
        chat.text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    input_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    if _MARKED.search(tokenizer.chat_template):
        return Tokens(input_ids, _ranges(chat.marked_mask()))
    ends = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    answers = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        first_char, last_char, closed = chat.span(turn)
        # A token that holds both prompt and answer characters is left out: the model never has to produce it
        # alone.
        start = next((i for i, (begin, _) in enumerate(offsets) if begin >= first_char), len(offsets))
        end = next((i for i, (begin, _) in enumerate(offsets) if begin >= last_char), len(offsets))
        if start >= end:
            raise RowError(f"message {turn + 1}: the answer has no token of its own")
        stop = end
        while stop < len(offsets) and not chat.text[slice(*offsets[stop])].strip():
            stop += 1
        if closed:
            pass
        elif stop < len(offsets) and input_ids[stop] in ends:
            end = stop + 1
        elif turn == len(messages) - 1:
            # After a call GLM-4 hands over to whoever gives the result.
            last = tokenizer.convert_tokens_to_ids(glm4_calls.END_OF_CALL) if chat.ends_with_call else None
            input_ids = [*input_ids[:end], tokenizer.eos_token_id if last is None else last]
            end += 1
        answers.append((start, end))
    return Tokens(input_ids, answers)


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError("'messages' must be a list of at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"message {number} must be an object with 'role' and 'content'")
        content, calls = message.get("content"), message.get("tool_calls")
        if content is not None and not isinstance(content, str):
            raise RowError(f"message {number}: 'content' must be text, got {type(content).__name__}")
        if not (content or "").strip() and not calls and message["role"] != "system":
            raise RowError(f"message {number} ({message['role']}) is empty")
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last message must be the assistant's answer, got role {messages[-1]['role']!r}")
    # Files read by `datasets` give every message every key, null where it has none; templates take null for
    # a value.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


class _Conversation:
    """One conversation rendered by a template, and the places of its answers in the text."""

    def __init__(self, tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> None:
        metadata = glm4_calls.takes_metadata(tokenizer.chat_template)
        self.tokenizer, self.tools = tokenizer, tools
        self.messages = glm4_calls.to_metadata(messages) if metadata else messages
        self.ends_with_call = metadata and bool(self.messages[-1].get("metadata"))
        self.text = self._render(self.messages)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        import jinja2

        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=self.tools, tokenize=False, **options))
        except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def span(self, turn: int) -> tuple[int, int, bool]:
        """First character of the answer of one turn, the one after it, and whether the end token is
        within."""
        start = self._start(turn)
        end, closed = self._end(turn)
        if end <= start:
            raise RowError(f"message {turn + 1}: the chat template leaves nothing of the answer")
        return start, end, closed

    def _start(self, turn: int) -> int:
        # The template itself may open an answer (Qwen3: an empty <think> block when not asked to think). The
        # model is given that at inference, so the longest prompt that the text starts with is the right one.
        choices: list[dict[str, Any]] = [{}]
        if "enable_thinking" in self.tokenizer.chat_template:
            choices = [{"enable_thinking": False}, {"enable_thinking": True}]
        prompts = [self._render(self.messages[:turn], add_generation_prompt=True, **choice) for choice in choices]
        # One that always opens a block of thought for the model (Qwen3's -Thinking) leaves it out of earlier turns.
        prompts += [prompt.removesuffix("<think>\n") for prompt in prompts]
        fitting = [len(prompt) for prompt in prompts if self.text.startswith(prompt)]
        if not fitting:
            raise RowError(
                f"message {turn + 1}: cannot tell prompt from answer, the chat template writes the prompt "
                f"differently once the answer is there"
            )
        return max(fitting)

    def _end(self, turn: int) -> tuple[int, bool]:
        message = self.messages[turn]
        if not message.get("tool_calls"):
            # Lengthen the answer: where the new text appears, the old one ended. Unlike "the conversation up
            # to this turn", this also holds for templates that drop the reasoning of earlier turns (Qwen3).
            for content in (message["content"], message["content"].rstrip()):
                longer = [*self.messages]
                longer[turn] = {**message, "content": content + _SENTINEL}
                before, found, after = self._render(longer).partition(_SENTINEL)
                if found and before + after == self.text:
                    return len(before), False
        # As if it were the last turn. A template may then open it with a block of no thoughts (Qwen3), which it leaves
        # out where more follows.
        alone = _Conversation(self.tokenizer, self.messages[: turn + 1], self.tools)
        answer, start = alone.text[alone._start(turn) :].rstrip(), self._start(turn)
        for written in (answer, _NO_THOUGHTS.sub("", answer)):
            if self.text.startswith(written, start):
                return start + len(written), True
        raise RowError(f"message {turn + 1}: cannot tell where the answer ends in the text of the chat template")

    def marked_mask(self) -> list[int]:
        """The template's own marks, as NeMo reads them."""
        encoded = self.tokenizer.apply_chat_template(
            self.messages, tools=self.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = list(encoded["assistant_masks"])
        if 1 not in mask:
            raise RowError("the chat template marks no token as the assistant's")
        return mask


def _ranges(mask: list[int]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(mask) + 1) if (mask[i] if i < len(mask) else 0) != (mask[i - 1] if i else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))
