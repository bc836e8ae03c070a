"""Hugging Face's `Glm4ForCausalLM` to NeMo's `GLM4Model` and back, as connectors of NeMo's io."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from nemo.collections.llm.gpt.model.base import torch_dtype_from_mcore_config
from nemo.lightning import io, teardown
from nemo.lightning.io.state import TransformFns
from nemo.lightning.pytorch.utils import dtype_from_hf

from nemo_eaft.glm4.model import GLM4Config, GLM4Model

# Hugging Face's name -> Megatron's, with Transformer Engine's fused norms. What is the same tensor on both sides: the
# gate stands before the up projection in gate_up_proj as in linear_fc1.
_SAME = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
    "model.layers.*.self_attn.o_proj.weight": "decoder.layers.*.self_attention.linear_proj.weight",
    "model.layers.*.post_self_attn_layernorm.weight": "decoder.layers.*.post_self_attn_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
    "model.layers.*.mlp.gate_up_proj.weight": "decoder.layers.*.mlp.linear_fc1.weight",
    "model.layers.*.mlp.down_proj.weight": "decoder.layers.*.mlp.linear_fc2.weight",
    "model.layers.*.post_mlp_layernorm.weight": "decoder.layers.*.post_mlp_layernorm.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
# Megatron may have more rows of these: it pads the vocabulary.
_ROWS_OF_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def _separate(what: str) -> tuple[str, ...]:
    return tuple(f"model.layers.*.self_attn.{letter}_proj.{what}" for letter in "qkv")


def _joined(what: str) -> str:
    return f"decoder.layers.*.self_attention.linear_qkv.{what}"


def _same(tied: bool) -> dict[str, str]:
    """Tied, the embedding is the output layer."""
    return {hf: megatron for hf, megatron in _SAME.items() if not (tied and hf == "lm_head.weight")}


def _generation_config(checkpoint: str) -> Any:
    """What the import kept of generation_config.json; None: the model had none."""
    return io.load_context(checkpoint, subpath="model.config").generation_config


def check_hf_config(source: Any) -> None:
    """Whether `GLM4Config` can say all that a Hugging Face `Glm4Config` says.

    Raises:
        ValueError: naming the field of config.json.
    """
    if source.hidden_act != "silu":
        raise ValueError(f"hidden_act={source.hidden_act!r} in config.json of a glm4 model: allowed is 'silu'")
    scaling = getattr(source, "rope_scaling", None)
    if scaling and scaling.get("rope_type", scaling.get("type")) != "default":
        # Megatron-Core 0.15.3: YarnRotaryEmbedding refuses interleaved rotation, and others are not in GPTConfig.
        raise ValueError(f"rope_scaling={scaling} in config.json of a glm4 model is not supported: allowed is null")


@io.model_importer(GLM4Model, "hf")
class HFGLM4Importer(io.ModelConnector["Glm4ForCausalLM", GLM4Model]):  # type: ignore[name-defined]
    """`llm.import_ckpt(GLM4Model(...), "hf:///folder")`. Weights keep their dtype."""

    def init(self) -> GLM4Model:
        """The model to fill."""
        return GLM4Model(self.config, tokenizer=self.tokenizer)

    def apply(self, output_path: Path, trust_remote_code: bool | None = None) -> Path:
        """Convert and save to `output_path`. `trust_remote_code` has no use: transformers has this model.

        Raises:
            ValueError: config.json asks for something that the model cannot do.
        """
        from transformers import Glm4ForCausalLM

        # Before gigabytes are read.
        target = self.init()
        source = Glm4ForCausalLM.from_pretrained(str(self), torch_dtype="auto")
        trainer = self.nemo_setup(target)
        self.convert_state(source, target)
        self.nemo_save(output_path, trainer)
        teardown(trainer, target)
        return output_path

    def convert_state(self, source: Any, target: Any) -> Any:
        """Copy the weights of the Hugging Face model into Megatron's, which is on one rank."""
        joins = [("weight", TransformFns.merge_qkv)]
        if source.config.attention_bias:
            joins.append(("bias", TransformFns.merge_qkv_bias))
        transforms = [
            io.state_transform(source_key=_separate(what), target_key=_joined(what), fn=join) for what, join in joins
        ]
        mapping = _same(source.config.tie_word_embeddings)
        return io.apply_transforms(source, target, mapping=mapping, transforms=transforms)

    def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
        """The tokenizer's files in a folder of their own, which NeMo copies into the checkpoint.

        NeMo 2.7.3 has one folder for all users and lets a tokenizer run code (lightning/io/connector.py).
        """
        from transformers import AutoTokenizer

        folder = save_path
        if not folder:
            folder = tempfile.mkdtemp(prefix="nemo_eaft-tokenizer-")
            # Not before: the model that was imported reads them, too.
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        AutoTokenizer.from_pretrained(tokenizer_name_or_path).save_pretrained(folder)
        return folder

    @property
    def tokenizer(self) -> Any:
        """NeMo's tokenizer, from a copy of the files."""
        from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

        return AutoTokenizer(self.save_hf_tokenizer_assets(str(self)))

    @property
    def config(self) -> GLM4Config:
        """NeMo's configuration of the same model."""
        from transformers import GenerationConfig, Glm4Config

        source = Glm4Config.from_pretrained(str(self))
        check_hf_config(source)
        dtype = dtype_from_hf(source)
        try:
            generation_config = GenerationConfig.from_pretrained(str(self))
        except OSError:
            # Not every model has one, and training needs none.
            generation_config = None
        return GLM4Config(
            num_layers=source.num_hidden_layers,
            hidden_size=source.hidden_size,
            ffn_hidden_size=source.intermediate_size,
            num_attention_heads=source.num_attention_heads,
            num_query_groups=source.num_key_value_heads,
            kv_channels=source.head_dim,
            add_qkv_bias=source.attention_bias,
            rotary_base=source.rope_theta,
            rotary_percent=source.partial_rotary_factor,
            layernorm_epsilon=source.rms_norm_eps,
            init_method_std=source.initializer_range,
            seq_length=source.max_position_embeddings,
            vocab_size=source.vocab_size,
            share_embeddings_and_output_weights=source.tie_word_embeddings,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            generation_config=generation_config,
        )


