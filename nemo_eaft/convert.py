"""Hugging Face weights to a NeMo checkpoint and back, by NeMo's own connectors; GLM-4-0414's are in `glm4/`.

NeMo 2.7.3 converts the weights; what it gets wrong is corrected here, because it loses what the user had:

* its exporters rebuild the Hugging Face configuration from NeMo's, with fixed token ids, rope settings left out and,
  for Llama, a vocabulary cut to the tokenizer's. An export takes the configuration of the imported model instead;
* its importers leave some of the configuration at defaults: the size of a head, whether embeddings are tied;
* its importers put the tokenizer in a folder of /tmp that all users share, and load it with `trust_remote_code=True`;
* a conversion that dies leaves a folder that looks finished. Here a folder appears under its name when it is complete.

Run in a process of its own (`python -m nemo_eaft.convert`): NeMo sets up one-rank process groups that a later training
run in the same process would inherit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_eaft.atomic import complete_folder
from nemo_eaft.integrity import write_sums
from nemo_eaft.own_process import end_cleanly_with, run_to_its_end
from nemo_eaft.writer import end_writer_with_rank

# Hugging Face `model_type` -> NeMo model: of NeMo 2.7.3, or ours where it has none.
FAMILIES = {
    "glm4": ("nemo_eaft.glm4", "GLM4Model"),
    "llama": ("nemo.collections.llm", "LlamaModel"),
    "mistral": ("nemo.collections.llm", "MistralModel"),
    "qwen2": ("nemo.collections.llm", "Qwen2Model"),
    "qwen3": ("nemo.collections.llm", "Qwen3Model"),
    "qwen3_moe": ("nemo.collections.llm", "Qwen3Model"),
}

HF_FILES = "hf"
"""Folder inside an imported checkpoint with the Hugging Face configuration and tokenizer, without weights."""

MANIFEST = "nemo_eaft.json"
"""File inside an imported checkpoint that says what it was made from; its presence means that it is complete."""


def nemo_model_class(model_type: str) -> type:
    """NeMo's model class for a Hugging Face `model_type`.

    Raises:
        ValueError: this family cannot be converted in both directions.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model.hf: model_type {model_type!r} is not supported; allowed: {', '.join(sorted(FAMILIES))}"
        )
    module, name = FAMILIES[model_type]
    model_class: type = getattr(importlib.import_module(module), name)
    return model_class


def hf_folder(name: str) -> Path:
    """The local folder of a Hugging Face model: `name` itself, or its snapshot in the cache (downloaded if needed).

    Raises:
        ValueError: `name` is neither a folder with a config.json nor a model that can be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.hf: {name} has no config.json; expected a folder written by save_pretrained")
        _refuse_pickles(folder)
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:  # one message for: no network, no such name, no permission
        raise ValueError(f"model.hf: {name!r} is no local folder and could not be downloaded ({error})") from error


def _refuse_pickles(folder: Path) -> None:
    """A pickle runs code when it is loaded; `transformers` would take it where there are no safetensors."""
    pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(ending))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.hf: {folder} holds its weights as pickles only ({', '.join(pickles[:3])}), which can run code; "
            "allowed: safetensors (load it where you trust it and save_pretrained(..., safe_serialization=True))"
        )


def save_hf_files(source: Path, tokenizer: str | None, target: Path, trust_remote_code: bool) -> None:
    """Write the configuration, generation configuration and tokenizer of `source` to `target`, without weights."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).save_pretrained(target)
    try:
        AutoTokenizer.from_pretrained(tokenizer or source, trust_remote_code=trust_remote_code).save_pretrained(target)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.tokenizer: {tokenizer or source} holds no tokenizer ({error})") from error
    # NeMo's importers read it unconditionally; a model without one gets the empty default.
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(target)
    else:
        GenerationConfig().save_pretrained(target)


