"""What is run: settings, methods, learning rates, seeds, and how much of each."""

from __future__ import annotations

from nemo_eaft.config import EAFTConfig

SETTINGS = ("bfcl", "conflicts-10", "conflicts-30", "conflicts-50", "format")

METHODS = {
    "sft": EAFTConfig(gate="none"),
    "eaft alpha=0.33": EAFTConfig(alpha=0.33),
    "eaft alpha=1": EAFTConfig(alpha=1.0),
    "eaft alpha=2": EAFTConfig(alpha=2.0),
    "mask": EAFTConfig(gate="mask"),
    "dft": EAFTConfig(gate="dft"),
}
REFERENCE = "sft"
METHOD_NAMES: tuple[str, ...] = tuple(METHODS)

RATES = (1e-5, 3e-5, 1e-4)
"""The same for every method."""
TUNED_ON = ("bfcl", "conflicts-30")
"""A method's learning rate is chosen on these two, with seed 0."""
SEEDS = {"bfcl": (0, 1, 2), "conflicts-10": (0,), "conflicts-30": (0, 1, 2), "conflicts-50": (0,), "format": (0, 1, 2)}
"""At the chosen learning rate."""

PRIMARY = ("conflicts-30", "eaft alpha=1", "answer")
"""What the study was made to answer, named before the first run: whether this method forgets less than the reference
here, by this measure, at equal target quality. All other comparisons are secondary."""

DRAWS = 5000
"""Of the rows; of the seeds as ``nemo_eaft.compare.matching`` has them."""

STEPS = 24
CHECKPOINTS = (1, 2, 4, 6, 8, 12, 16, 24)
"""Close together at first: most of what happens at the highest rate happens in its first eight steps."""
BATCH = 4
CLIP = 1.0

HELD_OUT = 20
SAMPLES, SAMPLE_TOKENS = 16, 33
WINDOWS, WINDOW_TOKENS = 12, 64
CERTAIN = 0.5
"""A capital is known when the base model gives the whole of it at least this probability."""
SURE = EAFTConfig().conflict_entropy
"""A known one is surely known when the base model's entropy, by its normaliser, is below this where the name begins: a
wrong name there is a confident conflict by EAFT's own measure."""
CONTRADICTED = 14
"""Of those that are surely known: enough others stay to be asked about."""
PROBED = 30
"""At most: countries of the probe, surely known or not."""
