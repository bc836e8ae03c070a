"""The all-gather of the records is skipped: each rank has the loss of its own shard."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="all_gather_records(backend.local_records(logits, target, shard, top_k), group)",
    wrong="all_gather_records(backend.local_records(logits, target, shard, top_k), None)",
    caught_by=(
        "loss/test_invariants.py::test_loss_and_weight_are_the_same_bits_on_every_rank",
        "loss/test_invariants.py::test_one_collective_forward_none_backward_whatever_the_values",
    ),
)
