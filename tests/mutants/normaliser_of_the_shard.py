"""The entropy of the whole vocabulary is divided by the logarithm of a shard's."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="out = weigh(statistics, target, config, shard.vocab_size)",
    wrong="out = weigh(statistics, target, config, max(shard.columns, 2))",
    caught_by=("loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",),
)
