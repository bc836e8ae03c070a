"""What a mutant is, and how the package is imported with one in it."""

import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
_MACHINERY = {"__init__", "mutant", "run", "test_mutants"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One place of the package, changed."""

    module: str
    """In ``nemo_eaft``."""

    right: str
    """Source that stands in it exactly once."""

    wrong: str
    """What stands there in the mutant."""

    caught_by: tuple[str, ...]
    """Tests that must fail by a comparison, as ``file::name`` under ``tests``; of each, at least one parameter set."""


def names() -> list[str]:
    """Every mutant: the other files of this folder."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in _MACHINERY)


def load(name: str) -> Mutant:
    mutant = importlib.import_module(f"tests.mutants.{name}").MUTANT
    assert isinstance(mutant, Mutant)
    return mutant


def install(mutant: Mutant) -> None:
    """Every later import of the package in this process is of the mutant."""
    assert "nemo_eaft" not in sys.modules, "the package is imported already"
    sys.meta_path.insert(0, _Finder(mutant))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module of the package from a changed source."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != f"nemo_eaft.{self._mutant.module}":
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        self._origin = found.origin
        return importlib.util.spec_from_loader(fullname, self, origin=found.origin)

    def exec_module(self, module: ModuleType) -> None:
        source = changed(self._mutant, Path(self._origin).read_text())
        exec(compile(source, self._origin, "exec"), module.__dict__)


def changed(mutant: Mutant, source: str) -> str:
    """The module's source with the wrong line in it."""
    times = source.count(mutant.right)
    assert times == 1, f"{mutant.right!r} stands {times} times in {mutant.module}"
    return source.replace(mutant.right, mutant.wrong)
