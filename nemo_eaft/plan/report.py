"""A plan as a mapping for ``--json``, and as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_eaft.plan.communication import loss_collectives
from nemo_eaft.plan.parameters import PARTS
from nemo_eaft.plan.plan import Plan
from nemo_eaft.plan.time import model_flops

if TYPE_CHECKING:
    from rich.console import Console


def as_mapping(plan: Plan) -> dict[str, Any]:
    """Everything a plan says, in plain values. GB are 10^9 bytes; keys with ``assumed`` rest on ``assumptions``."""
    settings, layout, time = plan.settings, plan.layout, plan.time
    memory = plan.memory[plan.fullest]
    return {
        "model": settings.model.hf,
        "parameters": plan.parameters,
        "world_size": layout.world_size,
        "data_parallel": layout.data_parallel,
        "layout": layout_of(plan),
        "batch": {
            "global_batch_size": settings.trainer.global_batch_size,
            "micro_batch_size": settings.trainer.micro_batch_size,
            "micro_batches": settings.num_micro_batches,
            "sequence_length": plan.batch.context_length,
            "tokens_per_step": plan.tokens_per_step,
        },
        "precision": settings.trainer.precision,
        "recompute": settings.trainer.recompute,
        "attention": plan.batch.attention,
        "loss_path": plan.path,
        "memory_per_gpu_gb": _gb(memory.parts) | {"total": _one_gb(memory.total)},
        "fullest_stage": plan.fullest,
        "gpu_memory_gb": _one_gb(plan.memory_bytes),
        "verdict": plan.verdict,
        "stages": [
            {
                "stage": stage,
                "layers": layout.layers_of(stage, plan.shape.num_hidden_layers),
                "first_and_last_layer_of_chunks": [
                    [chunk.start, chunk.stop - 1] for chunk in layout.chunks(stage, plan.shape.num_hidden_layers)
                ],
                "parameters": parameters.total,
                "parameters_by_part": {part: parameters.of(part) for part in PARTS},
                "memory_gb": _gb(plan.memory[stage].parts) | {"total": _one_gb(plan.memory[stage].total)},
            }
            for stage, parameters in enumerate(plan.stages)
        ],
        "activations_by_recompute_gb": _gb(plan.activations_by_recompute()),
        "loss_by_path_gb": _gb(plan.loss_by_path()),
        "loss_collectives_bytes_per_micro_batch": loss_collectives(plan.shape, layout, settings, plan.batch, plan.path),
        "checkpoint_gb": _one_gb(plan.checkpoint_bytes),
        "model_flops_per_step": model_flops(plan.shape, settings, plan.batch),
        "step_seconds_assumed": {
            "compute": time.compute,
            "pipeline_bubble": time.bubble,
            "tensor_parallel": time.tensor_parallel,
            "expert_parallel": time.expert_parallel,
            "data_parallel": time.data_parallel,
            "total": time.total,
        },
        "tokens_per_hour_assumed": tokens_per_hour(plan),
        "assumptions": assumptions(plan),
    }


def layout_of(plan: Plan) -> dict[str, Any]:
    """Sizes of the groups of ranks."""
    layout = plan.layout
    return {
        "num_nodes": plan.settings.trainer.num_nodes,
        "gpus_per_node": plan.settings.trainer.gpus_per_node,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": plan.settings.parallel.virtual_pipeline,
        "last_stage_layers": layout.last_stage_layers,
        "context": layout.context,
        "expert": layout.expert,
        "sequence": layout.sequence,
        "data_parallel": layout.data_parallel,
    }


def summary(plan: Plan) -> dict[str, Any]:
    """A layout among others: what to set, and what it costs."""
    return {
        "layout": layout_of(plan),
        "recompute": plan.settings.trainer.recompute,
        "memory_per_gpu_gb": _one_gb(plan.peak),
        "step_seconds_assumed": plan.time.total,
        "verdict": plan.verdict,
        "overrides": overrides(plan),
    }


def overrides(plan: Plan) -> list[str]:
    """Words for the command line that give this layout."""
    parallel, trainer, layout = plan.settings.parallel, plan.settings.trainer, plan.layout
    words = [f"trainer.num_nodes={trainer.num_nodes}", f"trainer.gpus_per_node={trainer.gpus_per_node}"]
    words += [f"parallel.{key}={getattr(parallel, key)}" for key in ("tensor", "pipeline", "context", "expert")]
    words.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline or 'null'}")
    if layout.last_stage_layers is not None:
        words.append(f"parallel.last_stage_layers={layout.last_stage_layers}")
    words.append(f"parallel.sequence={str(parallel.sequence).lower()}")
    return [*words, f"trainer.recompute={trainer.recompute}"]


def tokens_per_hour(plan: Plan) -> int:
    """Tokens of full rows in an hour, assumed."""
    return round(plan.tokens_per_step / plan.time.total * 3600)


def assumptions(plan: Plan) -> dict[str, Any]:
    """What the numbers rest on that is not known."""
    hardware = plan.hardware
    return {
        "dense_tflops": hardware.tflops,
        "mfu_while_computing": hardware.mfu,
        "gb_per_second_inside_a_machine": hardware.node_gbs,
        "gb_per_second_between_machines": hardware.network_gbs,
        "overhead": "2 GB for CUDA and 1 GB for each kind of NCCL group with more than one rank",
        "rows": "every row has trainer.seq_length tokens",
        "experts": "tokens are spread evenly over the experts",
    }


def show(plan: Plan, others: list[Plan], console: Console) -> None:
    """Print a plan, and under it other layouts where there are any."""
    from rich.markup import escape
    from rich.table import Table

    settings, layout, batch = plan.settings, plan.layout, plan.batch
    trainer = settings.trainer
    console.print(f"[bold]{escape(settings.model.hf)}[/bold]: {plan.parameters:,} parameters, {trainer.precision}")
    sequence = "on" if layout.sequence else "off"
    console.print(f"{layout.world_size} ranks = {_product(plan)}, sequence parallel {sequence}")
    console.print(
        f"{trainer.global_batch_size} rows a step = micro-batch {trainer.micro_batch_size} x DP {layout.data_parallel} "
        f"x {settings.num_micro_batches} micro-batches; {plan.tokens_per_step:,} tokens a step at "
        f"{batch.context_length} a row"
    )
    table = Table(
        title=f"GB a rank, recompute {trainer.recompute}, attention {batch.attention}, loss {plan.path}",
        title_justify="left",
    )
    for name in ("stage", "layers", "parameters", *plan.memory[0].parts, "total"):
        table.add_column(name, justify="left" if name in ("stage", "layers") else "right")
    for stages in _alike(plan):
        memory = plan.memory[stages[0]]
        table.add_row(
            _numbers(stages) + (" (fullest)" if plan.fullest in stages else ""),
            str(layout.layers_of(stages[0], plan.shape.num_hidden_layers)),
            f"{plan.stages[stages[0]].total:,}",
            *(f"{value / 1e9:.2f}" for value in memory.parts.values()),
            f"{memory.total / 1e9:.2f}",
        )
    console.print(table)
    colour = {"fits": "green", "tight": "yellow", "does not fit": "red"}[plan.verdict]
    console.print(
        f"[bold {colour}]{plan.verdict}[/bold {colour}]: {plan.peak / 1e9:.1f} of {plan.memory_bytes / 1e9:.1f} GB on "
        f"stage {plan.fullest}"
    )
    console.print(f"activations by trainer.recompute, GB: {_listed(plan.activations_by_recompute())}")
    console.print(f"logits and loss by path, GB: {_listed(plan.loss_by_path())}")
    sent = loss_collectives(plan.shape, layout, settings, batch, plan.path)
    console.print(
        "collectives of the loss, bytes a micro-batch and rank: "
        + (", ".join(f"{name} {size:,}" for name, size in sent.items()) or "none")
    )
    console.print(f"checkpoint: {plan.checkpoint_bytes / 1e9:.1f} GB")
    console.print(_speed(plan))
    if others:
        show_layouts("nearest layouts that fit", others, console)


def show_layouts(title: str, plans: list[Plan], console: Console) -> None:
    """Print layouts, best first."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("", "GPUs", "TP", "PP", "CP", "EP", "DP", "recompute", "GB", "verdict", "s a step (assumed)"):
        table.add_column(name, justify="right")
    for place, plan in enumerate(plans, start=1):
        layout = plan.layout
        numbers = (layout.world_size, layout.tensor, layout.pipeline, layout.context, layout.expert)
        table.add_row(
            str(place),
            *map(str, (*numbers, layout.data_parallel)),
            plan.settings.trainer.recompute,
            f"{plan.peak / 1e9:.1f}",
            plan.verdict,
            f"{plan.time.total:.2f}",
        )
    console.print(table)
    console.print(f"1: {' '.join(overrides(plans[0]))}", soft_wrap=True)


