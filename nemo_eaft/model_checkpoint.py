"""NeMo's ModelCheckpoint, with checkpoints that are whole or not there.

What NeMo 2.7.3 (lightning/pytorch/callbacks/model_checkpoint.py) leaves out: the sums of the files; that what was
written has reached the disk; and that a context which cannot be written is an error, not a warning: without it a
checkpoint cannot be exported.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo.lightning as nl
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io.pl import TrainerContext
from torch.distributed.checkpoint.api import CheckpointException

from nemo_eaft.integrity import files, sums, write_sums
from nemo_eaft.loss.collectives import everywhere, gather_objects, on_rank_zero
from nemo_eaft.saved import Saved, write


class RecordError(RuntimeError):
    """A checkpoint is whole, but `record`, which is to name it, could not be written."""


class ModelCheckpoint(nl.ModelCheckpoint):
    """Give it to `nl.NeMoLogger(ckpt=...)` in place of NeMo's; it takes the same arguments.

    A checkpoint bears NeMo's mark of an unfinished one until `SHA256SUMS` is written: every rank hashes the files it
    wrote itself, rank 0 the others. Contexts are always saved.

    record: file that is to name the newest finished checkpoint, `run.dir/saved.json`; outside of their folder, so that
        a run which has lost it is not taken for a new one. None: none is written.

    Raises, on every rank, while it saves:
        RuntimeError: the checkpoint could not be written; names it, the cause, and how much space the disk has left.
        RecordError: the checkpoint is whole, but `record` could not be written; the same of it.
        ValueError: NeMo's EMA callback is there, whose second checkpoint would have no sums.
    """

    def __init__(self, *args: Any, record: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"always_save_context": False, "save_context_on_train_end": False})
        self._record = None if record is None else Path(record)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        folder = Path(ckpt_to_dir(filepath))
        if self._ema_callback(trainer) is not None:
            raise ValueError(f"{type(self).__name__}: NeMo's EMA callback is not supported; use nl.ModelCheckpoint")
        try:
            self.set_checkpoint_unfinished_marker(filepath, barrier_after=True)
            on_rank_zero(lambda: _dump_context(trainer, folder))
            super()._save_checkpoint(trainer, filepath)
        except RecordError:
            raise
        # CheckpointException is a BaseException, which nobody expects: not even what writes error.json.
        except (Exception, CheckpointException) as error:
            raise RuntimeError(f"checkpoint {folder} could not be written{_space(folder)}: {_cause(error)}") from error

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Trainer, filepath: str, global_step: int
    ) -> Callable[[], None]:
        finalize: Callable[[], None] = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        folder = Path(ckpt_to_dir(filepath))
        record = self._record

        def sealed() -> None:
            seal(trainer, folder)
            finalize()
            if record is not None:
                try:
                    on_rank_zero(lambda: write(record, Saved(folder.name, global_step)))
                except Exception as error:
                    raise RecordError(
                        f"checkpoint {folder} is whole, but {record} could not be written{_space(record)}: "
                        f"{_cause(error)}"
                    ) from error

        return sealed

    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str, override_async: bool = False) -> None:
        # NeMo takes every "-last" out of the link's path to see whether its step is saved already (line 552). With one
        # in the name of a folder it would not see it, and save a second time in place of the link.
        saved, link = Path(ckpt_to_dir(filepath)), Path(ckpt_to_dir(linkpath))
        if link != saved.with_name(f"{saved.name}-last") or self.async_save:
            super()._link_checkpoint(trainer, filepath, linkpath, override_async)
        else:
            LightningModelCheckpoint._link_checkpoint(trainer, str(saved), str(link))


def seal(trainer: Trainer, folder: Path) -> None:
    """Write `SHA256SUMS` of a checkpoint that every rank has written its part of. Every rank calls it."""
    rank = trainer.global_rank
    # Megatron's names: __<rank>_<number>.distcp. Their bytes are in this machine's memory still.
    own = [name for name in files(folder) if re.search(rf"(^|/)__{rank}_\d+\.distcp$", name)]
    parts = everywhere(lambda: sums(folder, own))
    known = {name: it for part in parts for name, it in part.items()}
    on_rank_zero(lambda: write_sums(folder, known))


def _dump_context(trainer: Trainer, folder: Path) -> None:
    TrainerContext.from_trainer(trainer).io_dump(folder / "context", yaml_attrs=["model"])


def _space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder.parent).free / 1e9:.3f} GB are free on its disk)"
    except OSError:
        return ""


def _cause(error: BaseException) -> str:
    """The system's own message where there is one; torch.save has a text of its own for a write that failed."""
    if isinstance(error, CheckpointException):
        # Megatron raises it on every rank or on none, but tells the reason to one of them only.
        lines = str(error).strip().splitlines()[1:]
        told = gather_objects(_system_error(str(error)) or (_plain(lines[-1]) if lines else ""))
        return next((cause for cause in told if cause), str(error))
    return _system_error(str(error)) or _plain(f"{type(error).__name__}: {error}")


def _plain(text: str) -> str:
    """caffe2/serialize/inline_container.cc, torch 2.13, says where it stands in a file, and not what the system said:
    its second failure, when it closes the file after a write that failed, hides the first."""
    return f"a file could not be written to its end ({text})" if "unexpected pos" in text else text


def _system_error(text: str) -> str:
    found = re.findall(r"\[Errno \d+\] [^\n]*", text)
    return found[0] if found else ""
