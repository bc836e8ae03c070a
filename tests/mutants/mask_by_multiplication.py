"""Tokens that do not count are multiplied by 0, which leaves NaN what it is."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="torch.where(target != IGNORED, value, 0.0)",
    wrong="(value * (target != IGNORED))",
    caught_by=("loss/test_numbers.py::test_what_is_at_a_masked_token_reaches_nothing",),
)
