"""The shard's sum of exponentials is that of its softmax, which is always 1."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.records",
    right="probability.sum(dim=-1).div_(peak)",
    wrong="probability.sum(dim=-1)",
    caught_by=("loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",),
)
