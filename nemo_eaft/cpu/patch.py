"""Replacing an attribute of an upstream library, reversibly and with a reason.

Every change that the CPU backend makes to torch, Megatron-Core or NeMo is one `Patch`: what is replaced, by what, and
which upstream assumption it answers. Applying a patch whose target does not exist is an error, because then upstream
has changed and the assumption has to be read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One replaced attribute.

    owner: module or class that holds the attribute.
    name: the attribute.
    value: what stands there while the CPU backend is on.
    reason: upstream file, version and assumption that this answers.
    """

    owner: Any
    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        owner = getattr(self.owner, "__qualname__", None) or getattr(self.owner, "__name__", repr(self.owner))
        return f"{owner}.{self.name}: {self.reason}"


class PatchSet:
    """Patches that were applied, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[Patch, Any]] = []

    @property
    def applied(self) -> list[Patch]:
        """The patches now in force, oldest first."""
        return [patch for patch, _ in self._undo]

    def apply(self, patches: list[Patch]) -> None:
        """Apply `patches` in order. RuntimeError names the first target that upstream no longer has."""
        for patch in patches:
            if not hasattr(patch.owner, patch.name):
                raise RuntimeError(f"The CPU backend expects an attribute that is not there: {patch}")
            # vars(), not getattr: an inherited attribute must be deleted again, and a staticmethod kept as one.
            self._undo.append((patch, vars(patch.owner).get(patch.name, _MISSING)))
            setattr(patch.owner, patch.name, patch.value)

    def undo(self) -> None:
        """Put back what stood there before `apply`."""
        while self._undo:
            patch, before = self._undo.pop()
            if before is _MISSING:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, before)
