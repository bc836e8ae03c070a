"""A label at the first column of a shard is taken for another rank's."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.shard",
    right="(local >= 0)",
    wrong="(local > 0)",
    caught_by=("loss/test_numbers.py::test_vocabularies_that_fit_nothing",),
)
