"""Parameters of a built Megatron model, under the names that they have in the whole model."""

from __future__ import annotations

from typing import Any

from nemo_eaft.plan.rehearsal.records import Parameter


def parameters_of(core: Any) -> dict[str, Parameter]:
    """Parameters of an unwrapped GPTModel; layers and experts are numbered in the whole model, from 0."""
    copies = core.share_embeddings_and_output_weights and not core.pre_process
    found = {}
    for name, parameter in core.named_parameters():
        cut = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        copy = bool(copies and name == "output_layer.weight")
        found[_name(core, name)] = Parameter(tuple(parameter.shape), cut, copy)
    return found


def _name(core: Any, name: str) -> str:
    """`decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight` -> the same with the numbers in the model."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name
    layer = core.decoder.layers[int(parts[2])]
    parts[2] = str(layer.layer_number - 1)
    if "local_experts" in parts:
        place = parts.index("local_experts") + 1
        parts[place] = str(layer.mlp.local_expert_indices[int(parts[place])])
    return ".".join(parts)
