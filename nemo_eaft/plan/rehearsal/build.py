"""One rank of a run as NeMo and Megatron-Core build it: model chunks, EAFT, DDP buffers, optimizer.

The same calls as `nemo_eaft.train` and NeMo 2.7.3 make (lightning/pytorch/strategies/megatron_strategy.py,
setup_megatron_parallel), on the meta device and in PyTorch's fake process groups, which answer every collective at
once and with nothing. Megatron's layers are the local ones: they hold the parameters that Transformer Engine's hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_eaft.cpu.meta import on_meta_device
from nemo_eaft.loss.shard import Shard
from nemo_eaft.plan.layout import Layout
from nemo_eaft.plan.rehearsal.model import nemo_model, whole_model
from nemo_eaft.plan.rehearsal.parameters import parameters_of
from nemo_eaft.plan.rehearsal.records import Chunk, Place, Rank, Whole
from nemo_eaft.settings import Settings


def places(layout: Layout) -> list[Place]:
    """One of every kind of rank."""
    return [
        Place(tensor, expert, pipeline)
        for pipeline in range(layout.pipeline)
        for expert in range(layout.expert)
        for tensor in range(layout.tensor)
    ]


def rank_number(place: Place, layout: Layout) -> int:
    """The first rank of the world at a place (megatron-core 0.15.3, parallel_state.py, order tp-cp-ep-dp-pp)."""
    return place.tensor + layout.tensor * place.expert + layout.world_size // layout.pipeline * place.pipeline


def build_whole(settings: Settings, hf_files: Path) -> Whole:
    """The model uncut, to compare with. settings: those of one rank."""
    strategy = _strategy(settings)
    with _world(1, 0, strategy):
        return whole_model(settings, hf_files)


def build_rank(settings: Settings, hf_files: Path, place: Place, *, vocab_size: int, fused_linear: bool) -> Rank:
    """Build a rank, attach EAFT by NeMo's callback, and say what there is.

    vocab_size: the true one, as `nemo-eaft train` takes it from the imported checkpoint.

    Raises:
        ValueError: EAFT or Megatron-Core refuses the settings.
    """
    from nemo_eaft import requirements
    from nemo_eaft.nemo import EAFTCallback

    layout = Layout.of(settings)
    number = rank_number(place, layout)
    strategy = _strategy(settings)
    with _world(layout.world_size, number, strategy), on_meta_device():
        model = nemo_model(settings, hf_files)
        trainer = _trainer(settings, strategy, model)
        callback = EAFTCallback(
            settings.loss.eaft_config(),
            vocab_size=vocab_size,
            fused_linear=fused_linear,
            measure_only=settings.loss.gate == "stock",
        )
        trainer.callbacks.append(callback)
        callback.setup(trainer, model, "fit")
        model.configure_model()
        built = _megatron_parallel(trainer, strategy, model)
        callback.on_fit_start(trainer, model)
        for chunk in built:
            requirements.check_chunk(chunk)
        (optimizer,) = model.optim.optimizers(built)
        weights = _storages(parameter.data for parameter in built.parameters())
        gradients = _storages(buffer.grad_data for chunk in built for buffer in _buffers(chunk.module))
        states = _storages(_optimizer_tensors(optimizer))
        return Rank(
            number=number,
            place=_place(),
            chunks=tuple(_chunk(chunk) for chunk in built),
            weights=sum(weights.values()),
            gradients=sum(gradients.values()),
            # In float32 the optimizer steps on the weights themselves.
            optimizer=sum(size for key, size in states.items() if key not in weights and key not in gradients),
        )


@contextmanager
def _world(size: int, rank: int, strategy: Any) -> Iterator[None]:
    """The process groups of one rank of a world that is not there."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from nemo.lightning._strategy_lib import init_model_parallel, init_parallel_ranks
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        init_parallel_ranks(size, rank, 0, strategy.parallelism)
        init_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _strategy(settings: Settings) -> Any:
    from nemo_eaft.train import build_strategy

    strategy = build_strategy(settings)
    # Fake groups are the only ones there are.
    strategy.use_gloo_process_groups = False
    return strategy


def _trainer(settings: Settings, strategy: Any, model: Any) -> Any:
    """NeMo's trainer, connected as `fit` would, for the plugin of the precision and for callbacks."""
    import nemo.lightning as nl

    from nemo_eaft.train import precision_plugins

    trainer = nl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        plugins=precision_plugins(settings),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    strategy.connect(model)
    return trainer


def _megatron_parallel(trainer: Any, strategy: Any, model: Any) -> Any:
    from nemo.lightning.megatron_parallel import MegatronParallel

    plugin = strategy.precision_plugin
    built = MegatronParallel(
        model,
        precision_plugin=plugin,
        vp_size=strategy.virtual_pipeline_model_parallel_size,
        cpu=True,
        ddp_config=strategy.ddp_config,
        convert_module_fn=getattr(plugin, "convert_module", None),
    )
    built.trainer = trainer
    built.init_model_parallel()
    strategy.megatron_parallel = built
    return built


def _place() -> Place:
    """Where Megatron says that this rank stands."""
    from megatron.core import parallel_state

    return Place(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )


def _chunk(chunk: Any) -> Chunk:
    from nemo_eaft.megatron import attached, unwrap

    core: Any = unwrap(chunk)
    loss = attached(chunk)
    rows = columns = None
    if core.pre_process:
        words = core.embedding.word_embeddings
        rows = (words.vocab_start_index, words.vocab_end_index)
    if loss is not None and core.post_process:
        weight = core.shared_embedding_or_output_weight()
        width = (core.output_layer.weight if weight is None else weight).shape[0]
        shard = Shard.of_rank(_place().tensor, width, loss.vocab_size)
        columns = (shard.first, shard.first + shard.columns)
    return Chunk(
        post_process=bool(core.post_process),
        attached=loss is not None and loss.in_place(),
        parameters=parameters_of(core),
        vocab_size=None if loss is None else loss.vocab_size,
        embedding_rows=rows,
        loss_columns=columns,
    )


def _buffers(ddp: Any) -> list[Any]:
    return [*ddp.buffers, *ddp.expert_parallel_buffers]


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """What Megatron's optimizer holds after its first step, by its own function for that."""
    whole = optimizer.mcore_optimizer
    for each in getattr(whole, "chained_optimizers", [whole]):
        if each.optimizer is None:
            continue
        each.init_state_fn(each.optimizer, each.config)
        for group in each.optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in each.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage behind `tensors`, which may share them."""
    kept = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in kept}
