"""``proteus doctor``: what is missing or inconsistent, and the remedy."""

from __future__ import annotations

import argparse
from typing import Any

_DESCRIPTION = """\
Look at this machine and this project, and say what is missing or inconsistent, with the remedy: a line each, ok, warn or fail.
Nothing is changed. Works in a broken project, and outside of one; recommends cache sizes for this machine.
"""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "doctor", help="what is missing or inconsistent here, and the remedy", description=_DESCRIPTION
    )
    this.add_argument("--json", action="store_true", help="print JSON")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.terminal import painted
    from proteus_pipeline.cli.verbs import plain, print_json, shown
    from proteus_pipeline.stages.diagnosis import examine
    from proteus_pipeline.stages.looking import FAIL, OK

    checks = []
    for check in examine():
        checks.append(check)
        if args.json or (args.quiet and check.status == OK):
            continue
        remedy = f"; {check.remedy}" if check.remedy else ""
        print(f"{painted(f'{check.status:<4}', _COLOURS[check.status])}  {check.name:<9} {shown(check.what + remedy)}")
    code = int(any(check.status == FAIL for check in checks))
    if args.json:
        print_json({"exit_code": code, "checks": [plain(check) for check in checks]})
    return code
