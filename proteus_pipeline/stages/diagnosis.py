"""``proteus doctor``: what is missing or inconsistent here, and what to do; nothing is changed.

Each check stands alone, and one that fails on a broken project is a finding too: there is never a traceback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.config.composition import PARAMS, Composition, compose, read_params
from proteus_pipeline.errors import ProteusError
from proteus_pipeline.registry.places import project_root
from proteus_pipeline.stages.project import Project

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """What one look showed.

    Attributes
    ----------
    name
        What was looked at.
    status
        ``ok``; ``warn``: works, and not as it should; ``fail``: something will not work.
    what
        What was found.
    remedy
        What to do; empty where all is well.

    """

    name: str
    status: str
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Here:
    """Where the checks look: a project, or what passes for one.

    Attributes
    ----------
    root
        The folder; the working directory where there is no project.

    """

    root: Path

    @classmethod
    def find(cls) -> Here:
        """Return the project around the working directory, or the nearest folder that was meant as one."""
        here = Path.cwd()
        marks = ("dvc.yaml", "conf/config.yaml", ".dvc", ".git")
        meant = next((p for p in (here, *here.parents) if any((p / mark).exists() for mark in marks)), here)
        return cls((project_root() or meant).absolute())

    @property
    def is_repository(self) -> bool:
        """Whether git and DVC are both there."""
        return (self.root / ".git").exists() and (self.root / ".dvc").is_dir()

    @property
    def is_project(self) -> bool:
        """Whether there are settings, too."""
        return self.is_repository and (self.root / "conf" / "config.yaml").exists()

    @cached_property
    def project(self) -> Project:
        """The project."""
        return Project(self.root, self.root)

    @cached_property
    def composition(self) -> Composition:
        """Its settings; ConfigError where they are wrong."""
        return compose(self.root, read_params(self.root / PARAMS))

    @cached_property
    def cache_path(self) -> Path:
        """Where its cache of embeddings is, or would be."""
        return self.root / Path(self.composition.settings.cache.path).expanduser()

    @cached_property
    def cache(self) -> EmbeddingCache:
        """Its cache of embeddings, without the shared one beneath."""
        from proteus_pipeline.embeddings.cache import EmbeddingCache

        return EmbeddingCache(self.cache_path)


Look = Callable[[Here], Iterator[Check]]


def examine(here: Here | None = None) -> Iterator[Check]:
    """Yield what every check finds, those of the machine first."""
    from proteus_pipeline.stages import cache_checks, machine_checks, project_checks, service_checks

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
