"""The search for layouts: all that train would accept, ranked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from nemo_eaft.hf_model import check_layout
from nemo_eaft.plan.batch import Attention
from nemo_eaft.plan.hardware import Hardware
from nemo_eaft.plan.plan import RECOMPUTES, Plan, changed
from nemo_eaft.plan.shape import ModelShape
from nemo_eaft.settings import Settings

_ORDER = ("fits", "tight", "does not fit")


def search(settings: Settings, shape: ModelShape, hardware: Hardware, attention: Attention | None = None) -> list[Plan]:
    """Plans of every layout of the run's ranks, best first: those that fit, then tight ones, then the others; among
    them by expected step time, and where that is within two in a hundred, by memory.

    Tensor parallelism by powers of two inside one machine, with sequence parallelism above 1; pipelines that divide the
    layers; experts by powers of two; every ``trainer.recompute``; the micro-batch, context parallelism and everything
    else as in ``settings``.
    """
    plans = [Plan(one, shape, hardware, attention) for one in _legal(settings, shape)]
    return sorted(plans, key=_rank)


def nearest(plan: Plan, count: int = 3) -> list[Plan]:
    """Layouts of the same ranks that fit and change least, then cost least; where none fits, those of the smallest
    number of machines that has one, up to 8 times as many."""
    settings = plan.settings
    for factor in (1, 2, 4, 8):
        try:
            more = changed(settings, trainer={"num_nodes": settings.trainer.num_nodes * factor})
        except ValueError:
            # Layouts of its own are tried below; only the batch must be a multiple of what more copies take.
            more = None
        found = [
            other
            for other in search(more or settings, plan.shape, plan.hardware, plan.attention)
            if other.verdict == "fits" and (factor == 1 or more is not None)
        ]
        if found:
            return sorted(found, key=lambda other: (_distance(plan, other), other.time.total))[:count]
    return []


def _rank(plan: Plan) -> tuple[int, float, int]:
    # Nearly equal times say nothing: they are made of assumptions.
    return _ORDER.index(plan.verdict), round(plan.time.total, 2), plan.peak


def _distance(one: Plan, other: Plan) -> int:
    """How many settings differ."""
    mine, others = one.settings, other.settings
    pairs = [
        (getattr(mine.parallel, key), getattr(others.parallel, key))
        for key in ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    ]
    pairs.append((mine.trainer.recompute, others.trainer.recompute))
    return sum(a != b for a, b in pairs)


def _legal(settings: Settings, shape: ModelShape) -> Iterator[Settings]:
    """Every run that train would accept."""
    world, per_node = settings.world_size, settings.trainer.gpus_per_node
    for tensor in _powers(per_node):
        if shape.intermediate_size % tensor:
            continue
        for pipeline in range(1, shape.num_hidden_layers + 1):
            if shape.num_hidden_layers % pipeline or world % (tensor * pipeline):
                continue
            for expert in _powers(shape.num_experts or 1):
                for recompute in RECOMPUTES:
                    parallel: dict[str, object] = {
                        "tensor": tensor,
                        "pipeline": pipeline,
                        "virtual_pipeline": None,
                        "expert": expert,
                        "sequence": tensor > 1,
                    }
                    try:
                        # What has no effect was said once, for the settings given.
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore", UserWarning)
                            one = changed(settings, parallel=parallel, trainer={"recompute": recompute})
                            check_layout(one, shape)
                    except ValueError:
                        continue
                    yield one


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2
