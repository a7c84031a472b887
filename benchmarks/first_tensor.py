"""How long from a version's name to its first tensor, and in how much memory, against torch.load of the same tensors?

A checkpoint of the 650M's shape with random weights is registered in a home of its own, and saved as one .pt; both in a
temporary folder, which takes 8 GB. Each measurement is a process of its own, after ``import torch`` and with the files in
the page cache: torch.load (weights_only, whole, its default) to one tensor; ModelVersionManager.get_version to the same
tensor, checked against the version's record. The import of this package is timed by itself. Memory is the peak of the
second before a tensor is touched, that import included, above a process that only imported torch. ``--quick`` takes the
35M's shape, and 0.4 GB.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from _figures import Spread, parsed, parser, said
from _processes import PEAK, printed_by
from _proteins import SHAPES

TENSOR = "esm.encoder.layer.5.output.dense.weight"
PROGRAM = f"""
import json, sys, time, torch
place, name = sys.argv[1:]
peak, began = {PEAK}, time.perf_counter()
IMPORT
imported = time.perf_counter()
tensors = OPEN
opened = {PEAK}
tensor = tensors[name]
print(json.dumps([time.perf_counter() - imported, imported - began, opened - peak, float(tensor[0, 0])]))
"""
LOAD = PROGRAM.replace("IMPORT", "").replace("OPEN", 'torch.load(place, weights_only=True)["model"]')
OURS = PROGRAM.replace("IMPORT", "from proteus_pipeline import ModelVersionManager").replace(
    "OPEN", 'ModelVersionManager(place).get_version("random", "1.0.0").checkpoint.tensors'
)


def build(folder: Path, shape: str) -> None:
    """Write the checkpoint's two forms: the registry ``home``, and ``model.pt``."""
    import torch
    from _registrations import Given

    from proteus_pipeline import ModelVersionManager
    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.models.checkpoint import Checkpoint, trunk_shapes

    layers, width, heads = SHAPES[shape]
    architecture = Architecture(layers, width, heads, 4 * width)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.rand(shape, generator=generator) for n, shape in trunk_shapes(architecture).items()}
    model = Given("random", Checkpoint(architecture, tensors), {})
    ModelVersionManager(folder / "home").register_version(model, "1.0.0")
    torch.save({"model": tensors}, folder / "model.pt")
    print(f"{sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB in {len(tensors)} tensors")


class Run(NamedTuple):
    """One process: seconds to the tensor and for imports before it, KiB of memory, and the tensor's first value."""

    seconds: float
    imports: float
    memory: int
    value: float


def measure(program: str, place: Path) -> Run:
    return Run(*printed_by(program, place, TENSOR))


def main() -> None:
    told = parser(__doc__)
    told.add_argument("--rounds", type=int, default=5)
    told.add_argument("--shape", default="650M", choices=SHAPES)
    args = parsed(told, rounds=3, shape="35M")
    with tempfile.TemporaryDirectory(prefix="first-tensor-") as folder:
        # In a process of its own: its memory would be counted as its children's otherwise.
        subprocess.run([sys.executable, __file__, folder, args.shape], check=True)
        loads, ours = [], []
        for round_ in range(args.rounds + 1):
            load, our = measure(LOAD, Path(folder, "model.pt")), measure(OURS, Path(folder, "home"))
            if load.value != our.value:
                raise SystemExit(f"{TENSOR} differs")
            if round_:  # the first brings the files into the page cache
                loads.append(load)
                ours.append(our)
    ratios = [load.seconds / our.seconds for load, our in zip(loads, ours, strict=True)]
    theirs, mine = (statistics.median(run.seconds for run in side) for side in (loads, ours))
    imports = statistics.median(run.imports for run in ours)
    print(f"torch.load {theirs:.2f} s, a version {mine:.3f} s to {TENSOR}, medians of {args.rounds}")
    print(f"importing the package {imports:.3f} s")
    said(
        f"{args.shape}: our speed to a tensor over torch.load's",
        Spread(statistics.median(ratios), min(ratios), max(ratios)),
    )
    said(f"{args.shape}: the same, our import included", theirs / (mine + imports))
    said("memory before a tensor is touched, MiB above torch's own", max(our.memory for our in ours) / 1024)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] in SHAPES and Path(sys.argv[1]).is_dir():
        build(Path(sys.argv[1]), sys.argv[2])
    else:
        main()
