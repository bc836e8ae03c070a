"""The entropy is divided by 3.0, as in the authors' code, and not by ln K."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="config.entropy_normalizer(vocab_size)",
    wrong="3.0",
    caught_by=("loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",),
)
