"""Which NeMo and Megatron-Core the adapters were written for; checked where this is imported, which is
before the rest of them."""

from __future__ import annotations

from importlib import import_module

# module: (package, oldest, first that is too new, tested)
_RANGES = {
    "nemo": ("nemo_toolkit", "2.5", "3.0", "2.7.3"),
    "megatron.core": ("megatron-core", "0.14", "0.17", "0.15.3"),
}


def check_versions() -> None:
    """Raise one sentence before an import fails somewhere inside NeMo.

    Raises:
        ImportError: NeMo or Megatron-Core is not installed, or is of a version that cannot work.
    """
    for module, (package, oldest, too_new, tested) in _RANGES.items():
        wanted = f"nemo_eaft.nemo needs {package} {oldest} or later and below {too_new} (tested with {tested})"
        try:
            found = import_module(module).__version__
        except ImportError as error:
            raise ImportError(f"{wanted}, which cannot be imported: {error}. pip install 'nemo_eaft[nemo]'") from error
        if not _numbers(oldest) <= _numbers(found) < _numbers(too_new):
            raise ImportError(f"{wanted}, found {found}")


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers: 2.7.3 -> (2, 7), 0.15.0rc7 -> (0, 15)."""
    return tuple(int(part) for part in version.split(".")[:2])


check_versions()
