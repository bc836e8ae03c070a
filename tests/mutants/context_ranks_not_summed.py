"""The sums of a step are those of one rank: the all-reduce over data and context ranks is skipped."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.collectives",
    right="    if data_group is not None:\n",
    wrong="    if data_group is None:\n",
    caught_by=("loss/test_context_parallel.py::test_sums_count_and_gradient_are_the_uncut_ones",),
)
