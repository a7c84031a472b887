"""Where a registry lives: a project's repository, or one of its own that is created here."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.places import DEFAULT_HOME, project_root
from proteus_pipeline.stores.files import storage_error, write_atomic

_YOUNG_S = 5.0
# Making a home takes some git commands, a second.
_UNFINISHED_S = 600.0
# What makes a git repository DVC's too, as `dvc init` does, which takes a second.
DVC_FILES = {
    ".dvc/config": "[core]\n    analytics = false\n    check_update = false\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
}


def find_home(path: Path) -> Git | None:
    """Return the repository at `path`, or None when there is nothing yet.

    Raises
    ------
    StorageError
        When `path` is a file, a folder outside git that holds something, or a repository without DVC.

    """
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file", "name a folder")
    found = Git.find(path) if path.exists() and any(path.iterdir()) else None
    if found and not (found.root / ".dvc").is_dir():
        raise StorageError(
            f"{found.root} is a git repository without DVC", "run dvc init there, and commit what it makes"
        )
    return found


def open_home(path: Path) -> Git:
    """Return the repository at `path`, created when there is nothing.

    Raises
    ------
    StorageError
        When `path` is a file, a folder outside git that holds something, a repository without DVC, or can't be created.

    """
    if found := find_home(path):
        return found
    sweep_unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and renamed: a home is whole or absent, and of two that are made at once one stays.
        made = unfinished(path)
        made.mkdir()
        try:
            _make_home(Git(made))
            made.rename(path)
        except OSError as error:
            if isinstance(error, StorageError) or error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} can't be created ({error.strerror})", "name another home") from error
    return Git.find(path)


def unfinished(path: Path) -> Path:
    """Return a name beside `path` for it to be made under; `sweep_unfinished` knows it."""
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def sweep_unfinished(path: Path) -> None:
    """Remove what killed processes left half made beside `path`."""
    for made in path.parent.glob(f".{path.name}-{'[0-9a-f]' * 16}"):
        with suppress(OSError):
            if time.time() - made.stat().st_mtime > _UNFINISHED_S:
                shutil.rmtree(made, ignore_errors=True)


def _make_home(git: Git) -> None:
    git.run("init", "--quiet")
    files = DVC_FILES | {".dvcignore": ".proteus\n", ".gitignore": "/.proteus/\n"}
    for name, text in files.items():
        write_atomic(git.root / name, text.encode())
    commit_first(git, files, "A home for model versions")


def commit_first(git: Git, names: Iterable[str], message: str) -> None:
    """Commit files of a new repository, also those that somebody's own core.excludesFile would leave out."""
    git.run("add", "--force", "--", *names)
    # Not by git commit, which hooks and the signing of a user's own settings may refuse.
    commit = git.run("commit-tree", git.run("write-tree"), data=f"{message}\n", env=git.identity_env())
    git.run("update-ref", "HEAD", commit)


def private_folder(root: Path) -> Path:
    """Return .proteus/ under `root`, made when it is not there; it keeps itself out of git.

    Raises
    ------
    StorageError
        When it can't be made.

    """
    folder = root / ".proteus"
    ignore = folder / ".gitignore"
    if not ignore.exists():
        write_atomic(ignore, b"*\n")
    return folder


@contextmanager
def scratch_folder(root: Path, purpose: str) -> Iterator[Path]:
    """Yield a new folder under .proteus/, removed afterwards; and remove those of processes that were killed.

    Each is locked by its process, and the kernel lets go of the lock when that ends, however it ends.

    Raises
    ------
    StorageError
        When it can't be made.

    """
    parent = private_folder(root) / "scratch"
    try:
        parent.mkdir(exist_ok=True)
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=parent))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error("write", parent, error) from error
    try:
        with suppress(OSError):  # without locks, nobody sweeps
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for folder in parent.iterdir():
        with suppress(OSError):
            # A folder a moment old may not be locked yet.
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def other_home(root: Path) -> Path | None:
    """Return the registry that a user may have meant instead of `root`: their own, or the project they stand in."""
    own = Path(os.environ.get("PROTEUS_HOME") or DEFAULT_HOME).expanduser()
    candidates = [project_root(), own]
    return next((p for p in candidates if p and p.resolve() != root.resolve() and (p / ".git").exists()), None)
