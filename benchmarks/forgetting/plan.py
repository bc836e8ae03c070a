"""Which runs are left, in which order, and how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.forgetting import design
from benchmarks.forgetting.results import BASE, Line, Wanted
from nemo_eaft.compare.record import QUALITY, from_json


def tuning() -> list[Wanted]:
    """Every method with every learning rate, on two settings, with one seed."""
    return [
        Wanted(setting, method, rate, 0)
        for setting in design.TUNED_ON
        for rate in design.RATES
        for method in design.METHODS
    ]


def confirming(rates: dict[str, float]) -> list[Wanted]:
    """The methods whose learning rate is chosen, on every setting, with its seeds; the settings with several come
    first, one seed of all of them before the next."""
    runs = [
        Wanted(setting, method, rates[method], seed)
        for setting, seeds in design.SEEDS.items()
        for seed in seeds
        for method in design.METHODS
        if method in rates
    ]
    return sorted(runs, key=lambda run: (len(design.SEEDS[run.setting]) == 1, run.seed))


def chosen_rates(lines: Sequence[Line]) -> dict[str, float]:
    """Method -> its learning rate, of the methods whose tuning is complete: the one with the lowest target
    cross-entropy that any checkpoint has, in the mean over the two settings. How much is forgotten plays no part."""
    return {method: min(means, key=lambda rate: means[rate]) for method, means in tuned_targets(lines).items()}


def tuned_targets(lines: Sequence[Line]) -> dict[str, dict[float, float]]:
    """Method -> learning rate -> what the choice goes by, of the methods whose tuning is complete."""
    best = {line.wanted: best_target(line) for line in lines if line.method != BASE}
    found = {}
    for method in design.METHODS:
        means = {}
        for rate in design.RATES:
            runs = [Wanted(setting, method, rate, 0) for setting in design.TUNED_ON]
            if all(run in best for run in runs):
                means[rate] = statistics.mean(best[run] for run in runs)
        if len(means) == len(design.RATES):
            found[method] = means
    return found


def best_target(line: Line) -> float:
    """The lowest target cross-entropy of a run's checkpoints, nats per token."""
    return min(from_json(point["measures"])[QUALITY].mean for point in line.points)


def left(
    lines: Sequence[Line],
    only: Sequence[str] = design.SETTINGS,
    methods: Sequence[str] = design.METHOD_NAMES,
    seeds: Sequence[int] | None = None,
) -> list[Wanted]:
    """What can be run now. More follows when a method's learning rates have all been tried."""
    done = {line.wanted for line in lines}
    runs = dict.fromkeys([*tuning(), *confirming(chosen_rates(lines))])
    return [
        run
        for run in runs
        if run not in done and run.setting in only and run.method in methods and (seeds is None or run.seed in seeds)
    ]


def total() -> int:
    """Runs of the whole study."""
    # Whichever rate is chosen, its runs with seed 0 on the two settings were made for tuning.
    return len(set(tuning()) | set(confirming(dict.fromkeys(design.METHODS, design.RATES[0]))))


def minutes(lines: Sequence[Line], count: int) -> float | None:
    """Of so many runs, by the median of the last ones; None before the first."""
    taken = [sum(line.seconds.values()) for line in lines if line.method != BASE][-10:]
    return count * statistics.median(taken) / 60 if taken else None
