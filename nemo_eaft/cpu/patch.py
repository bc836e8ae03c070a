"""Replacing an attribute of an upstream library, or adding one that it forgot, reversibly and with a reason.

Every change that the CPU backend makes to torch, Megatron-Core or NeMo is one `Patch`: what is replaced, by what, and
which upstream assumption it answers. Applying a patch whose target does not exist is an error, because then upstream
has changed and the assumption has to be read again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One replaced attribute, or one added.

    owner: module or class that holds the attribute.
    name: the attribute.
    value: what stands there while the CPU backend is on.
    reason: upstream file, version and assumption that this answers.
    adds: the attribute must not be there yet.
    """

    owner: Any
    name: str
    value: Any
    reason: str
    adds: bool = False

    def __str__(self) -> str:
        owner = getattr(self.owner, "__qualname__", None) or getattr(self.owner, "__name__", repr(self.owner))
        return f"{owner}.{self.name}: {self.reason}"


class PatchSet:
    """Patches that were applied, undone in reverse order."""

    def __init__(self) -> None:
        # Patch, what vars() of the owner held, and what a reader of the attribute got.
        self._undo: list[tuple[Patch, Any, Any]] = []

    @property
    def applied(self) -> list[Patch]:
        """The patches now in force, oldest first."""
        return [patch for patch, _, _ in self._undo]

    def apply(self, patches: list[Patch]) -> None:
        """Apply `patches` in order.

        Raises:
            RuntimeError: upstream no longer has one of the targets, or has one that was to be added; it is named, and
                none of `patches` is applied.
        """
        for patch in patches:
            if hasattr(patch.owner, patch.name) == patch.adds:
                there = "expects no attribute that is there" if patch.adds else "expects an attribute that is not there"
                raise RuntimeError(f"The CPU backend {there}: {patch}")
        for patch in patches:
            # vars(), not getattr: an inherited attribute must be deleted again, and a staticmethod kept as one.
            before = vars(patch.owner).get(patch.name, _MISSING)
            self._undo.append((patch, before, getattr(patch.owner, patch.name, _MISSING)))
            setattr(patch.owner, patch.name, patch.value)

    def bypassed(self, packages: tuple[str, ...]) -> list[str]:
        """Call sites that a patch does not reach, in the loaded modules of `packages`.

        A module that ran `from owner import name` before the patch holds the original, and would go on calling it.
        """
        # True, None and numbers are the same object everywhere.
        originals = {id(seen): patch for patch, _, seen in self._undo if callable(seen)}
        found = []
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] not in packages:
                continue
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in originals:
                    found.append(f"{module_name}.{name} (replaced in {originals[id(value)]})")
        return sorted(found)

    def undo(self) -> None:
        """Put back what stood there before `apply`."""
        while self._undo:
            patch, before, _ = self._undo.pop()
            if before is _MISSING:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, before)
