"""``proteus run``: the pipeline with other choices."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from proteus_pipeline.cli.verbs import shown
from proteus_pipeline.stages.wording import by_class

if TYPE_CHECKING:
    from proteus_pipeline.stages.pipeline import RunSummary


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "run",
        help="run the pipeline: params.yaml, then dvc repro",
        description="Write each KEY=VALUE to params.yaml, as dvc exp run -S does, and run dvc repro.",
    )
    this.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as embedding.layer=4")
    this.add_argument("--force", action="store_true", help="run every stage, also where nothing changed")
    this.add_argument(
        "--locked", action="store_true", help="stop (exit 3) where a reference no longer means what models.lock says"
    )
    this.add_argument("--update", action="store_true", help="first lock floating references to what they mean now")
    this.add_argument("--json", action="store_true", help="print the summary as JSON")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import DownloadProgress
    from proteus_pipeline.stages.notes import note, quiet
    from proteus_pipeline.stages.pipeline import run_pipeline
    from proteus_pipeline.stages.project import RUN, Project, commit_of

    project = Project.find()
    if commit_of(project.home)["dirty"]:
        note(f"tracked files differ from HEAD; {RUN} will say so")
    progress = DownloadProgress("fetching weights")
    summary = run_pipeline(project, args.overrides, progress, locked=args.locked, update=args.update, force=args.force)
    if args.json:
        import json

        print(json.dumps({"stages": summary.stages, "seconds": summary.seconds}, indent=1, sort_keys=True))
    elif not quiet():
        print(_table(summary, project.work.name))
    return 0


def _table(summary: RunSummary, name: str) -> str:
    """Return the summary for people."""
    lines = ["", f"{name}: done in {summary.seconds:.1f} s", ""]
    lines.append(f"  {'stage':<9}{'sequences':>10}{'hits':>8}{'derived':>9}{'computed':>10}{'seconds':>9}")
    for stage, facts in summary.stages.items():
        if "computed" not in facts:
            continue
        if stage == "compare" and facts.get("model") is None:
            lines.append(f"  {stage:<9}no candidate version; candidate=NAME@vX.Y.Z sets one beside the model")
            continue
        cells = f"{facts['sequences']:>10}{facts['hits']:>8}{facts['derived']:>9}{facts['computed']:>10}"
        note = "  unchanged" if facts["status"] == "unchanged" else ""
        note = note or (f"  on {facts['workers']} workers" if facts.get("workers") else "")
        lines.append(f"  {stage:<9}{cells}{facts['seconds']:>9.1f}{note}")
    for stage, facts in summary.stages.items():
        if facts.get("computed") and facts.get("misses"):
            reasons = ", ".join(f"{why} {number:,}" for why, number in facts["misses"].items())
            lines.append(f"\n  why {stage} computed: {reasons}")
    for stage, facts in summary.stages.items():
        if facts.get("other_classes"):
            lines.append(f"\n  {stage} used hits from other device classes: {shown(by_class(facts['other_classes']))}")
    saved = sum(facts.get("saved_seconds", 0.0) for facts in summary.stages.values())
    if saved >= 0.05:
        lines.append(f"\n  hits saved {saved:.1f} s of computing")
    ran = [stage for stage, facts in summary.stages.items() if facts["status"] == "run" and stage != "compose"]
    lines += ["", "  stages run: " + (", ".join(ran) if ran else "none; everything was known")]
    lines += ["  page: results/run.html    the result alone: results/report.html    metrics: metrics.json"]
    return "\n".join(lines)
