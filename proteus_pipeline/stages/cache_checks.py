"""What ``proteus doctor`` looks at of the cache of embeddings: its file system, its files, who uses it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from proteus_pipeline.embeddings.housekeeping import visible_entries
from proteus_pipeline.embeddings.leases import FOLDER
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stages.looking import FAIL, OK, WARN, Check, Here, Look

_LITTLE = 2 * 10**9
_REPAIR = "proteus cache verify --repair"
_MOUNTS = Path("/proc/mounts")
# Where rename and locks are not what they are on a disk; the cache is right there, and several runs may compute a key twice.
_NETWORK = ("nfs", "lustre", "cifs", "smb", "fuse", "9p", "beegfs", "gpfs", "ceph")
_NEWEST, _SAMPLE = 4, 8
# Beyond it, finding rows by their segments takes longer than a quick look may.
_FEW_ENTRIES = 5_000_000


def _file_system(here: Here) -> Iterator[Check]:
    if not here.is_project:
        return
    path = here.cache_path
    there = next(p for p in (path, *path.parents) if p.exists())
    kind = _kind(there)
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield Check("cache", FAIL, f"{there} can't be written to", "ask for permission there, or set cache.path=FOLDER")
        return
    if free < _LITTLE:
        yield Check(
            "cache", WARN, f"{free / 1e9:.1f} GB are free for {path}", "proteus cache gc, or set cache.path=FOLDER"
        )
    locks = _has_locks(there)
    if not locks:
        what = f"{there} ({kind}) has no file locks: several runs may compute the same, and killed runs hold space for a week"
        yield Check("cache", WARN, what, "set cache.path to a local disk, and cache.shared to this one")
    elif kind.startswith(_NETWORK):
        what = f"{path} is on a network file system ({kind})"
        yield Check(
            "cache", WARN, what, "a cache of one's own on a local disk is faster; name this one as cache.shared"
        )
    else:
        yield Check("cache", OK, f"{path} on {kind}, {free / 1e9:,.0f} GB free, with file locks")


def _kind(path: Path) -> str:
    """Return the type of the file system that a path is on, as the kernel calls it."""
    best, kind = -1, "a file system of unknown kind"
    resolved = path.resolve()
    with suppress(OSError):
        for line in _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split(" ")
            place = Path(words[1].replace("\\040", " "))
            if len(place.parts) >= best and resolved.is_relative_to(place):
                best, kind = len(place.parts), words[2]
    return kind


def _has_locks(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _contents(here: Here) -> Iterator[Check]:
    """Open every index, compare every segment's size, and read a sample."""
    if not here.is_project or not here.cache_path.is_dir():
        return
    cache = here.cache
    stats = cache.stats()
    damaged = [f"{name} can't be read" for name in cache.visible.unreadable]
    headers = cache.visible.segments()
    for header in headers.values():
        path = cache.path / "seg" / header.segment
        if not path.exists():
            damaged.append(f"seg/{path.name} is gone")
        elif (found := path.stat().st_size) != header.segment_bytes:
            damaged.append(f"seg/{path.name} has {found} bytes, not {header.segment_bytes}")
    where = cache.visible.by_segment() if stats["entries"] <= _FEW_ENTRIES else {}
    # The newest are what a crash of the machine may have cut.
    for entry in [e for name in sorted(headers)[-_NEWEST:] for e in visible_entries(cache, where, name)[-_SAMPLE:]]:
        try:
            cache.read(entry)
        except StorageError as error:
            damaged.append(error.what)
            break
    if damaged:
        yield Check("entries", FAIL, f"{len(damaged)} files are damaged; {' '.join(damaged[0].split())}", _REPAIR)
        return
    size = f"{stats['entries']:,} in {stats['segments']:,} segments, {stats['bytes'] / 1e6:,.1f} MB"
    limit = here.composition.settings.cache.max_bytes
    if limit and stats["bytes"] > limit:
        what = f"{size}, over cache.max_bytes={limit}"
        yield Check("entries", WARN, what, "the next run evicts; is the budget too small?")
    else:
        yield Check("entries", OK, f"{size}; every byte is compared by: proteus cache verify")
    wanted = stats["hits"] + stats["derived"] + stats["misses"]
    if wanted:
        share = (stats["hits"] + stats["derived"]) / wanted
        yield Check("entries", OK, f"{share:.0%} of {wanted:,} look-ups were known; of misses: proteus cache explain")


def _leases(here: Here) -> Iterator[Check]:
    if not here.is_project or not here.cache_path.is_dir():
        return
    alive, dead = 0, []
    for path in sorted((here.cache_path / FOLDER).glob("*.json")):
        with suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                alive += 1
            except OSError:
                pass  # without locks, nobody can tell
            else:
                dead.append(path.name)
    if dead:
        what = f"{len(dead)} leases are of runs that were killed, {dead[0]} first"
        yield Check("leases", WARN, what, "the next run clears them; at once: proteus cache gc")
    else:
        yield Check("leases", OK, f"{alive} runs use the cache now")


LOOKS: dict[str, Look] = {"cache": _file_system, "entries": _contents, "leases": _leases}
