"""Probabilities are rounded to the logits' dtype before they are weighed."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.gradient",
    right="values = torch.mul(probability, (scale",
    wrong="values = torch.mul(probability.copy_(probability.to(block.dtype)), (scale",
    caught_by=(
        "loss/test_numbers.py::test_low_precision_is_float32_of_the_same_values",
        "loss/test_low_precision.py::test_every_cut_of_the_logits",
    ),
)
