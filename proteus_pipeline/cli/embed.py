"""``proteus embed``: embeddings of any FASTA file, through the cache and outside DVC."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "embed",
        help="embed a FASTA file, outside the pipeline",
        description="Embed FASTA with the project's settings and each KEY=VALUE; params.yaml and the pipeline stay as they are.",
    )
    this.add_argument("fasta", type=Path, metavar="FASTA", help="the sequences; plain or .gz")
    this.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse says that one is missing
        metavar="KEY=VALUE",
        help="Hydra overrides, such as embedding.pooling=cls",
    )
    this.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="write the embeddings too; OUT ends in .npz, .zarr, .parquet, .h5ad (AnnData, pooled only), .h5 (as"
        " bio_embeddings) or .pt (a folder of ID.pt files, as fair-esm's extract.py)",
    )
    this.add_argument(
        "--shard",
        metavar="I/N",
        help="only part I of N, for the tasks of a job array: the same part whoever asks, each distinct sequence in one",
    )
    this.add_argument("--json", action="store_true", help="print the counts as JSON")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import EmbeddingProgress
    from proteus_pipeline.cli.stage import told
    from proteus_pipeline.embeddings.shards import Part
    from proteus_pipeline.stages.adhoc import embed_file
    from proteus_pipeline.stages.embed import summary
    from proteus_pipeline.stages.notes import quiet
    from proteus_pipeline.stages.project import Project

    part = Part.parse(args.shard) if args.shard is not None else None
    with EmbeddingProgress("embed") as progress:
        outcome = embed_file(Project.find(), args.fasta, args.overrides, args.output, progress, part)
    if args.json:
        import json

        print(json.dumps(summary(outcome)))
    elif not quiet():
        print(told(outcome) + (f", written to {args.output}" if args.output else ""))
    return 0