def _speed(plan: Plan) -> str:
    time, hardware = plan.time, plan.hardware
    parts = {
        "computing": time.compute,
        "pipeline bubble": time.bubble,
        "tensor parallel": time.tensor_parallel,
        "expert parallel": time.expert_parallel,
        "data parallel": time.data_parallel,
    }
    added = " + ".join(f"{seconds:.2f} {name}" for name, seconds in parts.items() if seconds)
    return (
        f"{model_flops(plan.shape, plan.settings, plan.batch):.3g} FLOP a step; assumed: {time.total:.2f} s a step "
        f"({added}; MFU {hardware.mfu:g} of {hardware.tflops:g} TFLOP/s while computing), "
        f"{tokens_per_hour(plan) / 1e6:,.0f} million tokens an hour"
    )


def _product(plan: Plan) -> str:
    layout = plan.layout
    text = f"TP {layout.tensor} x PP {layout.pipeline} x CP {layout.context} x DP {layout.data_parallel}"
    if layout.virtual_pipeline > 1:
        text += f", {layout.virtual_pipeline} virtual stages each"
    return text + (f", experts over {layout.expert}" if layout.expert > 1 else "")


def _alike(plan: Plan) -> list[list[int]]:
    """Stages with the same parameters and memory, together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for stage, memory in enumerate(plan.memory):
        found.setdefault((plan.stages[stage].total, *memory.parts.values()), []).append(stage)
    return list(found.values())


def _numbers(stages: list[int]) -> str:
    return str(stages[0]) if len(stages) == 1 else f"{stages[0]} to {stages[-1]}"


def _listed(sizes: Any) -> str:
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())


def _gb(sizes: Any) -> dict[str, float]:
    return {name: _one_gb(size) for name, size in sizes.items()}


def _one_gb(size: int) -> float:
    return round(size / 1e9, 6)
