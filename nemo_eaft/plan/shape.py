"""The sizes of a model, from its Hugging Face ``config.json``: a folder's, the local cache's, or the shipped copy."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

# Families whose layers are known here, and what `transformers` 4.57 does where config.json does not say.
# (modeling_<family>.py: which projections have a bias; configuration_<family>.py: the size of a head.)
_ALWAYS_QKV_BIAS = ("qwen2",)
_ATTENTION_BIAS_IS_QKV_ONLY = ("glm4",)
_ATTENTION_BIAS_BY_DEFAULT = ("glm4",)
_NO_ATTENTION_BIAS = ("mistral", "qwen2")
_QK_NORM = ("qwen3", "qwen3_moe")
_SANDWICH_NORMS = ("glm4",)
_HEAD_DIM = {"qwen3": 128, "glm4": 128}
_FAMILIES = ("glm4", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the size of every tensor of a model follows from; names are those of ``config.json``."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the feed-forward part, of one expert for a mixture of experts."""
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int | None = None
    qkv_bias: bool = False
    projection_bias: bool = False
    """A bias on attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """A norm of the size of a head on queries and on keys."""
    sandwich_norms: bool = False
    """A norm behind attention and one behind the feed-forward part, besides those before them."""
    num_experts: int | None = None
    """Experts in every layer; None: none."""
    num_experts_per_tok: int = 1

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> ModelShape:
        """Read a ``config.json``, as a mapping.

        Raises:
            ValueError: a family whose layers are not known here, or a value that is missing.
        """
        family = mapping.get("model_type")
        if family not in _FAMILIES:
            raise ValueError(f"model.hf: model_type {family!r} cannot be planned; allowed: {', '.join(_FAMILIES)}")
        experts = mapping.get("num_experts") if family == "qwen3_moe" else None
        if family == "qwen3_moe" and (mapping.get("mlp_only_layers") or mapping.get("decoder_sparse_step", 1) != 1):
            raise ValueError(
                f"model.hf: mlp_only_layers={mapping.get('mlp_only_layers')} and decoder_sparse_step="
                f"{mapping.get('decoder_sparse_step')}; NeMo's Qwen3 has experts in every layer: allowed are [] and 1"
            )
        heads = _size(mapping, "num_attention_heads")
        hidden = _size(mapping, "hidden_size")
        said = mapping.get("attention_bias", family in _ATTENTION_BIAS_BY_DEFAULT)
        attention_bias = bool(said) and family not in _NO_ATTENTION_BIAS
        positions = mapping.get("max_position_embeddings")
        return cls(
            model_type=family,
            hidden_size=hidden,
            num_hidden_layers=_size(mapping, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_size(mapping, "num_key_value_heads"),
            head_dim=mapping.get("head_dim") or _HEAD_DIM.get(family) or hidden // heads,
            intermediate_size=_size(mapping, "intermediate_size" if experts is None else "moe_intermediate_size"),
            vocab_size=_size(mapping, "vocab_size"),
            tie_word_embeddings=bool(mapping.get("tie_word_embeddings", False)),
            max_position_embeddings=None if positions is None else int(positions),
            qkv_bias=family in _ALWAYS_QKV_BIAS or attention_bias,
            projection_bias=attention_bias and family not in _ATTENTION_BIAS_IS_QKV_ONLY,
            mlp_bias=bool(mapping.get("mlp_bias", False)) and family == "llama",
            qk_norm=family in _QK_NORM,
            sandwich_norms=family in _SANDWICH_NORMS,
            num_experts=experts,
            num_experts_per_tok=_size(mapping, "num_experts_per_tok") if experts is not None else 1,
        )

    @property
    def query_width(self) -> int:
        """Elements of all queries of a token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Elements of all keys of a token, or of all values."""
        return self.num_key_value_heads * self.head_dim


def find_shape(model_hf: str) -> ModelShape:
    """The shape of ``model.hf``: from a folder of that name, else from the local Hugging Face cache, else from the
    copies that are shipped. Nothing is downloaded.

    Raises:
        ValueError: none of them has it, or its ``config.json`` cannot be used.
    """
    return ModelShape.from_hf(find_config(model_hf))


def find_config(model_hf: str) -> dict[str, Any]:
    """The ``config.json`` of ``model.hf`` as a mapping, found as :func:`find_shape` does; of a shipped copy the values
    that sizes follow from.

    Raises:
        ValueError: there is none.
    """
    folder = Path(model_hf).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.hf: {model_hf} has no config.json; expected a folder written by save_pretrained")
        return _read(folder / "config.json")
    cached = _in_cache(model_hf)
    if cached is not None:
        return _read(cached)
    if folder.is_absolute() or model_hf.startswith((".", "~")):
        hint = " (python -m nemo_eaft.demo_data writes it)" if "demo" in folder.parts else ""
        raise ValueError(f"model.hf: there is no folder {model_hf}{hint}")
    if model_hf not in shipped_models():
        raise ValueError(
            f"model.hf: {model_hf!r} is no local folder, is not in the local Hugging Face cache, and its sizes are not "
            f"shipped; shipped are {', '.join(shipped_models())}"
        )
    return {key: value for key, value in _shipped()[model_hf].items() if key != "source"}


def shipped_models() -> list[str]:
    """Hugging Face names whose sizes are shipped."""
    return list(_shipped())


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    import yaml

    models: dict[str, dict[str, Any]] = yaml.safe_load(
        files("nemo_eaft.plan").joinpath("architectures.yaml").read_text(encoding="utf-8")
    )
    return models


def _in_cache(name: str) -> Path | None:
    """``config.json`` in the local cache of the hub, without asking the hub."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.hf: {path} cannot be read ({error})") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"model.hf: {path} holds no mapping")
    return mapping


def _size(mapping: Mapping[str, Any], key: str) -> int:
    value = mapping.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"model.hf: config.json has {key}={value!r}; expected a whole number of at least 1")
    return value
