"""The gradient of padding columns is whatever memory held."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.rows",
    right="        self._flat[start:stop, columns:] = 0\n",
    wrong="",
    caught_by=("loss/test_numbers.py::test_padding_columns_are_excluded_whatever_they_hold",),
)
