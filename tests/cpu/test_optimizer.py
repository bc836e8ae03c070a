"""Megatron's distributed optimizer with torch's AdamW: saved and loaded, it goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eaft.megatron import unwrap
from tests.cpu import models
from tests.nemo.ranks import run_ranks

METADATA = {
    "dp_reshardable": {"distrib_optim_sharding_type": "dp_reshardable"},
    "fully_reshardable": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    },
}


def build(half: bool) -> tuple[Any, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if half else torch.float32
    config = models.config(bf16=half, params_dtype=dtype, pipeline_dtype=dtype)
    core = models.gpt(config)
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        Float16Module(config, core) if half else core,
    )
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, bf16=half, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
    )
    return ddp, get_megatron_optimizer(settings, [ddp])


def _core(model: Any) -> Any:
    return unwrap(model)


def step(model: Any, optimizer: Any, number: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    model.zero_grad_buffer()
    optimizer.zero_grad()
    data = models.batch(seed=10 * number + parallel_state.get_data_parallel_rank())
    data.forward(model).sum().backward()
    finalize_model_grads([model])
    optimizer.step()


def state(model: Any, optimizer: Any) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inner = optimizer.chained_optimizers[0].optimizer
    for index, moments in enumerate(inner.state.values()):
        found |= {f"{index} {name}": value.clone() for name, value in moments.items()}
    return found


def interrupted(folder: Path, half: bool, sharding: str, steps: int, shared: bool = False) -> dict[str, Any]:
    """Train, and train again from the checkpoint in the middle. shared: the wrong variant, one `step` for all."""
    from megatron.core import dist_checkpointing

    models.start()
    model, optimizer = build(half)
    for number in range(2 * steps):
        step(model, optimizer, number)
        if number == steps - 1:
            shards = _core(model).sharded_state_dict()
            saved = {"model": shards, "optimizer": optimizer.sharded_state_dict(shards, metadata=METADATA[sharding])}
            dist_checkpointing.save(saved, str(folder))
    undisturbed = state(model, optimizer)

    model, optimizer = build(half)
    shards = _core(model).sharded_state_dict()
    asked = {
        "model": shards,
        "optimizer": optimizer.sharded_state_dict(shards, is_loading=True, metadata=METADATA[sharding]),
    }
    loaded = dist_checkpointing.load(asked, str(folder))
    _core(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    if shared:
        inner = optimizer.chained_optimizers[0].optimizer
        (first, *others) = inner.state.values()
        for moments in others:
            moments["step"] = first["step"]
    for number in range(steps, 2 * steps):
        step(model, optimizer, number)
    resumed = state(model, optimizer)
    assert undisturbed.keys() == resumed.keys()
    return {
        "different": [name for name in resumed if not torch.equal(resumed[name], undisturbed[name])],
        "counted": sorted({float(value) for name, value in resumed.items() if name.endswith("step")}),
        "moments": sum("exp_avg" in name for name in resumed),
    }


@pytest.mark.parametrize(
    "half, sharding", [(False, "dp_reshardable"), (True, "dp_reshardable"), (True, "fully_reshardable")]
)
def test_a_resumed_distributed_optimizer_is_the_undisturbed_one(half: bool, sharding: str, tmp_path: Path) -> None:
    for found in run_ranks(interrupted, 2, tmp_path, half, sharding, 3):
        assert found["different"] == []
        assert found["counted"] == [6.0]
        assert found["moments"] > 0


def test_one_step_counter_for_all_would_be_seen(tmp_path: Path) -> None:
    """What Megatron leaves after loading, without the backend's patch: AdamW advances it once a parameter."""
    for found in run_ranks(interrupted, 2, tmp_path, True, "dp_reshardable", 3, True):
        assert found["different"]
        assert found["counted"] != [6.0]
