"""How long does `proteus model list` take beside git's own listing?

A repository of 1,000 versions over 20 models, and one of 10,000. Whole processes in turn: ``git for-each-ref``, plain and
with the format that reads what the tags say; and ours, after a registration, once more with nothing new, and as the first
listing ever, each less the interpreter's start (``python -c pass`` of the same environment). All as registrations leave a
repository, each object and ref a file, and after ``git gc``. The bar is beside plain git, as registered; the first listing
is outside it.

It takes 3 GB of a temporary folder; ``--quick`` takes 2,000 versions for the 10,000, and leaves gto out.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from _figures import parsed, parser, said
from _registrations import copy_project, register_many

from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.refs import LEDGER, publish

FEW, MANY = 1000, 10000
MANY_QUICK = 2000
ROUNDS, FIRSTS = 7, 2
BAR = 3
BIN = Path(sys.executable).parent
OURS = {"again": "nothing new", "new": "after a registration", "first": "the first"}
SIDES = ("git", "contents", *OURS)
CONTENTS = "--format=%(objectname)%(refname)%(contents)"


@dataclass(frozen=True)
class Repository:
    """A repository to list, and tag objects of versions that no ref names yet."""

    git: Git
    spare: list[tuple[str, str]]

    def register_another(self) -> None:
        tag, oid = self.spare.pop()
        if not publish(self.git, {tag: oid}):
            raise SystemExit(f"{tag} is there already")


def prepare(root: Path, total: int, more: int) -> Repository:
    """Return a repository of `total` versions, and the objects of `more`."""
    git = copy_project(root)
    register_many(git, total + more)
    last = ("--sort=-taggerdate", f"--count={more}", "--format=%(refname:strip=2) %(objectname)", "refs/tags/")
    spare = [(tag, oid) for tag, oid in (line.split(" ") for line in git.run("for-each-ref", *last).split("\n"))]
    gone = [ref for tag, _ in spare for ref in (f"refs/tags/{tag}", LEDGER + tag)]
    git.run("update-ref", "--stdin", data="".join(f"delete {ref}\n" for ref in gone))
    return Repository(git, spare)


def seconds(*command: str) -> float:
    """Return how long a command takes; what it prints is thrown away."""
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    began = time.perf_counter()
    status = os.waitpid(os.posix_spawnp(command[0], command, ENVIRONMENT, file_actions=silent), 0)[1]
    took = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return took


def one_round(repository: Repository, *, first: bool) -> dict[str, float]:
    root = repository.git.root
    git, ours = ("git", "-C", str(root), "for-each-ref"), (str(BIN / "proteus"), "model", "list", "--home", str(root))
    repository.register_another()
    start = seconds(str(BIN / "python"), "-c", "pass")
    took = {"git": seconds(*git), "contents": seconds(*git, CONTENTS)}
    took |= {"new": seconds(*ours) - start, "again": seconds(*ours) - start}
    if first:
        (root / ".proteus" / "listing").unlink()
        took["first"] = seconds(*ours) - start
    return took


def compare(state: str, few: Repository, many: Repository, total_many: int) -> float:
    """Print each side's median, times git's, and how they grow; return the worse of the ratios that the bar is of."""
    rounds = [[one_round(r, first=n < FIRSTS) for r in (few, many)] for n in range(-1, ROUNDS)][1:]  # one to warm up
    print(f"{state}:")
    medians: dict[str, list[float]] = {}
    for place, total in enumerate((FEW, total_many)):
        measured = [pair[place] for pair in rounds]
        for side in SIDES:
            medians.setdefault(side, []).append(statistics.median(r[side] for r in measured if side in r))
        git, contents = medians["git"][place], medians["contents"][place]
        print(f"  {total:,} versions: git for-each-ref {git:.4f} s, with the tags' contents {contents:.4f} s")
        for side, words in OURS.items():
            beside = (
                statistics.median(r[side] / r[other] for r in measured if side in r) for other in ("git", "contents")
            )
            print(
                "    proteus model list, {}: {:.4f} s, {:.2f} of plain, {:.2f} of contents".format(
                    words, medians[side][place], *beside
                )
            )
    growth = {side: many_ / few_ for side, (few_, many_) in medians.items()}
    print(
        f"  {total_many // FEW} times the versions take: "
        + ", ".join(f"{side} {times:.1f}" for side, times in growth.items())
    )
    worst = max(growth[side] for side in OURS)
    said(f"{state}: {total_many // FEW} times the versions take, at the worst", worst, total_many / FEW, least=False)
    return max(medians[side][0] / medians["git"][0] for side in ("again", "new"))


def main() -> None:
    quick = parsed(parser(__doc__)).quick
    most = MANY_QUICK if quick else MANY
    with tempfile.TemporaryDirectory(prefix="registry-listing-") as folder:
        ENVIRONMENT["PYTHONPYCACHEPREFIX"] = str(Path(folder, "compiled"))
        few, many = (prepare(Path(folder, str(total)), total, 2 * (ROUNDS + 1)) for total in (FEW, most))
        worst = compare("as registered", few, many, most)
        said(f"proteus model list of {FEW:,} versions, our time over plain git's", worst, BAR, least=False)
        if not quick:
            ours = seconds(str(BIN / "proteus"), "model", "list", "--home", str(few.git.root))
            theirs = seconds(str(BIN / "gto"), "show", "--repo", str(few.git.root))
            said(f"listing {FEW:,} versions, our speed over gto show's", theirs / ours)
        for repository in (few, many):
            repository.git.run("gc", "--quiet")
        compare("after git gc", few, many, most)


# As an installed package is: compiled once, also where the environment says that nothing compiled is kept.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

if __name__ == "__main__":
    main()
