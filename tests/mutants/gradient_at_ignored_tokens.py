"""Rows that do not count keep what arithmetic left in their gradient."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.gradient",
    right="clear_rows(values, target == IGNORED)",
    wrong="pass",
    caught_by=("loss/test_numbers.py::test_what_is_at_a_masked_token_reaches_nothing",),
)
