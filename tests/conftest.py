"""What every test gets: poisoned empty tensors, restored defaults, no process group left behind."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

from tests.harness import poisoned_empty

# The same examples in every run: a failure can be repeated, and a slow machine fails nothing.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "unpoisoned: let torch.empty of the package return what memory holds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rows of more than four ranks run only where they are asked for by their mark."""
    if "matrix" in config.option.markexpr:
        return
    large = [item for item in items if item.get_closest_marker("matrix") is not None]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("unpoisoned") is not None:
        yield
        return
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def _restore_defaults() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    group_before = dist.is_initialized()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if dist.is_initialized() and not group_before:
        dist.destroy_process_group()