def _nemo_fields(hf_config: Any) -> dict[str, Any]:
    """Fields of NeMo's configuration that its importers leave at a default of their own (2.7.3).

    Qwen3's takes 128 for the size of a head; Qwen2's and Mistral's untie the embedding from the output layer, which a
    model trained that way loses on its way back; Mistral's takes the vocabulary size from the tokenizer, and a sliding
    window of w tokens for w tokens before the own one; that of Qwen3's mixtures of experts has 128 experts, of which 8
    are chosen.

    Raises:
        ValueError: layers without experts among those with them, which NeMo's Qwen3 has not.
    """
    fields = {
        "vocab_size": hf_config.vocab_size,
        "share_embeddings_and_output_weights": hf_config.tie_word_embeddings,
    }
    head_dim = getattr(hf_config, "head_dim", None)
    if head_dim is not None:
        fields["kv_channels"] = head_dim
    if hf_config.model_type == "mistral" and hf_config.sliding_window:
        # Both of Megatron's attentions, Transformer Engine's and the local one, count without the token itself.
        fields["window_size"] = [hf_config.sliding_window - 1, 0]
    if hf_config.model_type == "qwen3_moe":
        if hf_config.mlp_only_layers or hf_config.decoder_sparse_step != 1:
            raise ValueError(
                f"model.hf: mlp_only_layers={hf_config.mlp_only_layers} and decoder_sparse_step="
                f"{hf_config.decoder_sparse_step}; NeMo's Qwen3 has experts in every layer: allowed are [] and 1"
            )
        fields |= {
            "num_moe_experts": hf_config.num_experts,
            "moe_router_topk": hf_config.num_experts_per_tok,
            # Probabilities are of the chosen experts alone, or of all of them.
            "moe_router_pre_softmax": not hf_config.norm_topk_prob,
            "moe_aux_loss_coeff": hf_config.router_aux_loss_coef,
        }
    return fields


@contextmanager
def _no_output_layer(tied: bool) -> Iterator[None]:
    """Where `tied`, convert no output layer, in either direction: the embedding is it."""
    from nemo.lightning import io

    apply_transforms = io.apply_transforms
    names = ("output_layer.weight", "lm_head.weight")

    def without(source: Any, target: Any, mapping: dict[str, str], transforms: list[Any], **kwargs: Any) -> Any:
        mapping = {key: value for key, value in mapping.items() if key not in names}
        transforms = [transform for transform in transforms if transform.source_key not in names]
        return apply_transforms(source, target, mapping=mapping, transforms=transforms, **kwargs)

    if tied:
        io.apply_transforms = without
    try:
        yield
    finally:
        io.apply_transforms = apply_transforms


def build_importer(source: Path, hf_files: Path, trust_remote_code: bool) -> Any:
    """NeMo's importer of the family of `source`, with the tokenizer taken from `hf_files`."""
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    model_class = nemo_model_class(hf_config.model_type)
    base = type(model_class.importer(f"hf://{source}"))  # type: ignore[attr-defined]

    class Importer(base):  # type: ignore[misc, valid-type]
        def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
            # NeMo 2.7.3 lightning/io/connector.py: /tmp/nemo_tokenizer, trust_remote_code=True.
            return str(hf_files)

        @property
        def config(self) -> Any:
            config = super().config
            for name, value in _nemo_fields(hf_config).items():
                setattr(config, name, value)
                # What a checkpoint keeps is the record of how the configuration was built.
                setattr(config.__io__, name, value)
            return config

        def convert_state(self, source: Any, target: Any, *args: Any) -> Any:
            with _no_output_layer(hf_config.tie_word_embeddings):
                return super().convert_state(source, target, *args)

    return Importer(str(source))


def convert_to_nemo(source: Path, output: Path, tokenizer: str | None = None, trust_remote_code: bool = False) -> Path:
    """Convert the Hugging Face model in `source` to a NeMo checkpoint `output`. One process, no GPU needed.

    The weights keep their dtype. `output` also gets a folder `hf/` with configuration and tokenizer.

    Raises:
        ValueError: no such model, no tokenizer, a family that cannot be converted, or a tokenizer with more tokens than
            the model has rows.
    """
    from transformers import AutoConfig, AutoTokenizer

    with complete_folder(output) as folder:
        hf_files = folder / HF_FILES
        save_hf_files(source, tokenizer, hf_files, trust_remote_code)
        vocab_size = AutoConfig.from_pretrained(hf_files).vocab_size
        tokens = len(AutoTokenizer.from_pretrained(hf_files))
        if tokens > vocab_size:
            raise ValueError(
                f"model.tokenizer: {tokens} tokens, but the model has {vocab_size} rows (vocab_size); "
                f"a label above them has no logit"
            )
        # NeMo copies the tokenizer's folder into context/ under its own name, so no path of this temporary one stays.
        build_importer(source, hf_files, trust_remote_code).apply(folder)
        manifest = {"source": str(source), "vocab_size": vocab_size, "tokens": tokens}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        write_sums(folder)
    return output


