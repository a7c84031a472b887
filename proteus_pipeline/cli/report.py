"""``proteus report``: the page of the results as they stand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Write one HTML file of the pipeline's results: what the last run did and why, where the result comes from, the probe, the
embedding map, contact maps, drift between versions, the versions' history, and the cache. Nothing is computed. The file holds
all it shows and works offline.
"""
_EPILOG = """\
results/report.html, an output of the pipeline, has the result alone: the same inputs give the same bytes.
"""


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "report",
        help="write the page of the results: run, lineage, probe, map, contacts, drift, versions, cache",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    this.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: results/run.html")
    this.add_argument("--open", action="store_true", help="show it in a browser")
    this.add_argument("--json", action="store_true", help="print JSON")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.verbs import tell
    from proteus_pipeline.stages.project import RUN_PAGE, Project
    from proteus_pipeline.stages.report import write_page

    project = Project.find()
    target = args.output or project.work / RUN_PAGE
    nbytes = write_page(project, target)
    tell(args, {"page": str(target), "bytes": nbytes}, f"{target}: {nbytes / 1e6:.1f} MB")
    if args.open:
        import webbrowser

        if not webbrowser.open(target.absolute().as_uri()):
            print(f"note: no browser was found to show {target}", file=sys.stderr)
    return 0
