"""NaN becomes 0 on the way to the loss."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.records",
    right="return RowStatistics(maximum, log_sum, cross_entropy, entropy)",
    wrong="return RowStatistics(maximum, log_sum, cross_entropy.nan_to_num(), entropy.nan_to_num())",
    caught_by=("loss/test_numbers.py::test_not_finite_at_a_counted_token_is_nan_on_every_rank",),
)
