"""``proteus init``: a new project."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Make a project in DIR, a new or empty folder: a git repository with DVC, all settings in conf/, the pipeline in dvc.yaml, and
proteins: your own (--fasta), or 100 of Swiss-Prot. The first proteus run (or dvc repro) fetches the weights.
"""


def add_to(verbs: Any) -> None:
    this = verbs.add_parser("init", help="make a project of your own", description=_DESCRIPTION)
    this.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder, outside of any git repository")
    this.add_argument(
        "--model",
        metavar="NAME",
        help="a model of the catalogue, such as esm2_t33_650M_UR50D; by default a small demonstration model",
    )
    this.add_argument("--fasta", type=Path, metavar="FILE", help="your proteins, plain or gzip; copied into data/")
    this.add_argument("--labels", type=Path, metavar="CSV", help="their labels: columns id, target and perhaps group")
    this.add_argument("--json", action="store_true", help="print JSON")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import shlex

    from proteus_pipeline.cli.verbs import plain, print_json, shown
    from proteus_pipeline.stages.new_project import create
    from proteus_pipeline.stages.notes import note

    made = create(args.folder, model=args.model, fasta=args.fasta, labels=args.labels)
    if args.json:
        print_json(plain(made) | {"root": str(made.root.absolute())})
        return 0
    print(shown(f"{made.root}: {made.sequences} proteins of {made.fasta}, {made.model}"))
    print(f"next:\n  cd {shown(shlex.quote(str(made.root)))}\n  proteus run")
    for text in made.notes:
        note(shown(text))
    return 0
