"""Peak memory of one forward and backward beyond the caller's inputs.

On a GPU from the caching allocator. On a CPU from the resident set of a fresh process for each contender: the
process runs the case once, resets the kernel's high-water mark, and runs it again, so that libraries, thread
stacks and compilers are not counted. ``python -m benchmarks.memory NAME`` is that process: a list of cases on
standard input, a list of results on the last line of its output.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cases import Case, Inputs, fill, make_inputs
from benchmarks.contenders import BY_NAME, Contender
from benchmarks.machine import ROOT
from benchmarks.peers import describe, fresh_compiler

# Every tensor in pages of its own, given back at once: what is resident is what is allocated.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
_TIMEOUT = 900


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. ``inputs`` are the logits, or hidden states and weight; labels are left out."""

    inputs: int
    extra: int
    """Peak of everything else: what is saved, what is temporary, and the gradient where it is not in place."""

    gradients: int
    """Size of the gradients that are returned, wherever they lie."""

    method: str

    forward: int = 0
    """Peak of ``extra`` in forward alone."""

    @property
    def total(self) -> int:
        """What the ratios compare: inputs and everything the loss allocates."""
        return self.inputs + self.extra

    @property
    def beyond_gradients(self) -> int:
        """Peak beyond inputs and gradients, for a contender whose gradients are tensors of their own made in backward:
        in forward there are none to take off."""
        return max(self.forward, self.extra - self.gradients)


def measure(contender: Contender, case: Case, device: torch.device) -> Memory:
    """In this process; on a CPU only meaningful in a fresh one."""
    inputs = make_inputs(case, device)
    size = sum(tensor.nbytes for tensor in inputs.tensors)
    if device.type == "cuda":
        _call(contender, inputs, case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward = _call(contender, inputs, case, torch.cuda.max_memory_allocated) - before
        extra = torch.cuda.max_memory_allocated() - before
        method = "torch.cuda.max_memory_allocated"
        return Memory(inputs=size, extra=extra, gradients=size, method=method, forward=forward)
    method = "VmHWM, not reset: first call"
    if _reset_high_water_mark():
        _call(contender, inputs, case)
        fill(inputs.tensors, case)
        gc.collect()
        _reset_high_water_mark()
        method = "VmHWM, reset after a first call"
    before = _status("VmRSS")
    forward = max(_call(contender, inputs, case, lambda: _status("VmHWM")) - before, 0)
    extra = max(_status("VmHWM") - before, 0)
    return Memory(inputs=size, extra=extra, gradients=size, method=method, forward=forward)


def measure_in_new_process(name: str, cases: Sequence[Case]) -> list[Memory | str]:
    """One process for all cases of a contender on the CPU; a reason where there is no figure."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name],
        input=json.dumps([dataclasses.asdict(case) for case in cases]),
        cwd=ROOT,
        env={**os.environ, **_ALLOCATOR},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        return [f"its process ended with {done.returncode}"] * len(cases)
    answers = json.loads(done.stdout.splitlines()[-1])
    return [answer if isinstance(answer, str) else Memory(**answer) for answer in answers]


def _call(contender: Contender, inputs: Inputs, case: Case, peak: Callable[[], int] = lambda: 0) -> int:
    """Forward and backward; what ``peak`` says between them."""
    loss = contender.forward(inputs, case)
    forward = peak()
    torch.autograd.grad(loss, inputs.tensors, torch.ones_like(loss))
    return forward


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU needs Linux")


def _main() -> None:
    contender = BY_NAME[sys.argv[1]]
    answers: list[object] = []
    for plain in json.load(sys.stdin):
        try:
            if contender.compiled:
                fresh_compiler()
            answers.append(dataclasses.asdict(measure(contender, Case(**plain), torch.device("cpu"))))
        except Exception as error:
            answers.append(f"did not run: {describe(error)}")
    print()
    print(json.dumps(answers))


if __name__ == "__main__":
    _main()
