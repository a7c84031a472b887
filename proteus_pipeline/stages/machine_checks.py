"""What ``proteus doctor`` looks at of the machine: packages, git, devices, memory; and the sizes that it recommends."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.registry.git import Git
from proteus_pipeline.stages.looking import FAIL, OK, WARN, Check, Here, Look
from proteus_pipeline.stages.project import installed

_PYTHON, _GIT = (3, 11), (2, 30)
_SHOWN = ("proteus_pipeline", "torch", "dvc", "zarr", "numpy")
# The official models, the largest first: layers, width, heads, width of the feed-forward.
_MODELS = {
    "esm2_t48_15B_UR50D": Architecture(48, 5120, 40, 20480),
    "esm2_t36_3B_UR50D": Architecture(36, 2560, 40, 10240),
    "esm2_t33_650M_UR50D": Architecture(33, 1280, 20, 5120),
    "esm2_t30_150M_UR50D": Architecture(30, 640, 20, 2560),
    "esm2_t12_35M_UR50D": Architecture(12, 480, 20, 1920),
    "esm2_t6_8M_UR50D": Architecture(6, 320, 20, 1280),
}
_USUAL = _MODELS["esm2_t33_650M_UR50D"]
# Of memory, for models: the rest is for what a run reads and writes, and for others.
_SHARE_OF_MEMORY = 0.75
_SHARE_OF_DISK = 0.5
_SHARE_OF_A_GPU = 0.25
_MOST_TOKENS = 65536


def _python(_: Here) -> Iterator[Check]:
    version = platform.python_version()
    if sys.version_info < _PYTHON:
        yield Check("python", FAIL, f"Python {version}", "use 3.11 or later")
    else:
        yield Check("python", OK, f"Python {version}, {sys.prefix}")


def _packages(_: Here) -> Iterator[Check]:
    from packaging.requirements import Requirement

    broken = False
    for text in metadata.requires("proteus_pipeline") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = installed(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            broken = True
            what = f"{wanted.name} {found or 'is missing'}, and {wanted.name}{wanted.specifier} is needed"
            yield Check("packages", FAIL, what, f"pip install '{wanted.name}{wanted.specifier}'")
    if not broken:
        yield Check("packages", OK, ", ".join(f"{name} {installed(name)}" for name in _SHOWN))


def _git(here: Here) -> Iterator[Check]:
    if shutil.which("git") is None:
        yield Check("git", FAIL, "git is not installed", "install git, 2.30 or later")
        return
    text = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    if found and (int(found[1]), int(found[2])) < _GIT:
        yield Check("git", WARN, f"{text.strip()}: it is not tested with versions before 2.30", "upgrade git")
    else:
        yield Check("git", OK, text.strip())
    who = Git(here.root).identity()
    if who.fallback:
        remedy = "git config --global user.name NAME, and user.email"
        yield Check("identity", WARN, f"git knows no name here: tags and commits are by {who.email}", remedy)
    else:
        yield Check("identity", OK, f"{who.name} <{who.email}>")


def _devices(_: Here) -> Iterator[Check]:
    import torch

    from proteus_pipeline.models.device import device_class, has_bf16

    bf16 = "bf16 products" if has_bf16() else "no bf16 products: mixed and bf16 are no faster than fp32"
    yield Check("cpu", OK, f"{device_class('cpu')}, {torch.get_num_threads()} threads, {bf16}")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            kind = device_class(f"cuda:{number}")
            yield Check("gpu", OK, f"cuda:{number} is {found.name}, {found.total_memory / 1e9:.0f} GB, {kind}")
    elif Path("/proc/driver/nvidia").exists():
        what = f"there is an NVIDIA GPU, and torch {torch.__version__} does not see it"
        yield Check("gpu", WARN, what, "install torch for this driver's CUDA: pip install torch, from its CUDA index")
    else:
        yield Check("gpu", OK, "none; embeddings are computed on the CPU")


def _memory(_: Here) -> Iterator[Check]:
    from proteus_pipeline.serving.settings import cgroup_limit, memory_bytes

    total, cap = memory_bytes(), cgroup_limit()
    group = "no cgroup limit" if cap is None or cap >= total else f"{cap / 1e9:.1f} GB by its cgroup"
    yield Check("memory", OK, f"{total / 1e9:.1f} GB, {group}")


def _sizes(here: Here) -> Iterator[Check]:
    from proteus_pipeline.models.encoder import TOKENS_PER_BATCH, weight_bytes
    from proteus_pipeline.serving.calls import Call
    from proteus_pipeline.serving.settings import cgroup_limit, memory_bytes

    limit = min(memory_bytes(), cgroup_limit() or memory_bytes())
    memory = _SHARE_OF_MEMORY * limit
    call = Call.usual(TOKENS_PER_BATCH, "cpu")
    takes = {n: weight_bytes(a, "fp32") + call.nbytes(a, TOKENS_PER_BATCH, "cpu") for n, a in _MODELS.items()}
    fits = next((name for name, size in takes.items() if size <= memory), "none of the official models")
    why = f"three quarters of {limit / 1e9:.1f} GB; {fits} is the largest that has room, in fp32, with a call of whole batches"
    yield Check("sizes", OK, f"runtime.max_memory_gb={memory / 1e9:.1f}: {why}")
    free = shutil.disk_usage(_existing(here.root)).free
    disk = int(_SHARE_OF_DISK * free / 1e9) * 10**9
    if disk:
        vectors = f"{disk / (4 * _USUAL.width) / 1e6:,.0f} million vectors of the 650M model in fp32"
        yield Check("sizes", OK, f"cache.max_bytes={disk}: half of the {free / 1e9:,.0f} GB that are free; {vectors}")
    else:
        yield Check(
            "sizes", WARN, f"{free / 1e9:.1f} GB are free for a cache", "free space, or set cache.path elsewhere"
        )
    yield _batches(TOKENS_PER_BATCH)


def _batches(default: int) -> Check:
    import torch

    from proteus_pipeline.models.shapes import GPU_TILE
    from proteus_pipeline.serving.calls import Call

    if not torch.cuda.is_available():
        why = "enough for large products, and few enough that a batch stays small"
        return Check("sizes", OK, f"runtime.tokens_per_batch={default}: {why}")
    room = _SHARE_OF_A_GPU * torch.cuda.get_device_properties(0).total_memory
    tokens = GPU_TILE
    while tokens < _MOST_TOKENS and Call.usual(2 * tokens, "cuda").nbytes(_USUAL, 2 * tokens, "cuda") <= room:
        tokens *= 2
    why = "with the 650M model, a call takes at most a quarter of the GPU's memory"
    return Check("sizes", OK, f"runtime.tokens_per_batch={tokens}: {why}")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


LOOKS: dict[str, Look] = {
    "python": _python,
    "packages": _packages,
    "git": _git,
    "devices": _devices,
    "memory": _memory,
    "sizes": _sizes,
}
