"""Tokenizers and templates for the data tests, with no download.

The templates are short ones written for these tests with the markers and the peculiarities of the originals:
what each puts before an answer, after it, and into earlier turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nemo_eaft.settings import Settings
from nemo_eaft.settings_mapping import from_mapping

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]

_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"

SMOLLM2 = _DEFAULT_SYSTEM + "{% for m in messages %}" + _TURN + "{% endfor %}" + _GENERATE

# Tools go into the system turn; a turn of the assistant may be calls instead of text.
QWEN25 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}"
    "{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% else %}" + _DEFAULT_SYSTEM + "{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% for c in m.tool_calls %}{{ '\n<tool_call>\n' + (c | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}" + _GENERATE
)

# Reasoning is shown in the answers after the last question only, where its block is always written, empty or
# not. Calls follow the text of their turn.
_QWEN3_TURNS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set text = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ text }}"
    "{% for c in m.tool_calls or [] %}{% if text or not loop.first %}{{ '\n' }}{% endif %}"
    "{% set f = c.function or c %}"
    "{{ '<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}"
)
QWEN3 = (
    _QWEN3_TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# Always thinks.
QWEN3_THINKING = _QWEN3_TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"

# Turns begin with the token of their role and end with nothing; the prompt of an answer is that token alone. A call is
# a turn with metadata, a result comes from `observation`, and `tool_calls` and the role `tool` are passed over.
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\n# Tools\n' }}{% for t in tools %}{% set f = t.function or t %}"
    "{{ '## ' + f.name + '\n' + (f | tojson) + '\n' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set meta = m.get('metadata', '') %}"
    "{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + meta + '\n' + m.content }}"
    "{% elif m.role == 'observation' %}{{ '<|observation|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GLM4_SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]

# No generation prompt, a space around the answer, and content that is trimmed.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}" + _GENERATE
)

CHATML = {"smollm2": SMOLLM2, "qwen2.5": QWEN25, "qwen3": QWEN3}

CORPUS = [
    "What is two plus two? The answer is four, and the capital of France is Paris.",
    "user assistant system\nCall a function with its arguments as JSON.\n\nThink first, then answer.",
    '{"name": "area", "arguments": {"base": 10, "height": 5}}',
] * 4


def make_tokenizer(template: str | None = SMOLLM2, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer: any text goes through it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = GLM4_SPECIAL if template == GLM4 else SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token="<|endoftext|>" if template == GLM4 else eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages by user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def domain_rows(domain: str, count: int) -> list[dict[str, Any]]:
    """Rows of our own in the columns of the data set that ``conf/data/<domain>.yaml`` names."""
    if domain == "math":
        pairs = [(f"{n} + {n}?", f"It is {2 * n}.") for n in range(1, count + 1)]
        return [{"source": "s", "problem": q, "solution": a, "messages": chat(q, a)} for q, a in pairs]
    if domain == "medical":
        return [
            {"Question": f"Dose {n}?", "Complex_CoT": f"Weigh {n}.", "Response": f"{5 * n} mg."}
            for n in range(1, count + 1)
        ]
    assert domain == "agent"
    return [
        {
            "conversations": [
                {"from": "human", "value": f"Area of {n} by 5?"},
                {"from": "function_call", "value": json.dumps({"name": "area", "arguments": {"base": n, "height": 5}})},
                {"from": "observation", "value": json.dumps({"area": 2.5 * n})},
                {"from": "gpt", "value": f"It is {2.5 * n}."},
            ],
            "tools": json.dumps([AREA]),
        }
        for n in range(1, count + 1)
    ]


AREA = {"name": "area", "description": "Of a triangle.", "parameters": {"type": "object", "properties": {}}}


def make_settings(folder: Path, train: Path | str, validation: Path | str | None = None, **groups: Any) -> Settings:
    """Settings of a small run in ``folder``; ``groups`` are further values, by group."""
    mapping: dict[str, dict[str, Any]] = {
        "model": {"hf": "unused"},
        "data": {"train": str(train), "validation": None if validation is None else str(validation)},
        "trainer": {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 128},
        "run": {"dir": str(folder / "run"), "backend": "cpu"},
    }
    for name, values in groups.items():
        mapping[name] = mapping.get(name, {}) | values
    return from_mapping(mapping)
