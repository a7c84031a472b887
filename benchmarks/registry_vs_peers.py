"""How long do registering, listing and reading versions take beside doing it by hand, with dvc and gto?

Two repositories, one of a person with DVC and GTO, one of this registry, and in each round new weights of ESM-2 8M's shape
for both. Registering: ``dvc add``, ``git commit`` and ``gto register``, against ``proteus model register``, which also digests
every tensor and writes a record. Listing, at the end: ``gto show`` against ``proteus model list``. Reading: ``dvc get`` of the
oldest version and safetensors' load, against a process that opens the version and touches, and so checks, every tensor. All
are whole processes, with what their interpreters take to start, the sides in an order by chance.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from _figures import Taken, in_turn, one_round, parsed, parser, said
from _proteins import SHAPES, random_weights

from proteus_pipeline.models.folder import write_folder

NAME = "tuned"
CHANGED = "esm.encoder.layer.1.output.dense.weight"
BIN = Path(sys.executable).parent
LOAD = """
import sys
from pathlib import Path
from safetensors.torch import load_file
print(sum(float(t.view(-1)[0]) for p in sorted(Path(sys.argv[1]).rglob("*.safetensors")) for t in load_file(p).values()))
"""
OPEN = """
import sys
from proteus_pipeline import ModelVersionManager
tensors = ModelVersionManager(sys.argv[1]).get_version(sys.argv[2], sys.argv[3]).checkpoint.tensors
print(sum(float(tensors[name].view(-1)[0]) for name in tensors))
"""
# Somebody, wherever this runs; compiled once, as installed packages are.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "A User"), ("EMAIL", "user@example.org"))
}


def call(root: Path, *command: str | Path) -> str:
    """Run a command in a folder, and return what it printed."""
    done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {done.stderr.strip()}")
    return done.stdout


def by_hand(root: Path, weights: Path, number: str) -> None:
    """Register weights as a person does with DVC and GTO."""
    place = root / "models" / NAME
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(weights, place)
    call(root, BIN / "dvc", "add", "--quiet", f"models/{NAME}")
    call(root, "git", "add", "--all")
    call(root, "git", "commit", "--quiet", "--message", number)
    call(root, BIN / "gto", "register", NAME, "--version", f"v{number}")


def by_us(home: Path, weights: Path, number: str) -> None:
    call(
        home.parent,
        BIN / "proteus",
        "model",
        "register",
        NAME,
        "--version",
        number,
        "--weights",
        weights,
        "--home",
        home,
    )


def get_by_hand(root: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    call(root, BIN / "dvc", "get", "--quiet", ".", f"models/{NAME}", "--rev", f"{NAME}@v1.0.0", "--out", out)
    return float(call(root, sys.executable, "-c", LOAD, out))


def get_by_us(home: Path) -> float:
    return float(call(home.parent, sys.executable, "-c", OPEN, home, NAME, "1.0.0"))


def prepare(folder: Path) -> tuple[Path, Path]:
    """Return the two repositories; the other one's is made by the first registration."""
    root = folder / "by hand"
    root.mkdir()
    call(root, "git", "init", "--quiet", "--initial-branch=main")
    call(root, BIN / "dvc", "init", "--quiet")
    call(root, BIN / "dvc", "config", "core.analytics", "false")
    call(root, "git", "add", "--all")
    call(root, "git", "commit", "--quiet", "--message", "begun")
    return root, folder / "ours"


def main() -> None:
    of = parser(__doc__)
    of.add_argument("--rounds", type=int, default=5)
    of.add_argument("--shape", default="8M", choices=SHAPES)
    args = parsed(of, rounds=2)
    taken, order = Taken(), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="registry-vs-peers-") as name:
        folder = Path(name)
        root, home = prepare(folder)
        checkpoint = random_weights(args.shape)
        for number in range(args.rounds + 1):
            changed = {CHANGED: checkpoint.tensors[CHANGED] + 1}
            checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **changed})
            weights = folder / "weights"
            shutil.rmtree(weights, ignore_errors=True)
            write_folder(checkpoint, weights)
            sides = {
                "dvc and gto": lambda n=number: by_hand(root, weights, f"1.0.{n}"),  # noqa: B023 - called in this round
                "ours": lambda n=number: by_us(home, weights, f"1.0.{n}"),  # noqa: B023
            }
            seconds = one_round(sides, order)
            if number:  # the first warms up
                taken.add(seconds)
        assert get_by_hand(root, folder / "out") == get_by_us(home)
        print(f"{args.rounds + 1} versions of {args.shape}; registering: {taken}")
        reading = in_turn(
            {"dvc get": lambda: get_by_hand(root, folder / "out"), "ours": lambda: get_by_us(home)}, args.rounds
        )
        print(f"  reading: {reading}")
        list_ours = (BIN / "proteus", "model", "list", NAME, "--home", home)
        listing = in_turn(
            {"gto show": lambda: call(root, BIN / "gto", "show", NAME), "ours": lambda: call(folder, *list_ours)},
            args.rounds,
        )
        print(f"  listing: {listing}")
    said("registering, our speed over dvc add, git commit and gto register", taken.ratio("dvc and gto", "ours"))
    said("every tensor of an old version, our speed over dvc get and a load", reading.ratio("dvc get", "ours"))
    said("listing a model's versions, our speed over gto show's", listing.ratio("gto show", "ours"))


if __name__ == "__main__":
    main()
