"""Times of all contenders of a case, side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.contenders import Contender
from benchmarks.peers import describe

# Zeroed before each call on a GPU: it empties the cache, and takes so long that the host has queued the call by
# the time the clock starts, as in training, where the host is ahead.
_GPU_LEAD_BYTES = 4 << 30


class Round(NamedTuple):
    """Milliseconds of one forward and its backward."""

    forward: float
    backward: float


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def parts(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Milliseconds of each part in each round."""
    return {
        "forward": [each.forward for each in rounds],
        "backward": [each.backward for each in rounds],
        "sum": [each.forward + each.backward for each in rounds],
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ratio of two contenders of the same rounds: each round's ratio, then their median and quartiles.

    Two calls of one round ran within seconds of each other, so a machine that slows down takes both along.
    """
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def time_contenders(
    contenders: Sequence[Contender], case: Case, device: torch.device, rounds: int, warmups: int = 1
) -> dict[str, list[Round] | str]:
    """Rounds of every contender, or the reason why it dropped out.

    In each round every contender runs once, each round starting with another one. Before every call, outside
    the timed region, given logits are restored from a master copy: some contenders overwrite them (Megatron those
    of float32), and all shall find the caches alike.
    """
    inputs = make_inputs(case, device)
    masters = tuple(tensor.detach().clone() for tensor in inputs.tensors) if case.hidden is None else ()
    lead = torch.empty(_GPU_LEAD_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    result: dict[str, list[Round] | str] = {contender.name: [] for contender in contenders}
    for number in range(warmups + rounds):
        turn = number % max(len(contenders), 1)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            done = result[contender.name]
            if isinstance(done, str):
                continue
            with torch.no_grad():
                for tensor, master in zip(inputs.tensors, masters, strict=False):
                    tensor.copy_(master)
            if lead is not None:
                lead.zero_()
            try:
                taken = call(contender, inputs, case, device)
            except Exception as error:
                result[contender.name] = f"did not run: {describe(error)}"
                continue
            if number >= warmups:
                done.append(taken)
    return result


def call(contender: Contender, inputs: Inputs, case: Case, device: torch.device) -> Round:
    """One forward and backward, timed. The upstream gradient is 1 for every token."""
    mark, between = _clock(device)
    start = mark()
    loss = contender.forward(inputs, case)
    middle = mark()
    upstream = torch.ones_like(loss)
    begin = mark()
    gradients = torch.autograd.grad(loss, inputs.tensors, upstream)
    end = mark()
    taken = Round(between(start, middle), between(begin, end))
    del loss, gradients
    return taken


def _clock(device: torch.device) -> tuple[Callable[[], object], Callable[[object, object], float]]:
    """A function that takes the time, and one that gives the milliseconds between two such times."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: _seconds(end, start) * 1e3

    def mark() -> object:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: object, end: object) -> float:
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return start.elapsed_time(end)

    return mark, between


def _seconds(end: object, start: object) -> float:
    assert isinstance(end, float)
    assert isinstance(start, float)
    return end - start