def convert_to_hf(checkpoint: Path, output: Path, hf_files: Path) -> Path:
    """Convert a NeMo checkpoint to a Hugging Face folder that `transformers` loads. One process, no GPU needed.

    checkpoint: a folder with `weights/` and `context/`, as NeMo saves it.
    hf_files: a folder with the configuration and tokenizer of the model that was imported; the export carries them
        unchanged (but for the dtype).

    Raises:
        ValueError: `checkpoint` is no NeMo checkpoint, or `hf_files` has no config.json.
    """
    for needed in ("weights", "context"):
        if not (checkpoint / needed).is_dir():
            raise ValueError(f"checkpoint: {checkpoint} has no {needed}/ folder; expected one that NeMo saved")
    if not (hf_files / "config.json").is_file():
        raise ValueError(f"hf: {hf_files} has no config.json; give the folder of the model that was imported")
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    hf_config = AutoConfig.from_pretrained(hf_files)
    model_class = nemo_model_class(hf_config.model_type)
    base = type(model_class.exporter("hf", checkpoint))  # type: ignore[attr-defined]

    class Exporter(base):  # type: ignore[misc, valid-type]
        @property
        def config(self) -> Any:
            return hf_config

        def convert_state(self, source: Any, target: Any, *args: Any) -> Any:
            with _no_output_layer(hf_config.tie_word_embeddings):
                converted = super().convert_state(source, target, *args)
            # NeMo builds the model without tying it, and would save an output layer of arbitrary values.
            converted.tie_weights()
            return converted

    with complete_folder(output) as folder:
        Exporter(str(checkpoint)).apply(folder)
        AutoTokenizer.from_pretrained(hf_files).save_pretrained(folder)
        if (hf_files / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(hf_files).save_pretrained(folder)
    return output


def run_in_own_process(arguments: list[str], backend: str | None = None) -> None:
    """Run `python -m nemo_eaft.convert` with `arguments` and wait. It ends when this process does, however that
    happens, and then leaves no half-written folder.

    backend: None: cuda where there is a GPU, else cpu. A login node of a cluster has none, and what it converts is
        trained where there are some.

    Raises:
        ValueError: the user's input was wrong (exit code 2); the message is the child's. Or there is no GPU, and what
            is installed needs one, as in an image of NGC.
        RuntimeError: it failed otherwise.
    """
    if backend is None:
        import torch

        backend = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "cpu":
        import nemo_eaft.cpu

        if reason := nemo_eaft.cpu.unusable():
            raise ValueError(
                f"a conversion needs a GPU in this environment, or one without Transformer Engine and with NeMo "
                f"{nemo_eaft.cpu.NEMO_VERSION}: {reason}"
            )
    command = [sys.executable, "-m", "nemo_eaft.convert", "--backend", backend]
    code, said = run_to_its_end([*command, "--parent", str(os.getpid()), *arguments])
    if code == 2:
        raise ValueError(said.strip().splitlines()[-1].removeprefix("nemo_eaft.convert: "))
    if code:
        raise RuntimeError(f"conversion failed (exit code {code}):\n{said[-4000:]}")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the conversion process: `to-nemo SOURCE OUTPUT` or `to-hf CHECKPOINT OUTPUT HF_FILES`."""
    parser = argparse.ArgumentParser(prog="nemo_eaft.convert")
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parent", type=int, help="end with this process, which started the conversion")
    commands = parser.add_subparsers(dest="command", required=True)
    to_nemo = commands.add_parser("to-nemo")
    to_nemo.add_argument("source")
    to_nemo.add_argument("output", type=Path)
    to_nemo.add_argument("--tokenizer")
    to_nemo.add_argument("--trust-remote-code", action="store_true")
    to_hf = commands.add_parser("to-hf")
    to_hf.add_argument("checkpoint", type=Path)
    to_hf.add_argument("output", type=Path)
    to_hf.add_argument("hf_files", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.parent is not None:
        end_cleanly_with(arguments.parent)
    if arguments.backend == "cpu":
        import nemo_eaft.cpu

        nemo_eaft.cpu.enable()
    try:
        if arguments.command == "to-nemo":
            # NeMo saves what it has imported, as a rank saves a checkpoint.
            end_writer_with_rank()
            source = hf_folder(arguments.source)
            convert_to_nemo(source, arguments.output, arguments.tokenizer, arguments.trust_remote_code)
        else:
            convert_to_hf(arguments.checkpoint, arguments.output, arguments.hf_files)
    except ValueError as error:
        print(f"nemo_eaft.convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
