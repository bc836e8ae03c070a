"""A Megatron-Bridge fine-tuning script. EAFT is the two lines marked below and the two settings that they ask for.

    torchrun --nproc-per-node 8 examples/bridge_finetune.py --checkpoint imported/ --data data/ --tensor-parallel 4

`--checkpoint` is a Megatron checkpoint, made once in one process:

    python -c "from megatron.bridge import AutoBridge; AutoBridge.import_ckpt('Qwen/Qwen3-8B', 'imported/')"

`--data` is a folder with `training.jsonl` and `validation.jsonl` of `{"input": ..., "output": ...}` rows, as Bridge's
fine-tuning datasets read them. Another model: import another recipe of megatron.bridge.recipes. For Bridge 0.3 to 0.6
(0.3.1 was run, the others were read); 0.2 has no such recipe.
"""

import argparse

from megatron.bridge.recipes.qwen import qwen3_8b_sft_config as recipe
from megatron.bridge.training.checkpointing import checkpoint_exists
from megatron.bridge.training.config import ConfigContainer, FinetuningDatasetConfig
from megatron.bridge.training.finetune import finetune

from nemo_eaft import EAFTConfig, bridge


def configuration() -> ConfigContainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="runs/bridge_finetune")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=32)
    arguments = parser.parse_args()
    # Bridge 0.3.1 would train random weights without a word.
    if not checkpoint_exists(arguments.checkpoint):
        parser.error(f"--checkpoint {arguments.checkpoint}: no Megatron checkpoint there")

    cfg = recipe()
    cfg.model.tensor_model_parallel_size = arguments.tensor_parallel
    cfg.model.pipeline_model_parallel_size = arguments.pipeline_parallel
    cfg.model.sequence_parallel = arguments.tensor_parallel > 1
    cfg.model.seq_length = arguments.seq_length
    cfg.dataset = FinetuningDatasetConfig(dataset_root=arguments.data, seq_length=arguments.seq_length, do_test=False)
    cfg.train.train_iters = arguments.steps
    cfg.train.micro_batch_size = arguments.micro_batch_size
    cfg.train.global_batch_size = arguments.global_batch_size
    cfg.checkpoint.save_interval = arguments.steps
    # Bridge 0.4 moved them, and takes the old ones as deprecated.
    validation = getattr(cfg, "validation", cfg.train)
    validation.eval_interval, validation.eval_iters = arguments.steps, 1
    cfg.checkpoint.pretrained_checkpoint = arguments.checkpoint
    cfg.checkpoint.save = cfg.checkpoint.load = f"{arguments.output}/checkpoints"
    cfg.logger.tensorboard_dir = f"{arguments.output}/tb_logs"
    cfg.logger.tensorboard_log_interval = 1

    # The loss is divided once, by the tokens of the global batch.
    cfg.model.calculate_per_token_loss = True
    cfg.ddp.average_in_collective = False
    cfg.model.register_pre_wrap_hook(bridge.pre_wrap_hook(EAFTConfig(alpha=1.0)))  # <- the first line
    return cfg


def main() -> None:
    finetune(configuration(), bridge.forward_step)  # <- the second line: Bridge's own step is gpt_step.forward_step


if __name__ == "__main__":
    main()
