"""What a run is: every setting with its type, unit, default and allowed range.

``conf/`` holds values, :mod:`nemo_eaft.compose` turns files and command-line overrides into one :class:`Settings`, and
this file decides what is allowed, with :mod:`nemo_eaft.settings_data` for the rows,
:mod:`nemo_eaft.settings_checks` for what settings ask of each other and :class:`nemo_eaft.config.EAFTConfig` for the
loss. Nothing heavy is imported, so a wrong setting is found in a fraction of a second.

Every error is a ``ValueError`` that names the full key (``parallel.tensor``), the value and what is allowed.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

from nemo_eaft import config
from nemo_eaft.config import EAFTConfig
from nemo_eaft.settings_checks import at_least as _at_least
from nemo_eaft.settings_checks import check_together
from nemo_eaft.settings_checks import finite as _finite
from nemo_eaft.settings_checks import warn as _warn
from nemo_eaft.settings_data import DataSettings as DataSettings

Gate = Literal[config.Gate, "stock"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is fine-tuned."""

    hf: str
    """Hugging Face name (``Qwen/Qwen2.5-0.5B-Instruct``) or a folder in its format."""
    imported: str | None = None
    """Folder of the converted NeMo checkpoint. null: ``imported/<name>-<digest of the files>`` below
    ``$NEMO_EAFT_HOME``, or below ``~/.cache/nemo_eaft`` where that is not set."""
    tokenizer: str | None = None
    """Hugging Face name or folder of the tokenizer. null: the one of ``model.hf``."""
    trust_remote_code: bool = False
    """Let ``transformers`` run Python code shipped with the model."""

    def __post_init__(self) -> None:
        for key in ("hf", "imported", "tokenizer"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                raise ValueError(f"model.{key} is empty: give a Hugging Face name or a folder")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is done to the cross-entropy of each token. What is allowed is decided by :class:`EAFTConfig`."""

    gate: Gate = "eaft"
    """``eaft``: weight by entropy. ``dft``, ``mask``, ``sigmoid``: other weights. ``none``: weight 1 on our
    own path. ``stock``: the loss is Megatron's own, and is only measured."""
    alpha: float = 1.0
    """Exponent of the weight, ``(H / normalizer) ** alpha``; 0 or more. 0 gives plain fine-tuning."""
    top_k: int | None = 20
    """Entropy over the so many largest logits, 2 or more; null: over the whole vocabulary."""
    normalizer: float | None = None
    """Divides the entropy, nats. null: ``ln top_k``. 3.0 is what the released code of the paper divides
    by."""
    gate_slope: float = 10.0
    """Steepness of ``gate=sigmoid``."""
    gate_centre: float = 0.5
    """Normalised entropy at which ``gate=sigmoid`` gives 1/2."""
    conflict_probability: float = 0.1
    """A confident conflict has a label probability below this, 0 to 1."""
    conflict_entropy: float = 0.2
    """A confident conflict has a normalised entropy below this."""
    fused_linear: bool | Literal["auto"] = "auto"
    """Compute output layer and loss together, without holding the logits of all tokens, for one matrix product of the
    output layer more, or, with one tensor-parallel rank and no virtual pipeline, for its weight's gradient held in
    float32 from forward to backward. ``auto``: where the logits of one micro-batch and their gradient would take more
    than a tenth of the memory of a rank (:mod:`nemo_eaft.logits_memory`). Not for LoRA on the output layer, nor for
    ``stock``."""
    check_replicas: int = 0
    """Every so many steps, beginning with the first, compare the rows that the ranks of one copy of the model were
    given (:mod:`nemo_eaft.replicas`); 0: never."""

    def __post_init__(self) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                self._config()
            except ValueError as error:
                raise ValueError(f"loss.{error}") from error
        for warning in said:
            # `stock` is no gate of EAFTConfig, but the name that the user gave.
            text = str(warning.message).replace("gate='none'", f"gate={self.gate!r}")
            _warn(f"loss.{text}")
        _at_least("loss.check_replicas", self.check_replicas, 0, " (0: never)")
        if self.fused_linear is True and self.gate == "stock":
            raise ValueError(
                "loss.fused_linear=true with loss.gate=stock: Megatron's own loss needs the logits; allowed are false "
                "and auto, or loss.gate=none for plain fine-tuning on our own path"
            )

    def eaft_config(self) -> EAFTConfig:
        """These settings for the loss; ``stock`` measures with weight 1. What has no effect was said before, once."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return self._config()

    def _config(self) -> EAFTConfig:
        known = {entry.name for entry in fields(EAFTConfig)}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name in known}
        return EAFTConfig(**values | {"gate": "none" if self.gate == "stock" else self.gate})


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How the model is split. Data parallelism is what is left of the ranks."""

    tensor: int = 1
    """Ranks that share each layer's matrices and the vocabulary."""
    pipeline: int = 1
    """Stages, each holding a run of layers."""
    last_stage_layers: int | None = None
    """Layers of the last stage, which also has output layer and loss; the others share the rest. null: as many as the
    others. For models whose layers no number of stages divides."""
    virtual_pipeline: int | None = None
    """Model chunks per stage (interleaved schedule); null: not interleaved."""
    context: int = 1
    """Ranks that share each sequence."""
    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts model."""
    sequence: bool = False
    """Split norms and dropout over the tensor-parallel ranks along the sequence (saves memory)."""

    def __post_init__(self) -> None:
        for key in ("tensor", "pipeline", "context", "expert"):
            _at_least(f"parallel.{key}", getattr(self, key), 1)
        _at_least("parallel.virtual_pipeline", self.virtual_pipeline, 2)
        _at_least("parallel.last_stage_layers", self.last_stage_layers, 1)
        if self.last_stage_layers is not None and (self.pipeline == 1 or self.virtual_pipeline is not None):
            raise ValueError(
                f"parallel.last_stage_layers={self.last_stage_layers} needs parallel.pipeline of 2 or more and no "
                f"parallel.virtual_pipeline, got {self.pipeline} and {self.virtual_pipeline}"
            )
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline of 2 or more, got 1"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence=true needs parallel.tensor of 2 or more, got 1")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How long, how large, how fast."""

    max_steps: int = 1000
    """Optimizer steps of the whole run. The order of rows does not depend on it: a longer run goes on where a shorter
    one ended, but its learning rate decays over all of its steps."""
    num_nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """Ranks per machine: its GPUs, or its processes with ``run.backend=cpu``."""
    micro_batch_size: int = 1
    """Rows in one forward pass of one data-parallel rank."""
    global_batch_size: int = 128
    """Rows in one optimizer step, over all ranks."""
    seq_length: int = 2048
    """Tokens in a row, at most. A longer row is a bad row."""
    learning_rate: float = 5e-6
    """Highest learning rate, after the warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step (cosine decay)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of Adam."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0: not clipped."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """``bf16``: mixed precision with float32 master weights. ``fp32``: float32 throughout."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, attention only, or every layer."""
    distributed_optimizer: bool = True
    """Split the optimizer state over the data-parallel ranks."""
    val_every: int = 100
    """Steps between validations; 0: never."""
    val_batches: int = 10
    """Global batches in one validation, at most."""
    save_every: int = 100
    """Steps between checkpoints. The last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; -1: all."""
    log_every: int = 1
    """Steps between lines of the log."""
    histogram_every: int = 100
    """Steps between landscapes (histogram of entropy and label probability) and percentiles of entropy and weight, in
    TensorBoard and ``landscape.jsonl``; 0: never."""
    seed: int = 1234
    """Seed of the order of rows and of what is packed together, 0 to 2**32 - 1. There is no dropout: NeMo's checkpoints
    hold no random state, so a resumed run would differ from an undisturbed one."""

    def __post_init__(self) -> None:
        for key in ("max_steps", "num_nodes", "gpus_per_node", "micro_batch_size", "global_batch_size"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        _at_least("trainer.seq_length", self.seq_length, 2)
        for key in ("warmup_steps", "val_every", "histogram_every", "seed"):
            _at_least(f"trainer.{key}", getattr(self, key), 0)
        if self.seed >= 2**32:
            raise ValueError(f"trainer.seed={self.seed} must be below 2**32 = {2**32}")
        for key in ("val_batches", "save_every", "log_every"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        if self.keep_checkpoints != -1:
            _at_least("trainer.keep_checkpoints", self.keep_checkpoints, 1, " or -1 for all")
        _finite("trainer.learning_rate", self.learning_rate, 0.0)
        _finite("trainer.min_learning_rate", self.min_learning_rate, 0.0)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"trainer.min_learning_rate={self.min_learning_rate} is above "
                f"trainer.learning_rate={self.learning_rate}"
            )
        if self.warmup_steps >= self.max_steps and self.warmup_steps > 0:
            raise ValueError(
                f"trainer.warmup_steps={self.warmup_steps} must be below trainer.max_steps={self.max_steps}: a short "
                "run needs a shorter warm-up"
            )
        _finite("trainer.weight_decay", self.weight_decay, 0.0)
        _finite("trainer.clip_grad", self.clip_grad, 0.0)
        for key in ("adam_beta1", "adam_beta2"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"trainer.{key}={value} must be 0 or more and below 1")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where the run lives."""

    dir: str
    """Folder of the run: data, checkpoints, ``metrics.jsonl``, ``report.png``."""
    resume: bool = True
    """Continue from the newest checkpoint in ``run.dir``, if there is one. false: refuse a folder that holds
    one."""
    backend: Literal["cuda", "cpu"] = "cuda"
    """``cuda``: GPUs and NCCL. ``cpu``: no GPU, gloo."""
    name: str | None = None
    """Name shown in TensorBoard and W&B. null: the last part of ``run.dir``."""
    wandb_project: str | None = None
    """Project in Weights & Biases; null: do not use it."""
    max_restarts: int = 0
    """How often ``nemo-eaft train`` starts all ranks again after one has failed, each time from the newest checkpoint.
    Under a ``torchrun`` of your own its ``--max-restarts`` counts."""
    stall_seconds: int | None = 900
    """When a rank has done nothing for so long, the job ends and the stuck rank and its stack are named. More than
    the longest micro-batch. The backend's own limits for a collective are raised above it. 0 or null: never, and those
    limits end the job without a name (NCCL's are 600 s or 1800 s, raised to ``run.save_seconds`` and a minute)."""
    save_seconds: int = 3600
    """The same limit while a checkpoint is saved; longer than ``run.stall_seconds``, or it has no effect."""

    def __post_init__(self) -> None:
        for key in ("dir", "name", "wandb_project"):
            value = getattr(self, key)
            if value is not None and not value.strip():
                raise ValueError(f"run.{key} is empty")
        _at_least("run.max_restarts", self.max_restarts, 0)
        _at_least("run.stall_seconds", self.stall_seconds, 0)
        _at_least("run.save_seconds", self.save_seconds, 1)
        if self.save_seconds < (self.stall_seconds or 0) and self.save_seconds != type(self).save_seconds:
            _warn(
                f"run.save_seconds={self.save_seconds} has no effect below run.stall_seconds={self.stall_seconds}, "
                f"which holds for a save too"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One complete run. Building it runs every check that needs no file, model or GPU."""

    model: ModelSettings
    data: DataSettings
    loss: LossSettings
    parallel: ParallelSettings
    trainer: TrainerSettings
    run: RunSettings

    def __post_init__(self) -> None:
        check_together(self)

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.trainer.num_nodes * self.trainer.gpus_per_node

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.world_size // self.parallel.model_ranks

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank in one optimizer step."""
        return self.trainer.global_batch_size // (self.trainer.micro_batch_size * self.data_parallel)

    @property
    def sequence_unit(self) -> int:
        """Tokens of which the length of every batch must be a multiple.

        Context parallelism cuts a sequence into two pieces per rank, and sequence parallelism cuts what a context rank
        then holds into one piece per tensor-parallel rank.
        """
        tensor = self.parallel.tensor if self.parallel.sequence else 1
        context = self.parallel.context
        return context * math.lcm(tensor, 2) if context > 1 else tensor


def known_keys() -> list[str]:
    """Every full key, ``group.name``, in the order of the files."""
    return [f"{group.name}.{entry.name}" for group in fields(Settings) for entry in fields(_GROUPS[group.name])]


_GROUPS: dict[str, Any] = {
    "model": ModelSettings,
    "data": DataSettings,
    "loss": LossSettings,
    "parallel": ParallelSettings,
    "trainer": TrainerSettings,
    "run": RunSettings,
}
