"""The search for layouts: all that train would accept, ranked."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

from nemo_eaft.hf_model import check_layout
from nemo_eaft.plan.batch import Attention, MicroBatch
from nemo_eaft.plan.hardware import Hardware
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.plan import RECOMPUTES, Plan, changed
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.settings import Settings

_ORDER = ("fits", "tight", "does not fit")


def search(
    settings: Settings,
    shape: ModelShape,
    hardware: Hardware,
    attention: Attention | None = None,
    machines: tuple[int, int] | None = None,
) -> list[Plan]:
    """Plans of every layout, best first: those that fit, then tight ones, by expected step time in hundredths of a
    second and then by memory; then the others, by memory.

    Tensor parallelism by powers of two inside one machine, with sequence parallelism above 1; pipelines that divide the
    layers or leave fewer to the last stage, not interleaved; experts by powers of two; ``trainer.recompute`` none and
    full, and selective where attention keeps scores. All else is as in ``settings``.

    machines: number of machines and GPUs in each; None: the run's.
    """
    nodes, per_node = machines or (settings.trainer.num_nodes, settings.trainer.gpus_per_node)
    attention = attention or MicroBatch.of(settings, Layout.of(settings)).attention
    recomputes = [name for name in RECOMPUTES if name != "selective" or attention == "unfused"]
    runs = _legal(settings, shape, nodes, per_node, recomputes)
    return sorted((Plan(run, shape, hardware, attention) for run in runs), key=_rank)


def nearest(plan: Plan, count: int = 3) -> list[Plan]:
    """Layouts of the same ranks that fit, those that change least first and the faster of equals; where none fits,
    those of twice, four or eight times as many machines."""
    trainer = plan.settings.trainer
    for factor in (1, 2, 4, 8):
        machines = (trainer.num_nodes * factor, trainer.gpus_per_node)
        plans = search(plan.settings, plan.shape, plan.hardware, plan.attention, machines)
        found = [other for other in plans if other.verdict == "fits"]
        if found:
            return sorted(found, key=lambda other: (_distance(plan, other), other.time.total))[:count]
    return []


def _rank(plan: Plan) -> tuple[int, float, int]:
    place = _ORDER.index(plan.verdict)
    # Nearly equal times say nothing: they are made of assumptions.
    return place, round(plan.time.total, 2) if plan.verdict != "does not fit" else 0.0, plan.peak


def _distance(one: Plan, other: Plan) -> int:
    """How many settings differ."""
    pairs = [
        (getattr(one.layout, key), getattr(other.layout, key))
        for key in ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    ]
    pairs.append((one.settings.trainer.recompute, other.settings.trainer.recompute))
    return sum(a != b for a, b in pairs)


def _legal(
    settings: Settings, shape: ModelShape, nodes: int, per_node: int, recomputes: list[str]
) -> Iterator[Settings]:
    """Every run that train would accept."""
    experts = _powers(shape.num_experts or 1)
    stages = _stages(shape.num_hidden_layers)
    for tensor, (pipeline, last), expert in itertools.product(_powers(per_node), stages, experts):
        parallel: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": None, "expert": expert}
        parallel["last_stage_layers"] = last
        for recompute in recomputes:
            try:
                run = changed(
                    settings,
                    parallel=parallel | {"sequence": tensor > 1},
                    trainer={"num_nodes": nodes, "gpus_per_node": per_node, "recompute": recompute},
                )
                # What it warns of is the same for every layout: the caller says it once.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    check_layout(run, shape)
            except ValueError:
                continue
            yield run


def _stages(layers: int) -> list[tuple[int, int | None]]:
    """Numbers of stages, and layers of the last one where it has fewer than the others: the divisors of ``layers``, and
    powers of two that leave the last stage with at least half of the others' layers."""
    found: list[tuple[int, int | None]] = [(number, None) for number in range(1, layers + 1) if layers % number == 0]
    for number in _powers(layers)[1:]:
        each = -(-layers // number)
        last = layers - each * (number - 1)
        if layers % number and 2 * last >= each:
            found.append((number, last))
    return found


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length())]
