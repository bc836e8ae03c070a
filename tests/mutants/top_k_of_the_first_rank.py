"""Every rank takes the K largest logits of the first rank's shard: the same bits everywhere, and wrong."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.records",
    right="for rank in range(ranks)], dim=-1)",
    wrong="for rank in [0]], dim=-1)",
    caught_by=("loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",),
)
