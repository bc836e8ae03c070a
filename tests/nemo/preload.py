"""Imported once by the fork server: NeMo on the CPU backend. Every rank of `ranks.run_ranks` is a fork of that process.

No OpenMP thread may exist before a fork, so nothing here computes.
"""

import gc
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import torch

torch.set_num_threads(1)

import nemo_eaft.cpu

nemo_eaft.cpu.enable()

# Used by every rank, so imported before the fork. pytest: children import the main module of their parent.
import pytest  # noqa: F401
import transformers  # noqa: F401
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: F401
from nemo import lightning as _lightning  # noqa: F401
from nemo.collections import llm as _llm  # noqa: F401

import nemo_eaft.convert
import nemo_eaft.data.module
import nemo_eaft.glm4
import nemo_eaft.nemo
import nemo_eaft.train

gc.collect()
# Forks share the pages of what lives now; the collector would write to them.
gc.freeze()

SERVER_PID = os.getpid()
