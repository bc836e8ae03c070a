"""A logit of -Inf brings 0 * -Inf to the entropy."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.records",
    right="return shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(",
    wrong="return shifted.mul_(",
    caught_by=("loss/test_numbers.py::test_minus_inf_at_some_columns",),
)
