"""Supervised fine-tuning with plain Megatron-LM (core_r0.15): its pretrain_gpt.py with the EAFT loss.

    export PYTHONPATH=/opt/megatron-lm      # where pretrain_gpt.py lies
    torchrun --nproc-per-node 8 examples/megatron_lm.py --calculate-per-token-loss \\
        --vocab-size 151936 --padded-vocab-size 151936 ...

with Megatron-LM's own arguments for model, data, parallelism and checkpoints. EAFT is the line marked below.
The two sizes are those of Qwen3-8B, `vocab_size` in its config.json: without --padded-vocab-size Megatron-LM makes the
model as large as the tokenizer, which has fewer words, and a checkpoint does not fit. `--sft` asks for
`--tokenizer-type SFTTokenizer`, whose chat templates and padding are those of the Nemotron tokenizers alone
(core_r0.15, megatron/training/tokenizer/sft_tokenizer.py).
Its means are reported beside `lm loss`, the EAFT loss; validation reports plain cross-entropy. With `--sft` Megatron-LM
logs a mean of the micro-batches' means; what it trains on is divided by the tokens of the global batch.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_eaft import EAFTConfig
from nemo_eaft.megatron import attach, attached
from nemo_eaft.metrics import sums_and_counts


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    group = parser.add_argument_group("EAFT")
    group.add_argument("--eaft-alpha", type=float, default=1.0)
    group.add_argument("--eaft-top-k", type=int, default=20)
    group.add_argument("--eaft-gate", default="eaft", help="none: plain cross-entropy, measured alike")
    return parser


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    from gpt_builders import gpt_builder
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    if not args.calculate_per_token_loss or args.ddp_average_in_collective:
        raise ValueError(
            "EAFT needs --calculate-per-token-loss, and no --ddp-average-in-collective: otherwise the gradient depends "
            "on how the global batch is cut"
        )
    model = gpt_builder(args, pre_process, post_process, vp_stage)
    config = EAFTConfig(alpha=args.eaft_alpha, top_k=args.eaft_top_k, gate=args.eaft_gate)
    # The true vocabulary: args.padded_vocab_size is what the model has.
    attach(model, config, vocab_size=args.vocab_size or get_tokenizer().vocab_size)  # <- EAFT
    return model


def loss_func(loss_mask: Tensor, sums: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, number of tokens, and what to log: pairs of sum and count."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    report = {"lm loss": torch.stack((loss.detach(), tokens))}
    if sums is not None:
        report |= {f"eaft/{name}": pair for name, pair in sums_and_counts(sums).items()}
    return loss, tokens, report


def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, partial[Any]]:
    from megatron.core.utils import get_attr_wrapped_model
    from pretrain_gpt import get_batch

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    tokens, labels, loss_mask, attention_mask, position_ids = batch
    eaft = attached(model)
    if eaft is not None:
        eaft.reset()
    # The model hands the mask to the loss, so that tokens outside it take no part.
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask, eaft.sums if eaft is not None and model.training else None)


def main() -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from pretrain_gpt import train_valid_test_datasets_provider

    train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "HuggingFaceTokenizer"},
        extra_args_provider=add_arguments,
    )


if __name__ == "__main__":
    main()
