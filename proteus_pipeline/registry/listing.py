"""``proteus model list`` in about the time git takes to list tags: what was listed last, while the tags are the same.

A tag's object id says what is in it, so that equal ids under equal names mean equal versions. A model's lines depend on
its own tags alone: after a registration, only that model's are made anew. This module imports next to nothing: reading and
folding a thousand records costs a quarter of a second, importing what does it a tenth more.
"""

from __future__ import annotations

import os
import zlib

from proteus_pipeline.registry.environment import git_environment

TYPE_CHECKING = False  # typing takes 5 ms to import, as long as all of this
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

# Raised when what a line says, or how it is made, changes.
_MARK = b"proteus-listing 2\n"
# A model at a time is quicker than all at once for as many.
_FEW = 4


def listed(root: Path, name: str | None, lines_of: Callable[..., Iterable[tuple[str, str]]]) -> list[str] | None:
    """Return a line for each live version of one model or of all, or None where `root` is no git repository.

    Parameters
    ----------
    root
        The repository's top folder.
    name
        A model, or None for all.
    lines_of
        Makes the lines anew, each with its model, when tags have changed since: of the models given, or of all, sorted by
        model.

    """
    tags = tags_of(root)
    if tags is None:
        return None
    path = root / ".proteus" / "listing"
    before, lines = _remembered(path)
    if before != tags:
        lines = [f"{model}\t{line}" for model, line in _made(before, lines, tags, lines_of)]
        _remember(path, tags, lines)
    split = (line.split("\t", 1) for line in lines)
    return [line for model, line in split if name in {None, model}]


def _made(
    before: bytes | None, lines: list[str], tags: bytes, lines_of: Callable[..., Iterable[tuple[str, str]]]
) -> Iterable[tuple[str, str]]:
    """Return all lines, those of models whose tags are what they were as they were."""
    changed = set() if before is None else _changed(before, tags)
    if not changed:
        return lines_of()
    kept = [(model, line) for model, _, line in (text.partition("\t") for text in lines) if model not in changed]
    # By model alone: a model's lines are in the order of its versions.
    return sorted([*kept, *lines_of(*sorted(changed))], key=lambda pair: pair[0])


def _changed(before: bytes, tags: bytes) -> set[str]:
    """Return the models that have other tags now; none where they are many, or a tag is no version's."""
    from proteus_pipeline.errors import InvalidVersionError
    from proteus_pipeline.identity.names import check_name
    from proteus_pipeline.registry.events import parse_tag

    models: set[str] = set()
    for line in {*before.split(b"\n")} ^ {*tags.split(b"\n")}:
        parsed = parse_tag(line.partition(b"refs/tags/")[2].decode("utf-8", "replace"))
        try:
            if parsed is None or len(models | {check_name(parsed[1])}) > _FEW:
                return set()
        except InvalidVersionError:
            return set()
        models.add(parsed[1])
    return models


def tags_of(root: Path) -> bytes | None:
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


def _remembered(path: Path) -> tuple[bytes | None, list[str]]:
    """Return the tags that lines were made for last, and the lines; None where there are none, or the file is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None, []
    if not data.startswith(_MARK) or zlib.crc32(data[:-4]).to_bytes(4, "big") != data[-4:]:
        return None, []
    tags, _, body = data[len(_MARK) : -4].partition(b"\0")
    return tags, body.decode().split("\n") if body else []


def _remember(path: Path, tags: bytes, lines: Sequence[str]) -> None:
    """Keep lines for the next time; where they can't be kept, that one takes as long as this one."""
    from proteus_pipeline.errors import StorageError
    from proteus_pipeline.registry.home import private_folder
    from proteus_pipeline.stores.files import write_atomic

    data = _MARK + tags + b"\0" + "\n".join(lines).encode()
    try:
        private_folder(path.parent.parent)
        write_atomic(path, data + zlib.crc32(data).to_bytes(4, "big"))
    except (StorageError, OSError):
        return
