"""GLM-4-0414 is Hugging Face's, on one rank and on several, and goes back."""

from typing import Any

import pytest
import torch

from tests.nemo import jobs
from tests.nemo.conftest import Workshop
from tests.nemo.ranks import run_ranks

MODELS: dict[str, dict[str, Any]] = {"bias, as the 9B": {}, "no bias, as the 32B": {"bias": False}}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(workshop: Workshop, name: str) -> None:
    changes = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 250, (3, 40), generator=generator)
    with torch.no_grad():
        expected = workshop.model("glm4", **changes)(input_ids=tokens).logits
    (logits,) = run_ranks(jobs.nemo_logits, 1, workshop.nemo("glm4", **changes), tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
