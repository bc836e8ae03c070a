"""Time and memory of the EAFT loss beside its peers: ``python -m benchmarks``."""
