"""Every shard but the first begins one column late."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.shard",
    right="first = rank * vp_width",
    wrong="first = rank * vp_width + min(rank, 1)",
    caught_by=("loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",),
)
