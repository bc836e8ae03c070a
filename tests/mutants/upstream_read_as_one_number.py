"""The first token's upstream gradient is taken for all."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.gradient",
    right="weight * grad_loss.flatten()",
    wrong="weight * grad_loss.flatten()[0]",
    caught_by=("loss/test_autograd.py::test_the_loss_need_not_be_the_last_operation",),
)
