"""When does EAFT forget less? SmolLM2-135M on the CPU, by the same functions as ``nemo-eaft compare``."""
