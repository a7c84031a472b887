"""Which registry a command is about. It imports next to nothing, for the commands that must be quick."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_HOME = "~/.proteus/versions"


def project_root(start: Path | None = None) -> Path | None:
    """Return the DVC project a command runs in, or None.

    ``DVC_ROOT`` comes first: in the workspace of ``dvc exp run --temp`` or ``--queue`` it names the real repository,
    which holds the tags, the weights and the cache that the workspace lacks.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = (start or Path.cwd()).resolve()
    return next((p for p in (here, *here.parents) if (p / ".dvc").is_dir() and (p / ".git").exists()), None)


def registry_home(explicit: str | None = None) -> Path:
    """Return the registry to use: as given, else the project, else ``PROTEUS_HOME``, else ``~/.proteus/versions``."""
    if explicit:
        return Path(explicit).expanduser()
    return project_root() or Path(os.environ.get("PROTEUS_HOME") or DEFAULT_HOME).expanduser()
