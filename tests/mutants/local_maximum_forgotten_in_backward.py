"""Backward takes the shard's maximum for that of the row."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.gradient",
    right="(local_maximum - maximum).sub_(log_sum)",
    wrong="(-log_sum)",
    caught_by=("loss/test_autograd.py::test_the_local_gradient_is_the_slice_of_the_full_one",),
)
