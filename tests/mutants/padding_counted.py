"""Columns beyond the true vocabulary take part."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.shard",
    right="min(max(vocab_size - first, 0), vp_width)",
    wrong="vp_width",
    caught_by=("loss/test_numbers.py::test_padding_columns_are_excluded_whatever_they_hold",),
)
