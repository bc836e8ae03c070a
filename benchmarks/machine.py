"""What ran: device, versions, commit, and the copy bandwidth of the same run. No host name, no path."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel", "transformer-engine", "cut-cross-entropy")

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_COPIES = 9


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model with the number of cores that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def commit() -> str:
    """Short hash of the checkout, with ``+changes`` where files other than results differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def load() -> float | None:
    """Processes that wanted a core in the last minute: above 0 when others are at work."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of ``Tensor.copy_`` between two large tensors, read plus written; median of several."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    sink = torch.zeros_like(source)
    rates = []
    for _ in range(_COPIES):
        _wait(device)
        start = time.perf_counter()
        sink.copy_(source)
        _wait(device)
        rates.append(2 * source.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
