"""Weights that the DVC cache lacks, or holds damaged: from a backup, or from a DVC remote, checked before they are there."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.home import scratch_folder
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.remotes import DvcRemote, remotes
from proteus_pipeline.registry.weights import DvcCache, Objects, quarantine
from proteus_pipeline.stores.files import md5_file

_TRANSFERS = 8


def supply(root: Path, pointer: Pointer, reference: str) -> dict[str, Path]:
    """Return the place of each file of some weights in the DVC cache, brought there where they are missing.

    Raises
    ------
    StorageError
        When they are nowhere; it says where they were looked for.
    IntegrityError
        When what is there, or what a remote sent, is damaged.

    """
    cache = DvcCache(root)
    if files := cache.files(pointer):
        return files
    sources = _Sources(root)
    # The directory object first: it says which the others are.
    sources.bring(cache, [pointer.md5], reference)
    listing = cache.listing(pointer) or {}
    # What is there is checked when it is used: reading gigabytes here would cost seconds.
    sources.bring(cache, [md5 for md5 in listing.values() if not cache.object(md5).exists()], reference)
    files = cache.files(pointer)
    if files is None:
        raise StorageError(f"the weights of {reference} went missing while they were fetched", "run the command again")
    return files


def mend(root: Path, md5s: Iterable[str], reference: str, damaged: Objects | None = None) -> None:
    """Put sound objects in place of damaged or missing ones; what was damaged is kept in quarantine.

    Parameters
    ----------
    damaged
        Where they are: the DVC cache, where none is given.

    Raises
    ------
    StorageError
        When no sound copy is found (IntegrityError where a damaged one is here); everything is then where it was.

    """
    objects = damaged or DvcCache(root)
    wanted = list(dict.fromkeys(md5s))
    try:
        _Sources(root).bring(objects, wanted, reference)
    except StorageError as error:
        if not any(objects.object(md5).exists() for md5 in wanted):
            raise
        where = damaged.folder if damaged else "the DVC cache"
        raise IntegrityError(
            f"the weights of {reference} in {where} are damaged, and no sound copy was found: {error.what}",
            error.remedy,
        ) from error


def send(root: Path, pointer: Pointer, reference: str, name: str | None = None) -> tuple[int, str]:
    """Copy what a DVC remote lacks of some weights to it; return how many objects that was, and the remote's name.

    The directory object goes last: where it is, all that it lists is. Each object is checked here before it is sent.

    Raises
    ------
    StorageError
        When there is no such remote, or it can't be written.
    IntegrityError
        When an object is damaged here.

    """
    found = {remote.name: remote for remote in remotes(root)}
    if not found or (name is not None and name not in found):
        what = f"no DVC remote {name} is configured" if name else "no DVC remote is configured"
        raise StorageError(what, f"there are: {', '.join(found) or 'none'}; dvc remote add --default NAME URL")
    remote = found[name] if name else next(iter(found.values()))
    supply(root, pointer, reference)
    cache = DvcCache(root)

    def copy(md5: str) -> bool:
        there = remote.size(md5)
        if there == cache.object(md5).stat().st_size:
            return False
        if not cache.is_sound(md5):
            raise IntegrityError(
                f"{cache.object(md5)} of {reference} is damaged, and was not sent",
                f"proteus model verify {reference} --repair",
            )
        if there is not None:
            remote.remove(md5)  # of another size: cut short by whoever sent it
        remote.push(md5, cache.object(md5))
        return True

    # One first, alone: it opens the remote, or says that it can't be reached.
    first, *rest = dict.fromkeys((cache.listing(pointer) or {}).values())
    sent = int(copy(first))
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        sent += sum(pool.map(copy, rest))
    if pointer.is_folder:
        sent += copy(pointer.md5)
    return sent, remote.name


class _Sources:
    """Where objects may come from, in the order of what asking costs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._here = (DvcCache(root), Backups(root).objects)
        self._remotes = remotes(root)

    def bring(self, target: Objects, md5s: Iterable[str], reference: str) -> None:
        """Have sound objects in `target`; those that are sound already stay."""
        wanted = {md5 for md5 in md5s if not target.is_sound(md5)}
        others = [objects for objects in self._here if objects.folder != target.folder]
        for md5 in sorted(wanted):
            if source := next((objects for objects in others if objects.is_sound(md5)), None):
                self._place(target, md5, source.object(md5))
                wanted.discard(md5)
        failures: list[StorageError] = []
        for remote in self._remotes:
            if wanted:
                failures += self._from_remote(remote, target, wanted)
        if not wanted:
            return
        if damaged := next((f for f in failures if isinstance(f, IntegrityError)), None):
            raise damaged
        looked = ["backups", *(f"DVC remote {remote.name}" for remote in self._remotes)]
        why = f" ({failures[0].what})" if failures else ""
        raise StorageError(
            f"the weights of {reference} are not in the DVC cache, and not in {', '.join(looked)}{why}",
            "dvc remote add the place that has them, or ask who registered them; proteus model pull asks their source too",
        )

    def _place(self, target: Objects, md5: str, source: Path) -> None:
        quarantine(self._root, target, md5)
        target.add(source, md5)

    def _from_remote(self, remote: DvcRemote, target: Objects, wanted: set[str]) -> list[StorageError]:
        """Bring what a remote has of the wanted objects, which are then no longer wanted; return what went wrong."""
        gone = threading.Event()
        with scratch_folder(self._root, "fetch") as scratch, ThreadPoolExecutor(_TRANSFERS) as pool:

            def fetch(md5: str) -> StorageError | None:
                arrived = scratch / md5
                try:
                    # A remote that can't be reached, or hangs, need not be asked for each.
                    if gone.is_set() or not remote.fetch(md5, arrived):
                        return None
                except StorageError as error:
                    gone.set()
                    return error
                if md5_file(arrived) != md5.removesuffix(".dir"):
                    return IntegrityError(
                        f"DVC remote {remote.name} sent {md5} damaged: what arrived is not what its name says",
                        "proteus model verify --repair where a sound copy is, or push it again",
                    )
                self._place(target, md5, arrived)
                wanted.discard(md5)
                return None

            # One first, alone: it opens the remote.
            first, *rest = sorted(wanted)
            failures = [fetch(first), *pool.map(fetch, rest)]
        return [failure for failure in failures if failure]
