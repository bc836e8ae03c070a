"""Real NeMo and real Megatron-Core on a machine with no GPU.

`enable()` makes CUDA assumptions of the upstream libraries mean the CPU, one commented patch for each (see
`torch_cuda.py`, `megatron_patches.py`, `nemo_patches.py`), and gives Megatron's local layer specification what it
lacks: a norm for sequence parallelism and attention over packed sequences. Collectives run on gloo. Nothing else in
nemo_eaft knows about this package. With `meta.py` models are built, but not run, without memory.

    import nemo_eaft.cpu
    nemo_eaft.cpu.enable()      # before NeMo or Megatron-Core is imported
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys

from nemo_eaft.cpu.patch import Patch, PatchSet

_APPLIED = PatchSet()
_WAS_ENABLED = False

MEGATRON_VERSION = "0.15"
NEMO_VERSION = "2.7"

_PATCHED_PACKAGES = ("megatron", "nemo")


def is_enabled() -> bool:
    """Whether the patches are in force in this process."""
    return bool(_APPLIED.applied)


def applied_patches() -> list[Patch]:
    """The patches in force, oldest first; each says which upstream assumption it answers."""
    return _APPLIED.applied


def unusable() -> str:
    """Why `enable` would refuse the installed packages, in a few words; empty if nothing is known. Imports none.

    For who starts another process that enables it, and wants to say so before.
    """
    for module, name in (("transformer_engine", "Transformer Engine"), ("apex", "Apex")):
        if importlib.util.find_spec(module) is not None:
            return f"{name} is installed"
    for package, written_for in (("nemo_toolkit", NEMO_VERSION), ("megatron-core", MEGATRON_VERSION)):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not found.startswith(f"{written_for}."):
            return f"{package} is {found}, not {written_for}"
    return ""


def enable() -> None:
    """Let NeMo and Megatron-Core import, train, save, resume and convert on the CPU of this process.

    A second call does nothing. `disable` undoes it.

    Raises:
        RuntimeError: a CUDA device is available; NeMo or Megatron-Core was imported before the first call (they take
            some of the patched names by value); their version is not one this was written for; Transformer Engine or
            Apex is installed, which they would prefer to their plain layers; or a call site of theirs is not reached
            by its patch. Nothing is patched then.
    """
    global _WAS_ENABLED
    if is_enabled():
        return
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            "nemo_eaft.cpu.enable(): a CUDA device is available. The CPU backend is for machines without one; "
            "set run.backend=cuda, or hide the devices with CUDA_VISIBLE_DEVICES=''."
        )
    early = [name for name in ("megatron.core", "nemo") if name in sys.modules]
    if early and not _WAS_ENABLED:
        raise RuntimeError(
            f"nemo_eaft.cpu.enable() must run before {' and '.join(early)} is imported: "
            "put it at the top of the script."
        )

    from nemo_eaft.cpu import torch_cuda

    try:
        _APPLIED.apply(torch_cuda.patches())
        # Imported only now: they read torch.cuda names while they load.
        from nemo_eaft.cpu import megatron_patches, nemo_patches

        _APPLIED.apply(megatron_patches.patches())
        _APPLIED.apply(nemo_patches.patches())
        _check_call_sites()
    except BaseException:
        _APPLIED.undo()
        raise
    _WAS_ENABLED = True
    if os.environ.get("RANK", "0") == "0":
        print("nemo_eaft: CPU backend on (real NeMo and Megatron-Core, gloo, no GPU)", file=sys.stderr, flush=True)


def disable() -> None:
    """Undo `enable`. Objects that were built meanwhile keep what they were built with."""
    _APPLIED.undo()


def _check_call_sites() -> None:
    """What upstream calls must be ours: a patch that nobody reaches would be a silent wrong result."""
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if transformer_block.LayerNormImpl is not WrappedTorchNorm:
        raise RuntimeError(
            f"nemo_eaft.cpu.enable(): Megatron-Core chose {transformer_block.LayerNormImpl.__name__} as its norm, "
            "because Transformer Engine or Apex is installed; both need a GPU. Uninstall them where there is none."
        )
    bypassed = _APPLIED.bypassed(_PATCHED_PACKAGES)
    if bypassed:
        raise RuntimeError(f"nemo_eaft.cpu.enable(): not reached by the CPU backend: {'; '.join(bypassed)}")
