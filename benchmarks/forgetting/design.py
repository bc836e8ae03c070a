"""What is run: settings, methods, learning rates, seeds, and how much of each."""

from __future__ import annotations

from typing import Literal

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

STEPS = 40
CHECKPOINTS = (5, 10, 20, 40)
BATCH = 4
CLIP = 1.0

HELD_OUT = 20
SAMPLES, SAMPLE_TOKENS = 16, 33
WINDOWS, WINDOW_TOKENS = 4, 128
PROBED = 24
"""At most: countries of the probe."""
CERTAIN = 0.5
"""A fact is surely known when the base model gives the whole answer at least this probability."""

Phase = Literal["tune", "confirm"]
