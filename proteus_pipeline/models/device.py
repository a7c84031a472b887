"""Where the encoder runs, and what to call it in an entry's attestation."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.stores.files import write_atomic

if TYPE_CHECKING:
    import torch

_MEASURED_S = 0.5
_FORMAT = 2
# By these a GPU is known before torch is asked: NVIDIA's driver, its boards, AMD's and WSL's.
_GPU_SIGNS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvmap", "/dev/nvhost-ctrl-gpu", "/dev/kfd", "/dev/dxg")


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

    The vendor counts because MKL chooses its kernels by it. What a CPU multiplies bf16 with follows a plus sign: mixed and bf16 have
    other bits with each. It is named for fp32 too: a machine is of one class.
    """
    import torch

    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda/sm_{major}{minor}"
    bf16 = bf16_instructions()
    capability = torch.backends.cpu.get_cpu_capability() + (f"+{bf16}" if bf16 else "")
    return f"cpu/{platform.machine()}/{capability}/{_cpu_vendor()}"


def remembered_class(wanted: str, memory: Path) -> str:
    """Return the class of the device that `wanted` means here, as `device_class`; a CPU's is asked of torch once.

    Importing torch takes two seconds, which is most of a run that computes nothing.

    Parameters
    ----------
    wanted
        As for `resolve_device`.
    memory
        The file that remembers the answer to that, for the same torch on the same CPU with the same environment.

    Raises
    ------
    ConfigError
        As `resolve_device`.

    """
    facts = _facts(wanted)
    if facts is None:
        return device_class(resolve_device(wanted))
    known = _recalled(memory, facts)
    if known is not None and "torch" not in sys.modules:
        return known
    found = device_class(resolve_device(wanted))
    if found != known and not on_gpu(found):
        with suppress(StorageError, OSError):  # the next run takes as long as this one
            write_atomic(memory, json.dumps({"format": _FORMAT, "class": found, "facts": facts}).encode())
    return found


def _facts(wanted: str) -> dict[str, str | None] | None:
    """Return what a CPU's class follows from: what was asked, torch's build, what it is told, and the instructions there.

    None where that is not all: where there may be a GPU, on an Arm, whose class follows from its vectors' length too, and where a
    system does not list instructions.
    """
    if wanted != "cpu" and any(Path(sign).exists() for sign in _GPU_SIGNS):
        return None
    flags = _listed("flags")
    if flags is None or platform.machine() != "x86_64":
        return None
    return {
        "wanted": wanted,
        "torch": metadata.version("torch"),
        "told": os.environ.get("ATEN_CPU_CAPABILITY"),
        "vendor": _cpu_vendor(),
        "flags": " ".join(flags.split()),
    }


def _recalled(memory: Path, facts: dict[str, str | None]) -> str | None:
    try:
        value = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (value.get("format"), value.get("facts")) != (_FORMAT, facts):
        return None
    known = value.get("class")
    return known if isinstance(known, str) else None


def on_gpu(device_class: str) -> bool:
    """Say whether a device class is a GPU's."""
    return device_class.startswith("cuda")


def attested(device: str) -> tuple[str, str]:
    """Return what an attestation says of a device: its class, and torch's version."""
    import torch

    return device_class(device), str(torch.__version__)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the rate of a large matrix product, FLOP/s, on all of torch's threads: the best of some tenths of a second."""
    import torch

    rows = 1024 if device == "cpu" else 8192
    one, two = (torch.ones((rows, rows), dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    ends = time.perf_counter() + _MEASURED_S
    while time.perf_counter() < ends or not best:
        began = time.perf_counter()
        torch.mm(one, two)
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = max(best, 2 * rows**3 / (time.perf_counter() - began))
    return best


def bf16_instructions() -> str:
    """Return by what this CPU multiplies bf16: ``AMX`` or ``BF16``, and nothing where it can't: there it is slower than fp32.

    Nothing too where torch may not use AVX-512 (``ATEN_CPU_CAPABILITY``): it has bf16 attention for that alone.
    """
    import torch

    flags = (_listed("flags", "Features") or "").split()
    if "bf16" in flags:  # Arm's
        return "BF16"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ""
    return "AMX" if "amx_bf16" in flags else "BF16" if "avx512_bf16" in flags else ""


def has_bf16() -> bool:
    """Say whether this CPU has instructions for bf16 products."""
    return bool(bf16_instructions())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _listed(*names: str) -> str | None:
    """Return what the system lists of the first core under one of these names; None where it does not."""
    return next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith(names)), None)


def _cpu_vendor() -> str:
    vendor = _listed("vendor_id", "CPU implementer")
    return (platform.processor() or "unknown") if vendor is None else vendor
