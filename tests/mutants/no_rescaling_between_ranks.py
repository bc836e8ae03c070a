"""The ranks' sums are added as they are, though each is relative to its own maximum."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.records",
    right="sums[rank] * scale[rank]",
    wrong="sums[rank]",
    caught_by=("loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",),
)
