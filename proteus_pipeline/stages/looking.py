"""What a check of the doctor's is, and where it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.config.composition import PARAMS, Composition, compose, read_params
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
