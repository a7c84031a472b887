"""Where the encoder runs, and what to call it in an entry's attestation."""

from __future__ import annotations

import platform
from pathlib import Path

from proteus_pipeline.errors import ConfigError


def resolve_device(wanted: str) -> str:
    """Return ``cpu`` or ``cuda:N`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    ConfigError
        When a GPU is asked for by name and there is none: a CPU is never taken instead without a word.

    """
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return "cpu"
    kind, _, index = wanted.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ConfigError(f"runtime.device is {wanted!r}", "use auto, cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device={wanted}: torch sees {torch.cuda.device_count()} GPUs", "use runtime.device=cpu"
        )
    return f"cuda:{index or 0}"


def device_class(device: str) -> str:
    """Return what decides bits on a device: instruction set and vendor of a CPU, SM version of a GPU.

    The vendor counts because MKL chooses its kernels by it.
    """
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda/sm_{major}{minor}"
    return f"cpu/{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}/{_cpu_vendor()}"


def _cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    for line in lines:
        if line.startswith(("vendor_id", "CPU implementer")):
            return line.partition(":")[2].strip()
    return "unknown"