@io.model_exporter(GLM4Model, "hf")
class HFGLM4Exporter(io.ModelConnector[GLM4Model, "Glm4ForCausalLM"]):  # type: ignore[name-defined]
    """`llm.export_ckpt(checkpoint, "hf", folder)`."""

    def init(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The Hugging Face model to fill, its weights not initialised."""
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import no_init_weights

        with no_init_weights():
            return AutoModelForCausalLM.from_config(self.config, torch_dtype=dtype)

    def apply(self, output_path: Path, trust_remote_code: bool | None = None) -> Path:
        """Convert and save to `output_path`, with tokenizer and generation configuration. `trust_remote_code` has no
        use."""
        source, _ = self.nemo_load(str(self))
        target = self.convert_state(source, self.init(torch_dtype_from_mcore_config(source.config)))
        generation = _generation_config(str(self))
        if generation is not None:
            target.generation_config = generation
        target.cpu().save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        return output_path

    def convert_state(self, source: Any, target: Any) -> Any:
        """Copy Megatron's weights, all on one rank, into the Hugging Face model."""
        names = _same(target.config.tie_word_embeddings)
        mapping = {megatron: hf for hf, megatron in names.items() if hf not in _ROWS_OF_VOCABULARY}
        splits = [("weight", TransformFns.split_qkv)]
        if target.config.attention_bias:
            splits.append(("bias", TransformFns.split_qkv_bias))
        transforms = [
            io.state_transform(source_key=_joined(what), target_key=_separate(what), fn=split) for what, split in splits
        ] + [
            io.state_transform(source_key=names[hf], target_key=hf, fn=TransformFns.prune_padding)
            for hf in _ROWS_OF_VOCABULARY
            if hf in names
        ]
        converted = io.apply_transforms(source, target, mapping=mapping, transforms=transforms)
        converted.tie_weights()
        return converted

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer that the checkpoint holds."""
        return io.load_context(str(self), subpath="model").tokenizer.tokenizer

    @property
    def config(self) -> Any:
        """Hugging Face's configuration of the same model; special tokens are the tokenizer's, but for several that end
        a text, which only the generation configuration has."""
        from transformers import Glm4Config

        source = io.load_context(str(self), subpath="model.config")
        tokenizer = self.tokenizer
        generation = _generation_config(str(self))
        ends = generation.eos_token_id if generation is not None else None
        return Glm4Config(
            architectures=["Glm4ForCausalLM"],
            num_hidden_layers=source.num_layers,
            hidden_size=source.hidden_size,
            intermediate_size=source.ffn_hidden_size,
            num_attention_heads=source.num_attention_heads,
            num_key_value_heads=source.num_query_groups,
            head_dim=source.kv_channels,
            attention_bias=source.add_qkv_bias,
            rope_theta=source.rotary_base,
            partial_rotary_factor=source.rotary_percent,
            rms_norm_eps=source.layernorm_epsilon,
            initializer_range=source.init_method_std,
            max_position_embeddings=source.seq_length,
            vocab_size=source.vocab_size,
            tie_word_embeddings=source.share_embeddings_and_output_weights,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        )
