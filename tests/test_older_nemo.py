"""What NeMo 2.5 lacks, with stand-ins for its strategy: their signatures as in 2.5.0 and in 2.6.0."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_eaft.train import _reshardable


class Strategy25:
    def __init__(self, ckpt_parallel_save_optim: bool = True, **kwargs: Any) -> None:
        """What it does not know goes to torch's DDP."""


class Strategy26:
    def __init__(
        self,
        ckpt_optim_fully_reshardable: bool = False,
        distrib_optim_fully_reshardable_mem_efficient: bool = False,
        **kwargs: Any,
    ) -> None: ...


NAMES = ["ckpt_optim_fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient"]


@pytest.mark.parametrize("strategy, given", [(Strategy25, []), (Strategy26, NAMES)])
def test_only_what_the_strategy_knows_is_given(strategy: type, given: list[str]) -> None:
    """A resume on another layout with the real one, of 2.7.3: nemo/test_resume_layouts.py."""
    assert _reshardable(strategy) == dict.fromkeys(given, True)
