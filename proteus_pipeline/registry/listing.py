"""``proteus model list`` in about the time git takes to list tags: what was listed last, while the tags are the same.

A tag's object id says what is in it, so that equal ids under equal names mean equal versions. This module imports next to
nothing: reading and folding a thousand records costs half a second, importing what does it a tenth more.
"""

from __future__ import annotations

import os
import zlib

from proteus_pipeline.registry.environment import git_environment

TYPE_CHECKING = False  # typing takes 5 ms to import, as long as all of this
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# Raised when what a line says, or how it is made, changes.
_MARK = b"proteus-listing 1\n"


def listed(root: Path, name: str | None, lines_of: Callable[[], Sequence[tuple[str, str]]]) -> list[str] | None:
    """Return a line for each live version of one model or of all, or None where `root` is no git repository.

    Parameters
    ----------
    root
        The repository's top folder.
    name
        A model, or None for all.
    lines_of
        Makes the lines anew, each with its model, when tags have changed since.

    """
    tags = _tags(root)
    if tags is None:
        return None
    path = root / ".proteus" / "listing"
    lines = _remembered(path, tags)
    if lines is None:
        lines = [f"{model}\t{line}" for model, line in lines_of()]
        _remember(path, tags, lines)
    split = (line.split("\t", 1) for line in lines)
    return [line for model, line in split if name in {None, model}]


def _tags(root: Path) -> bytes | None:
    """Return what git lists: each tag's id and name; None where it can't."""
    command = ("git", "-C", str(root), "for-each-ref", "--format=%(objectname)%(refname)", "refs/tags/")
    # Not by subprocess, whose import takes as long as git does.
    reading, writing = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        child = os.posix_spawnp("git", command, git_environment(), file_actions=actions)
    except OSError:
        os.close(reading)
        return None
    finally:
        os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor, not a path
        printed = pipe.read()
    return None if os.waitpid(child, 0)[1] else printed


def _remembered(path: Path, tags: bytes) -> list[str] | None:
    """Return the lines that were made for the same tags; None where they are others, or the file is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MARK) + len(tags)
    if not (data.startswith(_MARK) and data[len(_MARK) : start] == tags and data[start : start + 1] == b"\0"):
        return None
    body = data[start + 1 : -4]
    if zlib.crc32(body).to_bytes(4, "big") != data[-4:]:
        return None
    return body.decode().split("\n") if body else []


def _remember(path: Path, tags: bytes, lines: Sequence[str]) -> None:
    """Keep lines for the next time; where they can't be kept, that one takes as long as this one."""
    from proteus_pipeline.errors import StorageError
    from proteus_pipeline.registry.home import private_folder
    from proteus_pipeline.stores.files import write_atomic

    body = "\n".join(lines).encode()
    try:
        private_folder(path.parent.parent)
        write_atomic(path, _MARK + tags + b"\0" + body + zlib.crc32(body).to_bytes(4, "big"))
    except (StorageError, OSError):
        return
