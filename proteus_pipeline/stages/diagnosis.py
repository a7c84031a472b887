"""``proteus doctor``: what is missing or inconsistent here, and what to do; nothing is changed.

Each check stands alone, and one that fails on a broken project is a finding too: there is never a traceback.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from proteus_pipeline.errors import ProteusError
from proteus_pipeline.stages import cache_checks, machine_checks, project_checks, service_checks
from proteus_pipeline.stages.looking import FAIL, Check, Here, Look


def examine(here: Here | None = None) -> Iterator[Check]:
    """Yield what every check finds, those of the machine first."""
    here = here or Here.find()
    # What a part would warn of is said here, once.
    log = logging.getLogger("proteus_pipeline")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        for part in (machine_checks, project_checks, cache_checks, service_checks):
            for name, look in part.LOOKS.items():
                yield from guarded(name, look, here)
    finally:
        log.setLevel(level)


def guarded(name: str, look: Look, here: Here) -> Iterator[Check]:
    """Yield what one check finds; what stops it is its finding."""
    try:
        yield from look(here)
    except ProteusError as error:
        yield Check(name, FAIL, _one_line(error.what), _one_line(error.remedy))
    except Exception as error:  # noqa: BLE001 - whatever a broken project does to a library
        yield Check(
            name, FAIL, f"could not be looked at: {type(error).__name__}: {_one_line(str(error))}", "mend this first"
        )


def _one_line(text: str) -> str:
    return " ".join(text.split())
