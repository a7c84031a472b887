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


def flip(path: Path, place: int = -5) -> None:
    """Flip one bit of an object, which keeps the mode 0444 by which DVC trusts it unread."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def objects(root: Path) -> dict[str, bytes]:
    """The objects of the DVC cache at `root`, by their path in it."""
    folder = root / ".dvc" / "cache" / "files" / "md5"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
