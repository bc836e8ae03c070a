"""The ranks' maxima are added instead of compared."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.records",
    right="maximum = maxima.amax(dim=0)",
    wrong="maximum = maxima.sum(dim=0)",
    caught_by=("loss/test_numbers.py::test_extreme_logits",),
)
