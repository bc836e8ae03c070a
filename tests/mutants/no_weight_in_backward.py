"""The gradient is that of the plain cross-entropy."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.gradient",
    right="weight * grad_loss.flatten()",
    wrong="grad_loss.flatten()",
    caught_by=(
        "loss/test_autograd.py::test_the_local_gradient_is_the_slice_of_the_full_one",
        "loss/test_autograd.py::test_the_weight_is_a_constant_for_autograd",
    ),
)
