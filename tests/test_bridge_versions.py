"""What differs between versions of Megatron-Bridge, with stand-ins for it. The real one, 0.3.1: tests/bridge/."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.examples import load_example


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """`nemo_eaft.bridge` and what the example imports of Bridge; the recipe is of `recipe`."""

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    training = "megatron.bridge.training"
    for name in ("megatron.bridge", "megatron.bridge.recipes"):
        module(name)
    module(training, gpt_step=None)
    module("megatron.bridge.recipes.qwen", qwen3_8b_sft_config=None)
    module(f"{training}.checkpointing", checkpoint_exists=lambda path: True)
    module(f"{training}.config", ConfigContainer=object, FinetuningDatasetConfig=SimpleNamespace)
    module(f"{training}.finetune", finetune=None)
    yield importlib.import_module("nemo_eaft.bridge")
    del sys.modules["nemo_eaft.bridge"]


def container(*names: str) -> Any:
    """A configuration with these parts, and a hook that is taken."""
    model = SimpleNamespace(register_pre_wrap_hook=lambda hook: None)
    return SimpleNamespace(model=model, **{name: SimpleNamespace() for name in names})


@pytest.mark.parametrize("new", [False, True])
def test_validation_is_set_where_the_version_has_it(
    bridge: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new: bool
) -> None:
    """Since 0.4 in cfg.validation; what is set in cfg.train is deprecated there."""
    cfg = container("train", "checkpoint", "logger", "ddp", *(["validation"] if new else []))
    example = load_example("bridge_finetune")
    monkeypatch.setattr(example, "recipe", lambda: cfg)
    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", "c", "--data", str(tmp_path), "--steps", "7"])
    example.configuration()
    where = cfg.validation if new else cfg.train
    assert (where.eval_interval, where.eval_iters, cfg.checkpoint.save_interval) == (7, 1, 7)
    assert hasattr(cfg.train, "eval_iters") != new


SCOPES = [
    "full_iteration",
    "attn,full_iteration",
    ["full_iteration"],
    ["attn", SimpleNamespace(name="full_iteration")],
]


@pytest.mark.parametrize("scope", [*SCOPES, "full", "attn", None, [], ["attn"]])
def test_a_graph_of_the_whole_step_is_refused_however_it_is_said(bridge: types.ModuleType, scope: Any) -> None:
    """Megatron-Core 0.15 has a string there, later ones a list."""
    config = SimpleNamespace(
        calculate_per_token_loss=True,
        cuda_graph_impl="local",
        cuda_graph_scope=scope,
        virtual_pipeline_model_parallel_size=None,
        cross_entropy_loss_fusion=False,
    )
    if scope not in SCOPES:
        bridge._check_config(config, False)
        return
    with pytest.raises(ValueError, match=r"cfg\.model\.cuda_graph_scope: full_iteration"):
        bridge._check_config(config, False)
