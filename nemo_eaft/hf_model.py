"""The Hugging Face side of a run: where the model is, where its conversion goes, and whether the settings fit
it."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

from nemo_eaft.settings import ModelSettings, Settings


def home() -> Path:
    """Where conversions and the demo's files are kept: ``$NEMO_EAFT_HOME``, or ``~/.cache/nemo_eaft``."""
    return Path(os.environ.get("NEMO_EAFT_HOME") or "~/.cache/nemo_eaft").expanduser()


def imported_folder(model: ModelSettings, folder: Path) -> Path:
    """Where the converted checkpoint of a model belongs.

    Args:
        model: ``model.imported`` wins if it is set; ``model.tokenizer`` takes part, for the checkpoint holds it.
        folder: the local folder of ``model.hf``.

    Returns:
        ``<home>/imported/<name>-<12 digits>``. The digits change with any file of the model (name, size, time
        of change; for a snapshot of the hub, whose folder is named by its content, that name), so a model
        that was trained further in place is converted anew.
    """
    if model.imported is not None:
        return Path(model.imported).expanduser()
    digest = hashlib.sha256()
    if folder.parent.name == "snapshots":
        digest.update(folder.name.encode())
    else:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
                stat = path.stat()
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    digest.update(f"{model.tokenizer}".encode())
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", model.hf if not Path(model.hf).exists() else folder.name).strip("-")
    return home() / "imported" / f"{slug}-{digest.hexdigest()[:12]}"


def check_model(settings: Settings, hf_config: Any, tokenizer: Any) -> None:
    """Check the settings against the model, before anything is converted or started.

    Args:
        settings: the run.
        hf_config: the model's ``transformers`` configuration.
        tokenizer: its Hugging Face tokenizer.

    Raises:
        ValueError: as :func:`check_layout`; a tokenizer with more tokens than the model has rows.
    """
    check_layout(settings, hf_config)
    if len(tokenizer) > hf_config.vocab_size:
        raise ValueError(
            f"model.tokenizer={settings.model.tokenizer or settings.model.hf} has {len(tokenizer)} tokens, "
            f"the model {settings.model.hf} only {hf_config.vocab_size} rows (vocab_size): a label above "
            f"them would have no logit"
        )


def check_layout(settings: Settings, hf_config: Any) -> None:
    """Check the settings against the sizes of the model.

    Args:
        settings: the run.
        hf_config: the model's ``transformers`` configuration, or its sizes under the same names.

    Raises:
        ValueError: naming the key, its value and what is allowed. The rules for heads and layers are those of
            megatron-core 0.15.3 (``transformer_config.py``), which refuses fewer key-value heads than ranks.
    """
    from nemo_eaft.convert import FAMILIES

    parallel = settings.parallel
    if hf_config.model_type not in FAMILIES:
        raise ValueError(
            f"model.hf={settings.model.hf}: model type {hf_config.model_type} cannot be converted; allowed "
            f"are {', '.join(sorted(FAMILIES))}"
        )
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    if heads % parallel.tensor or kv_heads % parallel.tensor:
        allowed = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
        raise ValueError(
            f"parallel.tensor={parallel.tensor} must divide the {heads} attention heads and {kv_heads} "
            f"key-value heads of {settings.model.hf}: allowed are {', '.join(map(str, allowed))}"
        )
    width = getattr(hf_config, "moe_intermediate_size", None) or hf_config.intermediate_size
    if width % parallel.tensor:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} must divide the width {width} of the feed-forward layers of "
            f"{settings.model.hf} (intermediate_size)"
        )
    vocab_size = hf_config.vocab_size
    if vocab_size % parallel.tensor:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} must divide the {vocab_size} rows of the vocabulary of "
            f"{settings.model.hf} (vocab_size): a converted model is not padded"
        )
    _check_layers(settings, hf_config.num_hidden_layers)
    experts = next(
        (value for key in ("num_local_experts", "num_experts") if (value := getattr(hf_config, key, None))),
        None,
    )
    if parallel.expert > 1 and (experts is None or experts % parallel.expert):
        there = "has no experts: allowed is 1" if experts is None else f"has {experts} experts, which it must divide"
        raise ValueError(f"parallel.expert={parallel.expert}: {settings.model.hf} {there}")
    warn_of_length(settings, hf_config)


def warn_of_length(settings: Settings, hf_config: Any) -> None:
    """Warn where rows are longer than what the model was made for."""
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions is not None and settings.trainer.seq_length > positions:
        warnings.warn(
            f"trainer.seq_length={settings.trainer.seq_length} is longer than the {positions} positions that "
            f"{settings.model.hf} was made for",
            stacklevel=3,
        )


def _check_layers(settings: Settings, layers: int) -> None:
    """Whether the stages can share the layers."""
    parallel, name = settings.parallel, settings.model.hf
    last = parallel.last_stage_layers
    if last is not None:
        others = parallel.pipeline - 1
        if last >= layers or (layers - last) % others:
            allowed = [n for n in range(1, layers) if (layers - n) % others == 0]
            raise ValueError(
                f"parallel.last_stage_layers={last} leaves {layers - last} of the {layers} layers of {name} to "
                f"{others} stages, which must divide them: allowed are {', '.join(map(str, allowed)) or 'none'}"
            )
        return
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if layers % chunks:
        shown = f"parallel.pipeline={parallel.pipeline}"
        if parallel.virtual_pipeline:
            shown += f" x parallel.virtual_pipeline={parallel.virtual_pipeline}"
        hint = "" if parallel.virtual_pipeline else ", or parallel.last_stage_layers says how many the last stage has"
        raise ValueError(f"{shown} must divide the {layers} layers of {name}{hint}")
