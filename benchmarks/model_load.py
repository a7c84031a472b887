"""How long from a version's name to its first embedding, the second time, and in how much memory, against fair-esm's loader?

A model of the 650M's shape with random weights is saved as fair-esm saves one, and registered from that file; both lie in a
temporary folder, which takes 6 GB. Each measurement is a process of its own, after ``import torch`` and with the files in the
page cache: fair-esm's load_model_and_alphabet_local and one protein through it; ModelCacheManager.get_or_load and the same
protein. The vectors have to agree. Memory is the process's peak, over the bytes of the weights. ``--quick`` takes the 35M's
shape, whose weights are small beside what a process holds anyway: bars are of the 650M's.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from _figures import Spread, parsed, said
from _figures import parser as of
from _processes import PEAK, printed_by
from _proteins import SHAPES

FILE = "esm2_t33_650M_UR50D.pt"  # by its name fair-esm knows what is in it
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
PROGRAM = f"""
import argparse, json, sys, time, torch
torch.set_num_threads(int(sys.argv[3]))
place, protein = sys.argv[1], sys.argv[2]
began = time.perf_counter()
LOAD
loaded = time.perf_counter()
EMBED
ended = time.perf_counter()
print(json.dumps([loaded - began, ended - loaded, {PEAK}, vector.tolist()]))
"""
THEIRS = PROGRAM.replace(
    "LOAD",
    """import esm
torch.serialization.add_safe_globals([argparse.Namespace])
model, alphabet = esm.pretrained.load_model_and_alphabet_local(place)
model.eval()""",
).replace(
    "EMBED",
    """_, _, tokens = alphabet.get_batch_converter()([("protein", protein)])
with torch.no_grad():
    hidden = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
vector = hidden[0, 1:-1].mean(0)""",
)
OURS = PROGRAM.replace(
    "LOAD",
    """from pathlib import Path
from proteus_pipeline import ModelCacheManager, ModelVersionManager
cache = ModelCacheManager(8, version_manager=ModelVersionManager(Path(place)), numerics="NUMERICS")
model = cache.get_or_load("random")""",
).replace("EMBED", "(vector,) = model.embed([protein])")


def build(folder: Path, shape: str) -> None:
    """Write the checkpoint as fair-esm does, and register it in ``home``."""
    import esm
    import torch
    from _proteins import save_as_fair_esm

    from proteus_pipeline import ModelInterface, ModelVersionManager

    torch.manual_seed(0)
    save_as_fair_esm(esm.ESM2(*SHAPES[shape]), folder / FILE)
    manager = ModelVersionManager(folder / "home")
    version = manager.register_version(ModelInterface("random", manager, weights=folder / FILE), "1.0.0")
    print(sum(path.stat().st_size for name, path in version.files.items() if name.endswith(".safetensors")))


class Run(NamedTuple):
    """One process: seconds to load and to embed, KiB at the peak, and the vector."""

    load: float
    embed: float
    peak: int
    vector: list[float]

    @property
    def total(self) -> float:
        return self.load + self.embed


def measure(program: str, place: Path, residues: int, threads: int) -> Run:
    protein = (PROTEIN * (residues // len(PROTEIN) + 1))[:residues]
    return Run(*printed_by(program, place, protein, str(threads)))


def spread(ratios: list[float]) -> Spread:
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def main() -> None:
    parser = of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="650M", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--residues", type=int, default=len(PROTEIN))
    args = parsed(parser, rounds=2, shape="35M")
    with tempfile.TemporaryDirectory(prefix="model-load-") as name:
        folder = Path(name)
        # In a process of its own: its memory would be counted as its children's otherwise.
        build_it = [sys.executable, __file__, "--build", name, args.shape]
        built = subprocess.run(build_it, check=True, capture_output=True, text=True)
        weights = int(built.stdout)
        sides = {"fair-esm": (THEIRS, folder / FILE)} | {
            numerics: (OURS.replace("NUMERICS", numerics), folder / "home") for numerics in ("strict", "tolerant")
        }
        runs: dict[str, list[Run]] = {side: [] for side in sides}
        for round_ in range(args.rounds + 1):
            for side, (program, place) in sides.items():
                run = measure(program, place, args.residues, args.threads)
                if round_:  # the first brings the files into the page cache
                    runs[side].append(run)
    print(
        f"{weights / 1e9:.2f} GB, a protein of {args.residues} residues, {args.threads} threads, medians of {args.rounds}"
    )
    theirs = runs["fair-esm"]
    for side, mine in runs.items():
        load, embed = (statistics.median(r[i] for r in mine) for i in (0, 1))
        loads = [t.load / m.load for t, m in zip(theirs, mine, strict=True)]
        totals = [t.total / m.total for t, m in zip(theirs, mine, strict=True)]
        apart = max(abs(a - b) for a, b in zip(theirs[0].vector, mine[0].vector, strict=True))
        peak = max(r.peak for r in mine) * 1024 / weights
        print(f"{side:<9} loaded in {load:5.2f} s, embedded in {embed:5.2f} s; vectors apart {apart:.1e}")
        whole = args.shape == "650M"
        if side != "fair-esm":
            said(f"{args.shape} {side}: loading, our speed over fair-esm's", spread(loads))
            said(
                f"{args.shape} {side}: to an embedding, our speed over fair-esm's", spread(totals), 5 if whole else None
            )
        said(
            f"{args.shape} {side}: peak of memory over the weights",
            peak,
            1.2 if whole and side != "fair-esm" else None,
            least=False,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
