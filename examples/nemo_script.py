"""A plain NeMo 2.x fine-tuning script. EAFT is the one line marked below; everything else is NeMo.

    torchrun --nproc-per-node 8 examples/nemo_script.py --checkpoint imported/ --data data/ --tensor-parallel 8

`--checkpoint` is a NeMo checkpoint (`nemo-eaft import`, or NeMo's own `llm.import_ckpt`); `--data` is a folder with
`training.jsonl` and `validation.jsonl` of `{"input": ..., "output": ...}` rows, as NeMo's FineTuningDataModule reads
them. `--cpu` runs the same script without a GPU.
"""

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="runs/nemo_script")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    if arguments.cpu:
        import nemo_eaft.cpu

        nemo_eaft.cpu.enable()  # before NeMo is imported

    import nemo.lightning as nl
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm

    from nemo_eaft import EAFTConfig
    from nemo_eaft.nemo import EAFTCallback

    dtype = torch.float32 if arguments.cpu else torch.bfloat16
    model = nl.io.load_context(arguments.checkpoint, subpath="model")
    model.config.seq_length = arguments.seq_length
    model.config.bf16, model.config.params_dtype = not arguments.cpu, dtype
    data = llm.FineTuningDataModule(
        dataset_root=arguments.data,
        seq_length=arguments.seq_length,
        micro_batch_size=arguments.micro_batch_size,
        global_batch_size=arguments.global_batch_size,
        tokenizer=model.tokenizer,
        num_workers=0,
        persistent_workers=False,
    )
    trainer = nl.Trainer(
        accelerator="cpu" if arguments.cpu else "gpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=arguments.tensor_parallel, gradient_as_bucket_view=True, ckpt_async_save=False
        ),
        plugins=None if arguments.cpu else nl.MegatronMixedPrecision(precision="bf16-mixed"),
        max_steps=arguments.steps,
        val_check_interval=arguments.steps,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )

    trainer.callbacks.append(EAFTCallback(EAFTConfig(alpha=1.0)))  # <- the one line

    llm.finetune(
        model=model,
        data=data,
        trainer=trainer,
        log=nl.NeMoLogger(
            log_dir=arguments.output, use_datetime_version=False, ckpt=nl.ModelCheckpoint(save_last=True)
        ),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=arguments.checkpoint)),
        optim=nl.MegatronOptimizerModule(
            OptimizerConfig(optimizer="adam", lr=5e-6, bf16=not arguments.cpu, params_dtype=dtype)
        ),
        tokenizer="model",
    )


if __name__ == "__main__":
    main()
