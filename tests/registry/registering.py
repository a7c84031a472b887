"""What tests of registrations share: a model to register, and a commit by somebody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import git

from proteus_pipeline.models.checkpoint import Checkpoint


@dataclass
class Given:
    """A model to register."""

    name: str
    checkpoint: Checkpoint
    source: Mapping[str, Any] = field(default_factory=dict)


def commit(root: Path, message: str = "x") -> str:
    """Commit what is tracked, or nothing; return the commit's id."""
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    git(root, *who, "commit", "--quiet", "--allow-empty", "-am", message)
    return git(root, "rev-parse", "HEAD")
