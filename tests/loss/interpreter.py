"""Repairs of Triton's interpreter, so that on a CPU the kernels give a GPU's numbers, in time.

Only where ``TRITON_INTERPRET=1``, which must be set before Triton is first imported.
"""

import os
import threading
from typing import Any

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOCK = threading.Lock()
"""The interpreter keeps the running program in global variables: one rank's kernels at a time."""


def repair() -> None:
    """Round to bfloat16 as the hardware does, and do not prepare Triton's modules again at every inner call."""
    assert INTERPRETED
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """Between float32 and bfloat16, whose bits are held as uint16; the original cuts off instead of rounding."""
        names = (source.name, target.name)
        if names == ("bf16", "fp32"):
            return (data.view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
        if names == ("fp32", "bf16"):
            bits = np.ascontiguousarray(data).view(np.uint32)
            nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16).reshape(data.shape)
        return original(data, source, target, rounding)

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # What an inner call prepares stays so; what the launch prepares, it takes back at its end.
        module = self.fn.__globals__["__name__"]
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    copy_back = interpreter.GridExecutor._restore_args_dev

    def restore(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        assert not any(hasattr(value, "data_ptr") for value in kwargs.values())
        # A storage on the CPU is its own copy; copying it over itself would touch every page of it.
        pairs = [pair for pair in zip(args_dev, args_hst, strict=True) if not _same_memory(*pair)]
        copy_back(self, [a for a, _ in pairs], [b for _, b in pairs], {}, {})

    interpreter._convert_float = convert
    interpreter.GridExecutor._restore_args_dev = restore
    interpreter.InterpretedFunction.__call__ = call


def _same_memory(a: Any, b: Any) -> bool:
    return hasattr(a, "data_ptr") and a.data_ptr() == b.data_ptr()
