"""The gradient is multiplied by the ranks, as a differentiable all-reduce of two would."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.gradient",
    right="weight * grad_loss.flatten()",
    wrong="2 * weight * grad_loss.flatten()",
    caught_by=("loss/test_autograd.py::test_the_local_gradient_is_the_slice_of_the_full_one",),
)
