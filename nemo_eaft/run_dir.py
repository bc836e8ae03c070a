"""Whose a ``run.dir`` is: its ``config.yaml``, and what may change when its run goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_eaft import compose
from nemo_eaft.atomic import numbered, replacing
from nemo_eaft.checkpoints import checkpoints_in, dangling
from nemo_eaft.data.prepare import source_changes
from nemo_eaft.settings import Settings, known_keys
from nemo_eaft.settings_mapping import difference

CONFIG = "config.yaml"
"""File in ``run.dir`` with every setting of the run."""

MAY_DIFFER = (
    "run.resume",
    "run.name",
    "run.wandb_project",
    "run.max_restarts",
    "run.stall_seconds",
    "run.save_seconds",
    "trainer.log_every",
    "trainer.histogram_every",
    "trainer.keep_checkpoints",
    "data.num_workers",
)
"""Settings that may change when a run goes on: none of them touches a number."""

LAYOUT = (
    "loss.fused_linear",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.last_stage_layers",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.sequence",
    "trainer.num_nodes",
    "trainer.gpus_per_node",
    "trainer.micro_batch_size",
    "trainer.recompute",
)
"""Settings that may change as well: the same rows give the same steps but for rounding, however the work is cut."""

FIXED = ("trainer.precision", "trainer.distributed_optimizer")
"""Settings that a run keeps, whatever is allowed: they decide what the optimizer's state is made of."""


def check_place(folder: Path) -> None:
    """Refuse a ``run.dir`` that is a file, or a link to nothing."""
    link = dangling(folder)
    if link is not None:
        raise ValueError(f"run.dir={folder}: {link} is a link to {os.readlink(link)}, which is not there")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.dir={folder} is a file")


def check_run_dir(settings: Settings, allow_change: bool = False) -> list[str]:
    """Refuse a ``run.dir`` that belongs to another run.

    Args:
        settings: the run.
        allow_change: take a folder of another configuration, but for what a checkpoint cannot follow.

    Returns:
        The settings that differ, one line each; empty unless ``allow_change``.

    Raises:
        ValueError: with the settings that differ.
    """
    folder = Path(settings.run.dir)
    check_place(folder)
    checkpoints = checkpoints_in(folder)
    different: list[str] = []
    if (folder / CONFIG).is_file():
        old = compose.load(folder / CONFIG)
        different = difference(old, settings, ignore=(*MAY_DIFFER, *LAYOUT))
        fixed = difference(old, settings, ignore=[key for key in known_keys() if key not in FIXED])
        if checkpoints and fixed and allow_change:
            listed = "\n  ".join(fixed)
            raise ValueError(
                f"run.dir={folder} holds checkpoints whose optimizer state is of another form; choose another run.dir, "
                f"or go back to these settings (--allow-config-change cannot change them):\n  {listed}"
            )
        if different and not allow_change:
            listed = "\n  ".join(different)
            raise ValueError(
                f"run.dir={folder} holds a run with another configuration; choose another run.dir, go back to its "
                f"settings, or accept the change with --allow-config-change:\n  {listed}"
            )
    elif checkpoints:
        raise ValueError(f"run.dir={folder} holds checkpoints but no {CONFIG}: it is not known what they belong to")
    if checkpoints and not settings.run.resume:
        raise ValueError(
            f"run.resume=false, but run.dir={folder} holds checkpoints: choose another run.dir, or run.resume=true"
        )
    return different


def check_data(settings: Settings, tokenizer: Any, allow_change: bool) -> list[str]:
    """Refuse rows or a tokenizer that changed since the run's checkpoints were made, under the same names or others.

    Returns:
        What changed, one line each; empty unless ``allow_change``.

    Raises:
        ValueError: naming the files.
    """
    changed = source_changes(settings, tokenizer)
    if changed and not allow_change:
        listed = "\n  ".join(changed)
        raise ValueError(
            f"run.dir={settings.run.dir} holds checkpoints of a run on other data; choose another run.dir, put the "
            f"files back, or accept the change with --allow-config-change:\n  {listed}"
        )
    return changed


def save_config(settings: Settings) -> None:
    """Write ``config.yaml``; another one that was there is kept as ``config.<number>.yaml``, the oldest being 1."""
    path = Path(settings.run.dir) / CONFIG
    if path.is_file() and compose.load(path) != settings:
        with replacing(numbered(path)) as temporary:
            temporary.write_bytes(path.read_bytes())
    compose.save(settings, path)
