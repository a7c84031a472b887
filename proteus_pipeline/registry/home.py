"""Where a registry lives: a project's repository, or one of its own that is created here."""

from __future__ import annotations

import os
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.stores.files import write_atomic

DEFAULT_HOME = "~/.proteus/versions"
_DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
"""


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


def find_home(path: Path) -> Git | None:
    """Return the repository at `path`, or None when there is nothing yet.

    Raises
    ------
    StorageError
        When `path` is a file, or a folder outside git that holds something.

    """
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file", "name a folder")
    return Git.find(path) if path.exists() and any(path.iterdir()) else None


def open_home(path: Path) -> Git:
    """Return the repository at `path`, created when there is nothing.

    Raises
    ------
    StorageError
        When `path` is a file, a folder outside git that holds something, or can't be created.

    """
    if found := find_home(path):
        return found
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} can't be created ({error.strerror})", "name another home") from error
    git = Git(path)
    git.run("init", "--quiet")
    files = {
        ".dvc/config": _DVC_CONFIG,
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
        ".gitignore": "/.proteus/\n",
    }
    for name, text in files.items():
        write_atomic(path / name, text.encode())
    git.run("add", *files)
    git.run("commit", "--quiet", "-m", "A home for model versions", env=git.identity_env())
    return git
