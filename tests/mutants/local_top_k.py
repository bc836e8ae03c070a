"""Each rank takes the K largest logits of its own shard, so that ranks weigh a token differently, in silence."""

from tests.mutants.mutant import Mutant

MUTANT = Mutant(
    module="loss.vocab_parallel",
    right="statistics = merge_records(records, top_k)\n",
    wrong="statistics = merge_records(records, top_k)._replace(entropy=merge_records("
    "backend.local_records(logits, target, shard, top_k).unsqueeze(0), top_k).entropy)\n",
    caught_by=(
        "loss/test_invariants.py::test_loss_and_weight_are_the_same_bits_on_every_rank",
        "loss/test_vocab_parallel.py::test_every_gate_at_every_size_is_the_formula",
    ),
)
