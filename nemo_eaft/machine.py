"""What the settings ask of the machine that a rank runs on."""

from __future__ import annotations

from nemo_eaft.settings import Settings


def check_machine(settings: Settings) -> None:
    """Refuse a backend that this machine does not have.

    Raises:
        ValueError: naming ``run.backend`` or ``trainer.gpus_per_node``.
    """
    import torch

    there, wanted = torch.cuda.device_count(), settings.trainer.gpus_per_node
    if settings.run.backend == "cpu":
        if there:
            raise ValueError(
                f"run.backend=cpu is for machines without a GPU, this one has {there}: use run.backend=cuda"
            )
    elif there == 0:
        raise ValueError("run.backend=cuda: no GPU here; run.backend=cpu trains without one")
    elif wanted > there:
        raise ValueError(f"trainer.gpus_per_node={wanted}: this machine has {there}")
