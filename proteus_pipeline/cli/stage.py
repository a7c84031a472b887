"""``proteus stage NAME``: what dvc.yaml calls."""

from __future__ import annotations

import argparse
import importlib
import time
from typing import TYPE_CHECKING, Any

from proteus_pipeline.cli.verbs import shown
from proteus_pipeline.stages.wording import by_class

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.embedder import Outcome

NAMES = ("compose", "prepare", "embed", "probe", "compare", "contacts", "report")


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "stage",
        help="run one stage of the pipeline; dvc.yaml calls this",
        description="Run one stage of the pipeline here, on what the stages before it wrote; dvc.yaml calls this.",
    )
    this.add_argument("name", choices=NAMES, help="the stage, as dvc.yaml calls it")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import DownloadProgress, EmbeddingProgress
    from proteus_pipeline.stages.notes import quiet
    from proteus_pipeline.stages.project import Project

    module = importlib.import_module(f"proteus_pipeline.stages.{args.name}")
    project = Project.find()
    started = time.perf_counter()
    if args.name == "compose":
        module.run(project, DownloadProgress("fetching weights"))
    elif args.name in {"embed", "compare"}:
        with EmbeddingProgress(args.name) as progress:
            outcome = module.run(project, progress)
        if outcome is not None and not quiet():
            print(told(outcome))
    else:
        module.run(project)
    project.record_time(args.name, time.perf_counter() - started)
    return 0


def told(outcome: Outcome) -> str:
    """Return an outcome as a sentence."""
    redis = f" ({outcome.from_redis} from Redis)" if outcome.from_redis else ""
    text = (
        f"{outcome.sequences} sequences: {outcome.hits} hits{redis}, {outcome.derived} derived, "
        f"{outcome.computed} computed in {outcome.seconds:.1f} s"
    )
    if outcome.workers:
        text += f" on {outcome.workers} worker{'s' if outcome.workers > 1 else ''}"
    if twins := outcome.sequences - outcome.unique:
        text += f" ({twins} of them equal to another)"
    elsewhere = shown(by_class(outcome.other_classes))
    return f"{text}; from other device classes: {elsewhere}" if elsewhere else text
