"""``proteus verify``: a stranger's check of a result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteus_pipeline.stages.verifying import Verification

_DESCRIPTION = """\
Check a committed result in a clone of its project: fetch the weights, make the sequences again from the input files, compute
a sample of them past the cache, and compare with the manifest; where the sample is everything, the metrics too.
On the device class that the manifest names, bits must agree; on another one, embeddings within a tolerance that is printed.
"""
_EPILOG = """\
exit codes: 0 everything agrees, 3 something differs, 4 a file or weights are damaged, 1 and 2 as everywhere
"""
_SHOWN = 20


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "verify",
        help="check a committed result: weights, sequences, embeddings, metrics",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    this.add_argument("manifest", nargs="?", type=Path, metavar="MANIFEST", help="default: results/embeddings.json")
    this.add_argument(
        "--sample", type=_count, metavar="N", help="sequences to compute again; default: all of up to 200"
    )
    this.add_argument("--seed", type=int, metavar="S", help="which of them; default: a random one, which is printed")
    this.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N, instead of runtime.device")
    this.add_argument("--json", action="store_true", help="print JSON")
    this.set_defaults(run=_run)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of sequences")
    return number


def _run(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import DownloadProgress, EmbeddingProgress
    from proteus_pipeline.cli.verbs import plain, print_json
    from proteus_pipeline.stages.notes import note
    from proteus_pipeline.stages.project import Project, commit_of
    from proteus_pipeline.stages.verifying import verify

    project = Project.find()
    if commit_of(project.home)["dirty"]:
        note("tracked files differ from HEAD; what is checked is the working tree")
    with EmbeddingProgress("verify") as progress:
        done = verify(
            project,
            args.manifest,
            sample=args.sample,
            seed=args.seed,
            device=args.device,
            progress=progress,
            fetching=DownloadProgress("fetching weights"),
        )
    if args.json:
        print_json(plain(done) | {"agrees": not done.differences, "remedies": done.remedies})
    else:
        print(_told(done))
    return 3 if done.differences else 0


def _told(done: Verification) -> str:
    """Return what was found for people."""
    from proteus_pipeline.cli.verbs import shown

    lines = [f"{done.manifest}: {done.sequences} sequences, {done.model}"]
    lines.append(f"  made on       {', '.join(done.made_on) or 'nothing'}")
    seed = f", seed {done.seed}" if done.recomputed < done.sequences else ""
    lines.append(f"  checked on    {done.device_class}: {done.recomputed} sequences computed again{seed}")
    agree = [f"{done.equal} equal bit for bit"]
    if done.near:
        agree.append(f"{done.near} within {done.tolerance:.1e} (relative L2, for another device class), "
                     f"the farthest at {done.farthest:.1e}")  # fmt: skip
    lines += [f"  embeddings    {', '.join(agree)}", f"  metrics       {done.metrics}"]
    lines += [f"differs: {d}" for d in done.differences[:_SHOWN]]
    if len(done.differences) > _SHOWN:
        lines.append(f"and {len(done.differences) - _SHOWN} more; --json lists them all")
    lines += [f"do: {text}" for text in done.remedies]
    if not done.differences:
        what = "everything" if done.recomputed == done.sequences else "all that was looked at"
        how = ", within the tolerance: bit for bit is for the device class that made it" if done.near else ""
        lines.append(f"{what} agrees{how}")
    return "\n".join(shown(line) for line in lines)
