"""The gradient is written over the caller's logits without being asked to."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="if ctx.inplace_backward:\n            ctx.overwritten",
    wrong="if True:\n            ctx.overwritten",
    caught_by=("loss/test_autograd.py::test_inputs_are_never_written",),
)
