"""Which code makes the two passes over the logits: Triton on a GPU, PyTorch on a CPU.

``NEMO_EAFT_BACKEND`` forces one: ``torch``, ``triton``, or ``reference`` (whole rows in plain autograd, one
process only). A choice that cannot run is an error; nothing falls back to another one.
"""

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eaft.loss import gradient, records
from nemo_eaft.loss.shard import Shard

VARIABLE = "NEMO_EAFT_BACKEND"
_NAMES = ("reference", "torch", "triton")
_SENTENCES = {
    "reference": "the reference formulas in plain autograd",
    "torch": "the PyTorch path",
    "triton": "the Triton kernels",
}

_log = logging.getLogger("nemo_eaft")
_said: set[tuple[str, str]] = set()


class Backend(NamedTuple):
    """The two passes; both see this rank's shard alone and communicate nothing."""

    local_records: Callable[[Tensor, Tensor, Shard, int | None], Tensor]
    """Forward: as ``records.local_records``."""

    write_gradient: Callable[[Tensor, Tensor, Tensor, Shard, Tensor, Tensor, Tensor], None]
    """Backward: as ``gradient.write_gradient``."""


TORCH = Backend(records.local_records, gradient.write_gradient)


def backend_name(device: torch.device) -> str:
    """``triton`` for CUDA tensors, ``torch`` for others, or what the environment variable forces; logged once
    for each kind of device.

    Raises:
        ValueError: an unknown name; ``triton`` for a CPU tensor without ``TRITON_INTERPRET=1``.
        RuntimeError: Triton is to run and cannot be imported.
    """
    forced = os.environ.get(VARIABLE)
    if forced is not None and forced not in _NAMES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(_NAMES)}, got {forced!r}")
    name = forced or ("triton" if device.type == "cuda" else "torch")
    if name == "triton":
        _check_triton(device)
    if (name, device.type) not in _said:
        _said.add((name, device.type))
        because = f"forced by {VARIABLE}" if forced else "the default there"
        _log.info("EAFT loss on %s: %s (%s)", device.type, _SENTENCES[name], because)
    return name


def passes(name: str) -> Backend:
    """The passes of ``torch`` or ``triton``."""
    if name == "triton":
        from nemo_eaft.loss import kernels

        return Backend(kernels.local_records, kernels.write_gradient)
    assert name == "torch", name
    return TORCH


def _check_triton(device: torch.device) -> None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{VARIABLE}=triton needs a GPU, got tensors on the CPU; with TRITON_INTERPRET=1, set before Python "
            f"starts, the interpreter runs the kernels there, slowly"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"the loss of {device.type} tensors runs in Triton, which is not installed ({error}); pip install triton, "
            f"or set {VARIABLE}=torch for the slower PyTorch path"
        ) from error
