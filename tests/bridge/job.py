"""What the ranks of a Bridge job do: `python -m tests.bridge.job FOLDER JOB...`, under torchrun or alone.

Each job leaves its result in FOLDER/JOB-RANK.pt. One process runs several, as importing Bridge takes most of the time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.bridge.on_cpu import import_bridge, model_for_the_cpu, settings_for_the_cpu
from tests.bridge.unit import unit
from tests.examples import load_example

STEPS = 3
GPU = torch.cuda.is_available()


def hugging_face(folder: Path) -> None:
    """The recipe's model is the one in `folder`, not one of a hub."""
    from megatron.bridge import AutoBridge

    real = AutoBridge.from_hf_pretrained
    AutoBridge.from_hf_pretrained = lambda *_, **kwargs: real(str(folder), **kwargs)


def checkpoint(folder: Path) -> None:
    """A Megatron checkpoint of random weights in folder/imported; one process."""
    from megatron.bridge import AutoBridge

    from tests.cpu.models import set_weights

    bridge = AutoBridge.from_hf_pretrained("any")
    provider = bridge.to_megatron_provider(load_weights=False)
    if not GPU:
        model_for_the_cpu(provider)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    set_weights(model[0])
    bridge.save_megatron_model(model, folder / "imported")


def example(folder: Path, name: str, tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
    """examples/bridge_finetune.py with these sizes, in float32 on the CPU, watched.

    Returns:
        `micro_batches`: of this rank, in order, each a dict of `training`, `logits` [s, b, V_local], `labels`,
        `loss_mask` and `losses` [b, s]; empty on a rank without the loss.
    """
    from megatron.bridge.training import finetune, gpt_step

    script = load_example("bridge_finetune")
    micro_batches: list[dict[str, Any]] = []

    def watch(model: list[Any]) -> list[Any]:
        for core in (chunk for chunk in model if chunk.post_process):
            core.output_layer.register_forward_hook(
                lambda layer, _, out: micro_batches.append(
                    {"training": layer.training, "logits": out[0].detach().cpu().clone()}
                )
            )
            core.register_forward_pre_hook(lambda _, __, kwargs: labels.append(kwargs["labels"]), with_kwargs=True)
        return model

    labels: list[Tensor] = []
    real_loss = gpt_step.masked_next_token_loss

    def watched_loss(loss_mask: Tensor, output: Tensor, **kwargs: Any) -> Any:
        seen = {"labels": labels[-1], "loss_mask": loss_mask, "losses": output}
        micro_batches[-1] |= {key: value.detach().cpu().clone() for key, value in seen.items()}
        return real_loss(loss_mask, output, **kwargs)

    def run(cfg: Any, step: Any) -> None:
        cfg.tokenizer.tokenizer_model = str(folder / "hf")
        if not GPU:
            settings_for_the_cpu(cfg)
        cfg.dataset.num_workers, cfg.dataset.persistent_workers = 0, False
        cfg.model.register_pre_wrap_hook(watch)
        cfg.logger.save_config_filepath = str(folder / f"{name}.yaml")
        cfg.scheduler.lr_warmup_iters = 0
        cfg.optimizer.lr = 1e-2
        finetune.finetune(cfg, step)

    gpt_step.masked_next_token_loss, vars(script)["finetune"] = watched_loss, run
    sizes = {"tensor-parallel": tensor, "pipeline-parallel": pipeline, "steps": STEPS, "seq-length": 48}
    sizes |= {"micro-batch-size": 2, "global-batch-size": 8}
    places = {"checkpoint": folder / "imported", "data": folder / "rows", "output": folder / name}
    sys.argv = ["bridge_finetune.py", *(word for key, v in (places | sizes).items() for word in (f"--{key}", str(v)))]
    try:
        script.main()
    finally:
        gpt_step.masked_next_token_loss, vars(script)["finetune"] = real_loss, finetune.finetune
    return {"micro_batches": micro_batches}


def start() -> None:
    dist.init_process_group("nccl" if GPU else "gloo")


JOBS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": checkpoint,
    "one": lambda folder: example(folder, "one"),
    "tensor": lambda folder: example(folder, "tensor", tensor=2),
    "pipeline": lambda folder: example(folder, "pipeline", pipeline=2),
    "refusals": unit,
    "data": lambda folder: example(folder, "data"),
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if not GPU:
        import_bridge()
    from megatron.bridge.training.initialize import destroy_global_state

    hugging_face(folder / "hf")
    start()
    for name in names:
        result = JOBS[name](folder)
        torch.save(result, folder / f"{name}-{os.environ['RANK']}.pt")
        destroy_global_state()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
