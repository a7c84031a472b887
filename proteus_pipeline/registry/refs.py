"""Publishing tags: one process at a time, all refs of an event or none, and a ledger of what each tag was.

A tag can be moved or edited with ``git tag --force``, and git keeps no trace of what it was. So each tag is created
together with a second ref, ``refs/proteus/ledger/TAG``, in one transaction: the two differ when somebody meddled, and the
second one still has the tag as it was made. The ledger belongs to one clone, as the reflog does: a tag that comes by
``git fetch`` is entered when its version is first used.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.git import TEMPORARY_INDEX, Git, GitError

LEDGER = "refs/proteus/ledger/"
_LOCK = "proteus.lock"
_JOURNAL = "proteus.journal"
_NOTHING = "0" * 40
# A registry change holds the lock for some git commands, some tenths of a second; weights are stored outside it.
_PATIENCE_S = 60.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def exclusive(git: Git) -> Iterator[None]:
    """Keep other registry changes of this repository waiting, in this process and in others.

    Git alone decides which of two equal tags wins; the lock serves what reads before it writes (sequence numbers,
    limits), and makes what a killed process left behind recognisable: the kernel lets go of the lock when the last
    process that inherited it ends, git's own included, so whoever holds it may clear away what lies there.

    Raises
    ------
    StorageError
        When another process holds it for a minute.

    """
    if git.held:
        yield  # this call is within another one of the same object
        return
    folder = git.folder()
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(
            f"{folder} can't be written ({error.strerror})", "check its permissions and space"
        ) from error
    try:
        _wait_for(descriptor, folder)
        git.held = (descriptor,)
        _clear_leftovers(folder)
        yield
    finally:
        git.held = ()
        os.close(descriptor)


def _wait_for(descriptor: int, folder: Path) -> None:
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return  # a file system without locks: git's own still decide every race
            if error.errno not in {errno.EAGAIN, errno.EACCES}:
                raise StorageError(f"{folder / _LOCK} can't be locked ({error.strerror})", "check the disk") from error
        else:
            return
        if time.monotonic() > until:
            raise StorageError(
                f"another process has been changing the registry in {folder} for over {_PATIENCE_S:.0f} s",
                "wait for it, or end it: fuser " + str(folder / _LOCK),
            )
        time.sleep(0.01)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a process that was killed in here left: temporary indexes, and git's locks of the refs it was writing."""
    for path in folder.glob(f"{TEMPORARY_INDEX}*"):
        path.unlink(missing_ok=True)
    journal = folder / _JOURNAL
    with suppress(FileNotFoundError):
        for ref in journal.read_text(encoding="utf-8").split("\n"):
            # Only refs are ever written there; a damaged journal may not lead out of refs/.
            if ref.startswith("refs/") and ".." not in ref:
                (folder / f"{ref}.lock").unlink(missing_ok=True)
        journal.unlink(missing_ok=True)


def publish(git: Git, tags: Mapping[str, str], branch: tuple[str, str, str | None] | None = None) -> bool:
    """Create tags with their ledger entries, and advance a branch, all or nothing; False, and no change, where one exists.

    Parameters
    ----------
    tags
        Tag objects' ids by tag name.
    branch
        A branch's full ref, its new commit, and the one it must still be at (None: it must not exist).

    Raises
    ------
    StorageError
        When git can't write, or the branch has moved meanwhile.

    """
    lines, refs = [], []
    for tag, oid in tags.items():
        # The ledger first: a tag without an entry could be moved unseen.
        for ref in (LEDGER + tag, f"refs/tags/{tag}"):
            refs.append(ref)
            lines.append(f"create {ref} {oid}\n")
    if branch:
        ref, new, old = branch
        lines.append(f"update {ref} {new} {old or _NOTHING}\n")
    with exclusive(git):
        journal = git.folder() / _JOURNAL
        _write_journal(journal, refs)
        try:
            git.run("update-ref", "--stdin", data="".join(lines))
        except GitError as error:
            if any(git.try_run("rev-parse", "--verify", "--quiet", ref) for ref in refs):
                return False
            if branch and "cannot lock ref" in error.what and branch[0] in error.what:
                raise StorageError(
                    f"{branch[0]} moved while its next commit was made", "run the command again"
                ) from error
            raise
        finally:
            journal.unlink(missing_ok=True)
    return True


def _write_journal(journal: Path, refs: list[str]) -> None:
    try:
        journal.write_text("\n".join(refs), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{journal} can't be written ({error.strerror})", "check permissions and space") from error


def read_ledger(git: Git) -> dict[str, str]:
    """Return the tag objects' ids that tags had when they were made or first used here, by tag name."""
    printed = git.run("for-each-ref", "--format=%(refname) %(objectname)", LEDGER)
    pairs = (line.rsplit(" ", 1) for line in printed.splitlines())
    return {ref.removeprefix(LEDGER): oid for ref, oid in pairs}


def enter(git: Git, tag: str, oid: str) -> None:
    """Enter a tag that came from elsewhere; a repository that can't be written goes without."""
    git.try_run("update-ref", LEDGER + tag, oid, _NOTHING)


def put_back(git: Git, tag: str, oid: str) -> None:
    """Point a tag to the object that the ledger has for it."""
    with exclusive(git):
        git.run("update-ref", f"refs/tags/{tag}", oid)
