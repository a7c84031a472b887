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
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.git import TEMPORARY_INDEX, BehindError, Git, GitError, GitKilledError

T = TypeVar("T")

LEDGER = "refs/proteus/ledger/"
_LOCK = "proteus.lock"
_JOURNAL = "proteus.journal"
# Git takes a ref's lock as soon as it starts, and holds it for milliseconds.
_STARTS_WITHIN_S = 10.0
_STANDS_STILL_S = 1.0
# A registry change holds the lock for some git commands, some tenths of a second, or, with a group's remote, some seconds;
# weights are stored outside it.
_PATIENCE_S = 60.0
_TURNS, _LONGEST_WAIT_S = 30, 2.0
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
        alone = _wait_for(descriptor, folder)
        git.held = (descriptor,)
        if alone:
            _recover(git, folder)
        git.refresh()
        yield
    finally:
        git.held = ()
        os.close(descriptor)


def _wait_for(descriptor: int, folder: Path) -> bool:
    """Wait for the lock; False on a file system without locks, where git's own still decide every race."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            if error.errno not in {errno.EAGAIN, errno.EACCES}:
                raise StorageError(f"{folder / _LOCK} can't be locked ({error.strerror})", "check the disk") from error
        else:
            return True
        if time.monotonic() > until:
            raise StorageError(
                f"another process has been changing the registry in {folder} for over {_PATIENCE_S:.0f} s",
                "wait for it, or end it: fuser " + str(folder / _LOCK),
            )
        time.sleep(0.01)


def _recover(git: Git, folder: Path) -> None:
    """Clear away what a process that was killed in here left, and complete a tag that it had entered in the ledger."""
    for path in folder.glob(f"{TEMPORARY_INDEX}*"):
        # Of a lock that was taken of git's index, the file is a second name.
        for lock in (folder / "index.lock", *folder.glob("worktrees/*/index.lock")):
            with suppress(FileNotFoundError):
                if lock.samefile(path):
                    lock.unlink()
        path.unlink(missing_ok=True)
    journal = folder / _JOURNAL
    try:
        began, text = journal.stat().st_mtime, journal.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    written = dict(line.partition(" ")[::2] for line in text.split("\n") if _is_ref(line.partition(" ")[0]))
    gone = {ref: oid[1:] for ref, oid in written.items() if oid.startswith("-")}
    made = {ref: oid for ref, oid in written.items() if ref not in gone}
    for ref in written:
        _unlock(folder, ref, made.get(ref, ""), began)
    if gone and _unlock(folder, "packed-refs", "", began):
        (folder / "packed-refs.new").unlink(missing_ok=True)
    entered = [ref for ref in made if ref.startswith(LEDGER)]
    # One that is there says that the others were to be: a ledger's entry comes first, and nothing goes before all have come.
    if any(oid == made[ref] for ref, oid in zip(entered, git.ids(entered), strict=True)):
        for ref, oid in made.items():
            if ref.startswith(("refs/tags/", LEDGER)):
                git.try_run("update-ref", ref, oid, "")
        for ref, oid in gone.items():
            git.try_run("update-ref", "-d", ref, oid)
    journal.unlink(missing_ok=True)


def _is_ref(name: str) -> bool:
    """Say whether a journal may mean this: a damaged one must not lead elsewhere."""
    head = name == "HEAD" or (name.startswith("worktrees/") and name.endswith("/HEAD"))
    return (head or name.startswith("refs/")) and ".." not in name


def _unlock(folder: Path, ref: str, oid: str, began: float) -> bool:
    """Remove the lock of a ref that git was killed over; say whether there was one."""
    lock = folder / f"{ref}.lock"
    try:
        if not ref.startswith(("refs/tags/", LEDGER)):
            # A branch is the user's too, and so are packed refs: what is not ours, or not yet a second old, may be a
            # living git's.
            first = lock.stat()
            if not began <= first.st_mtime <= began + _STARTS_WITHIN_S or lock.read_text().strip() not in {"", oid}:
                return False
            time.sleep(max(0.0, _STANDS_STILL_S - (time.time() - first.st_mtime)))
            if (lock.stat().st_ino, lock.stat().st_mtime_ns) != (first.st_ino, first.st_mtime_ns):
                return False
        lock.unlink()
    except FileNotFoundError:
        return False
    return True


def publish(
    git: Git,
    tags: Mapping[str, str],
    branch: tuple[str, str, str | None] | None = None,
    withdrawn: Mapping[str, str] | None = None,
) -> bool:
    """Create tags with their ledger entries, and advance a branch, all or nothing; False, and no change, where one exists.

    Where a group shares the registry, its git remote decides, and has the tags before they are here: whoever dies between
    the two finds them by the next look.

    Parameters
    ----------
    tags
        Tag objects' ids by tag name.
    branch
        A branch's full ref, its new commit, and the one it must still be at (None: it must not exist).
    withdrawn
        Tags to take away, by name, with what they are: each is among `tags` under another name.

    Raises
    ------
    StorageError
        When git can't write, the branch has moved meanwhile, or the group's remote can't be reached.
    BehindError
        When somebody of the group has published since `exclusive` was entered.

    """
    if any(not (tag.isprintable() and " " not in tag) for tag in (*tags, *(withdrawn or {}))):
        raise StorageError("a tag's name holds a space or a line end", "give it another name")
    with exclusive(git):
        if not git.offer(tags):
            return False
        made = enter_all(git, tags, branch, withdrawn)
        if made and withdrawn:
            git.withdraw(withdrawn)
    return made


def in_turn(git: Git, change: Callable[[], T]) -> T:
    """Return what a change comes to within `exclusive`; it is made again where somebody of a group published first."""

    def alone() -> T:
        with exclusive(git):
            return change()

    return repeated(alone)


def repeated(change: Callable[[], T]) -> T:
    """Return what a change comes to; it is made again, after what is there then, while others of a group publish first.

    Raises
    ------
    BehindError
        When that goes on for too long.

    """
    for turn in range(_TURNS):
        try:
            return change()
        except BehindError:
            # Others wait as well, and not in step.
            time.sleep(random.uniform(0, min(_LONGEST_WAIT_S, 0.05 * 2**turn)))  # noqa: S311
    return change()


def enter_all(
    git: Git,
    tags: Mapping[str, str],
    branch: tuple[str, str, str | None] | None = None,
    withdrawn: Mapping[str, str] | None = None,
) -> bool:
    """Do what `publish` does in this clone alone, as with tags that have come from elsewhere: StorageError as it says."""
    lines, refs = [], {}
    for tag, oid in tags.items():
        # The ledger first: a tag without an entry could be moved unseen.
        for ref in (LEDGER + tag, f"refs/tags/{tag}"):
            refs[ref] = oid
            lines.append(f"create {ref} {oid}\n")
    locked = dict(refs)
    with exclusive(git):
        for tag, oid in (withdrawn or {}).items():
            # A fetched tag need not be in the ledger.
            for ref in _existing(git, (LEDGER + tag, f"refs/tags/{tag}")):
                lines.append(f"delete {ref} {oid}\n")
                locked |= {ref: f"-{oid}"}
        if branch:
            ref, new, old = branch
            lines.append(f"update {ref} {new} {old}\n" if old else f"create {ref} {new}\n")
            here = Path(git.run("rev-parse", "--path-format=absolute", "--git-dir"))
            # Git locks HEAD along with the branch that it is at.
            locked |= {ref: new, (here.relative_to(git.folder()) / "HEAD").as_posix(): ""}
        try:
            with _journal(git, locked):
                git.run("update-ref", "--stdin", data="".join(lines))
        except GitError as error:
            if _existing(git, refs):
                return False
            moved = branch and f"cannot lock ref '{branch[0]}'" in error.what and ".lock" not in error.what
            if branch and moved:
                raise StorageError(
                    f"{branch[0]} moved while its next commit was made", "run the command again"
                ) from error
            raise
    return True


def _existing(git: Git, refs: Iterable[str]) -> list[str]:
    """Return those of some refs that are there, in one git process."""
    asked = list(refs)
    return [ref for ref, oid in zip(asked, git.ids(asked), strict=True) if oid]


@contextmanager
def _journal(git: Git, refs: Mapping[str, str]) -> Iterator[None]:
    """Write down which refs git is about to write, and what, so that `_recover` knows; within `exclusive`."""
    folder = git.folder()
    journal = folder / _JOURNAL
    try:
        journal.write_text("\n".join(f"{ref} {oid}" for ref, oid in refs.items()), encoding="utf-8")
    except OSError as error:
        journal.unlink(missing_ok=True)
        raise StorageError(f"{journal} can't be written ({error.strerror})", "check permissions and space") from error
    try:
        yield
    except BaseException as error:
        # A git that refuses has cleared up after itself; one that was killed, by a Ctrl-C here for one, has not.
        if not isinstance(error, GitError) or isinstance(error, GitKilledError):
            _recover(git, folder)
        raise
    finally:
        journal.unlink(missing_ok=True)


def read_ledger(git: Git) -> dict[str, str]:
    """Return the tag objects' ids that tags had when they were made or first used here, by tag name."""
    printed = git.run("for-each-ref", "--format=%(refname) %(objectname)", LEDGER)
    pairs = (line.rsplit(" ", 1) for line in printed.splitlines())
    return {ref.removeprefix(LEDGER): oid for ref, oid in pairs}


def enter(git: Git, tag: str, oid: str) -> None:
    """Enter a tag that came from elsewhere; a repository that can't be written goes without."""
    git.try_run("update-ref", LEDGER + tag, oid, "")


def put_back(git: Git, tag: str, oid: str) -> None:
    """Point a tag to the object that the ledger has for it, or that is to be in both."""
    with exclusive(git), _journal(git, refs := {LEDGER + tag: oid, f"refs/tags/{tag}": oid}):
        git.run("update-ref", "--stdin", data="".join(f"update {ref} {oid}\n" for ref in refs))
