"""What does a version cost in bytes?

Of weights: a model of 33 layers is registered, and again with other tensors in one of its blocks; what the second version
adds to the DVC cache and to a DVC remote in a folder, of its bytes. Of git: 10,000 versions' records, each on a commit
of its own with a pointer of its own, over 20 models in a copy of this project, after ``git gc``.

It takes 3 GB of a temporary folder; ``--quick`` takes 1,000 versions for the 10,000.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from _figures import parsed, parser, said
from _registrations import Given, copy_project, random_model, register_many

from proteus_pipeline import ModelVersionManager
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.supply import send

LAYERS, WIDTH, BLOCK = 33, 320, 16
PART = 0.06
VERSIONS, VERSIONS_QUICK = 10000, 1000
BYTES_EACH = 1000
KINDS = ("tag", "commit", "tree", "blob")


def weights(folder: Path) -> None:
    """Register two versions that differ in one block; print what the second one adds."""
    remote = folder / "remote"
    manager = ModelVersionManager(folder / "home")
    root = manager.ensure_home().root
    dvc = Path(sys.executable).with_name("dvc")
    subprocess.run([dvc, "remote", "add", "--quiet", "--default", "there", remote], cwd=root, check=True)
    first = random_model("tuned", LAYERS, WIDTH)
    changed = {name: t + 1 if f".layer.{BLOCK}." in name else t for name, t in first.checkpoint.tensors.items()}
    second = Given("tuned", Checkpoint(first.checkpoint.architecture, changed), first.source)
    places, seen = {"DVC cache": root / ".dvc" / "cache" / "files", "DVC remote": remote}, Counter[str]()
    for number, model in (("1.0.0", first), ("1.0.1", second)):
        version = manager.register_version(model, number)
        send(root, version.pointer, version.reference)
        for name, place in places.items():
            held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            added, seen[name] = held - seen[name], held
            part = added / version.pointer.size
            print(f"v{number} of {version.pointer.size / 1e6:.1f} MB adds {added:,} bytes to the {name}: {part:.2%}")
            if number != "1.0.0":
                said(f"{name}: what a change of one block in {LAYERS} adds, of the weights", part, PART, least=False)


def packed(git: Git) -> int:
    """Return the bytes of git's packs and their indexes after ``git gc``."""
    git.run("gc", "--quiet")
    counted = dict(line.split(": ") for line in git.run("count-objects", "-v").split("\n"))
    if counted["count"] != "0":
        raise SystemExit(f"git gc left {counted['count']} objects loose")
    return int(counted["size-pack"]) * 1024


def objects(git: Git) -> Counter[str]:
    """Return the bytes in the packs by kind of object."""
    listed = git.run("cat-file", "--batch-check=%(objecttype) %(objectsize:disk)", "--batch-all-objects").split("\n")
    sizes = Counter[str]()
    for kind, size in (line.split(" ") for line in listed):
        sizes[kind] += int(size)
    return sizes


def records(folder: Path, total: int) -> None:
    """Register thousands of versions; print what they add to git."""
    git = copy_project(folder / "project")
    before, kinds_before = packed(git), objects(git)
    register_many(git, total)
    added = packed(git) - before
    kinds = objects(git) - kinds_before
    refs = (git.folder() / "packed-refs").stat().st_size
    print(f"{total:,} versions add {added / 1024:,.0f} KiB, {added / 1e6:.2f} MB, of git objects")
    parts = ", ".join(f"{kind} {kinds[kind] / total:.0f}" for kind in KINDS)
    print(
        f"  a version: {parts}, the pack's index {(added - kinds.total()) / total:.0f}; its two refs {refs / total:.0f}, packed"
    )
    said(f"bytes of git's packs a version, of {total:,}", added / total, BYTES_EACH, least=False)


def main() -> None:
    quick = parsed(parser(__doc__)).quick
    with tempfile.TemporaryDirectory(prefix="registry-storage-") as folder:
        weights(Path(folder))
        records(Path(folder), VERSIONS_QUICK if quick else VERSIONS)


if __name__ == "__main__":
    main()
