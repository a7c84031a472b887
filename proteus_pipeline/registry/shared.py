"""A repository whose versions a group shares: its git remote has every tag, and decides which of two of one name is made.

What is published goes to the remote first, in one atomic push that creates its tags and moves ``refs/proteus/last/MODEL``
on from where it was when the lock was taken: who was not the first thinks again about what there is now. Only then are the
tags made here. So nothing has to be taken back, and whoever is killed in between finds the tags by the next look.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.errors import ConfigError, StorageError, VersionConflictError
from proteus_pipeline.registry.events import History, fold, parse_tag
from proteus_pipeline.registry.git import BehindError, Git, GitError, anonymous
from proteus_pipeline.registry.refs import enter_all, exclusive, in_turn
from proteus_pipeline.registry.tags import read_events

if TYPE_CHECKING:
    from proteus_pipeline.registry.hints import Hints

REMOTE_VARIABLE = "PROTEUS_GIT_REMOTE"
LAST = "refs/proteus/last/"
# What a remote may take for an answer, and for bringing or taking tags with their commits.
ASK_S, TRANSFER_S = 15.0, 60.0
_TAGS = "refs/tags/"
# How many times tags are brought that others, such as a git fetch by hand, bring at the same time.
_TRIES = 3
_log = logging.getLogger(__name__)


def group_remote(git: Git, given: str | None = None) -> str | None:
    """Return the git remote of a group: as given, by ``PROTEUS_GIT_REMOTE``, ``origin``, or the only one; None where there is none.

    Raises
    ------
    ConfigError
        When what is given is neither a remote's name nor an address, or there are several and none is ``origin``.

    """
    names = (git.try_run("remote") or "").split()
    if chosen := given or os.environ.get(REMOTE_VARIABLE):
        place = Path(chosen).expanduser()
        known = chosen in names or ":" in chosen or place.exists()
        if chosen.startswith(("-", "ext::")) or not chosen.isprintable() or not known:
            # Not quoted: an address may hold a password.
            raise ConfigError(
                f"the git remote that git_remote or {REMOTE_VARIABLE} names is neither one of {git.root}'s nor an address",
                f"name one of: {', '.join(names) or 'none yet, git remote add origin URL'}; or give a URL, or a folder",
            )
        return str(place.absolute()) if chosen not in names and place.exists() else chosen
    if "origin" in names or len(names) == 1:
        return "origin" if "origin" in names else names[0]
    if names:
        raise ConfigError(
            f"{git.root} has the git remotes {', '.join(names)}, and none is origin", f"name one by {REMOTE_VARIABLE}"
        )
    return None


class SharedGit(Git):
    """A repository, and the git remote that its versions are shared by.

    Parameters
    ----------
    root
        The repository's top folder.
    remote
        A remote's name, or an address.
    hints
        Says whether somebody may have published since the last look, where there is a Redis.

    """

    def __init__(self, root: Path, remote: str, hints: Hints | None = None) -> None:
        super().__init__(root)
        self.remote = remote
        self._hints = hints
        # The remote's refs as they were when the lock was taken; what is pushed is pushed onto these.
        self._seen: dict[str, str] = {}
        # As they were by the last look of any thread.
        self._latest: dict[str, str] = {}
        self._warned: set[str] = set()

    @property
    def shown(self) -> str:
        """The remote, as errors name it: an address may hold a password."""
        return anonymous(self.remote)

    def look(self, *, strict: bool = False) -> None:
        """Bring what others have published; where the remote can't be reached, what is here counts, and one warning says so.

        Raises
        ------
        StorageError
            When it can't, and the look is `strict`.

        """
        if not strict and self._hints and self._hints.unchanged():
            return
        generation = self._hints.generation() if self._hints else None
        try:
            if self._missing(self.remote_refs()):
                with exclusive(self):
                    pass  # entering it brings them
        except StorageError as error:
            if strict:
                raise
            self._warn("offline", f"going by the versions in {self.root}, which may be out of date: {error.what}")
        else:
            if self._hints:
                self._hints.looked(generation)

    def refresh(self) -> None:
        """Bring what others have published, or raise StorageError; within `exclusive`."""
        for left in reversed(range(_TRIES)):
            self._seen = self.remote_refs()
            missing = self._missing(self._seen)
            if not missing:
                return
            try:
                # The objects alone: refs that a killed fetch had locked would stay locked.
                self.run(
                    "fetch", "--quiet", "--no-tags", "--no-prune", "--no-write-fetch-head", "--no-auto-maintenance",
                    "--no-recurse-submodules", "--stdin", self.remote,
                    data="".join(f"{_TAGS}{tag}\n" for tag in missing), timeout_s=TRANSFER_S,
                )  # fmt: skip
                if enter_all(self, missing):
                    return
            except GitError as error:
                if not left:
                    raise StorageError(
                        f"versions can't be fetched from the git remote {self.shown} ({error.what})",
                        "check it, and repeat",
                    ) from error
        raise StorageError(f"another git brings tags to {self.root} at the same time", "run the command again")

    def lacking(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Return those of some tags that the remote does not have so, by what is known of it; within `exclusive`."""
        return {tag: oid for tag, oid in tags.items() if self._seen.get(_TAGS + tag) != oid}

    def remote_refs(self) -> dict[str, str]:
        """Return the remote's tags, and its last events, as object ids by ref.

        Raises
        ------
        StorageError
            When it can't be reached.

        """
        try:
            printed = self.run("ls-remote", "--refs", "--", self.remote, f"{_TAGS}*", f"{LAST}*", timeout_s=ASK_S)
        except GitError as error:
            raise StorageError(
                f"the git remote {self.shown} can't be reached ({error.what})",
                "check it: git remote -v, and your rights there",
            ) from error
        pairs = (line.split("\t", 1) for line in printed.splitlines() if "\t" in line)
        self._latest = {ref: oid for oid, ref in pairs}
        return self._latest

    def has(self, tag: str, oid: str) -> bool:
        """Say whether the remote had a tag, and the same one, at the last look: none goes."""
        return self._latest.get(_TAGS + tag) == oid

    def offer(self, tags: Mapping[str, str]) -> bool:
        """Publish tags on the remote, all or none; False where it has one of another object. Within `exclusive`.

        Raises
        ------
        BehindError
            When somebody has published an event of the model since the lock was taken.
        StorageError
            When the remote refuses, or can't be reached; whether they are there then, the next look says.

        """
        new = {f"{_TAGS}{tag}": oid for tag, oid in self.lacking(tags).items()}
        if not new:
            return True
        if any(ref in self._seen for ref in new):
            return False
        parsed = [parse_tag(tag) for tag in tags]
        lasts = dict.fromkeys(f"{LAST}{found[1]}" for found in parsed if found)
        moves = {last: oid for last, oid in zip(lasts, new.values(), strict=False) if oid != self._seen.get(last)}
        leases = [f"--force-with-lease={last}:{self._seen.get(last, '')}" for last in moves]
        refspecs = [f"{oid}:{ref}" for ref, oid in (new | moves).items()]
        refused = self._push("--atomic", *leases, "--", self.remote, *refspecs)
        if refused is None:
            self._latest = self._seen = self._seen | new | moves
            self._tell()
            return True
        before = self._seen
        self.refresh()
        if all(self._seen.get(ref) == oid for ref, oid in new.items()):
            self._tell()
            return True  # it had arrived, and the answer had not
        if any(ref in self._seen for ref in new):
            return False
        if any(self._seen.get(last) != before.get(last) for last in moves):
            raise BehindError(f"others publish versions on {self.shown} all the time", "run the command again")
        raise StorageError(
            f"the git remote {self.shown} does not take the version ({refused.what})",
            "nothing was changed; it has to take new tags, and refs/proteus/last, from you",
        ) from refused

    def withdraw(self, tags: Iterable[str]) -> None:
        """Take tags away on the remote, for gto's sake; where that fails they stay, and proteus counts them once."""
        there = [ref for tag in tags if (ref := _TAGS + tag) in self._seen]
        if there and self._push("--", self.remote, *(f":{ref}" for ref in there)) is None:
            self._seen = {ref: oid for ref, oid in self._seen.items() if ref not in there}

    def _push(self, *args: str) -> GitError | None:
        """Push, and return why it failed. A user's hooks are for their branches: DVC's would push all of its cache."""
        try:
            self.run("push", "--quiet", "--no-verify", "--no-follow-tags", "--no-signed", *args, timeout_s=TRANSFER_S)
        except GitError as error:
            return error
        return None

    def _missing(self, refs: Mapping[str, str]) -> dict[str, str]:
        """Return the registry's tags among a remote's refs that are not here, by name; warn of those that differ."""
        lines = self.run("for-each-ref", "--format=%(objectname) %(refname)", _TAGS).splitlines()
        here = {ref: oid for oid, ref in (line.split(" ", 1) for line in lines)}
        offered = {
            ref: oid for ref, oid in refs.items() if ref.startswith(_TAGS) and parse_tag(ref.removeprefix(_TAGS))
        }
        for ref in offered.keys() & here.keys():
            if offered[ref] != here[ref]:
                tag = ref.removeprefix(_TAGS)
                self._warn(
                    ref,
                    f"tag {tag} in {self.root} is not the one that {self.shown} has, which is the group's: "
                    f"git tag -d {tag} and git update-ref -d refs/proteus/ledger/{tag} let it come",
                )
        return {ref.removeprefix(_TAGS): oid for ref, oid in offered.items() if ref not in here}

    def _tell(self) -> None:
        if self._hints:
            self._hints.published()

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            _log.warning("%s", text)


def share_tags(git: SharedGit, history: History, number: str) -> list[str]:
    """Publish those of a version's tags that the remote lacks, once its weights are where the group finds them; return them.

    Within `exclusive`.

    Raises
    ------
    VersionConflictError
        When the remote has a tag of that name that is another one.
    BehindError, StorageError
        As `SharedGit.offer`.

    """
    commit = history.known[number].commit
    own = [e for e in history.events if e.version == number or (e.version is None and e.commit == commit)]
    missing = git.lacking({e.tag: e.oid for e in own})
    if not git.offer(missing):
        raise VersionConflictError(
            f"{history.name}@v{number} on {git.shown} is another one than in {git.root}",
            "register yours as a new version, and git tag -d this one",
        )
    return list(missing)


def push_tags(root: Path, remote: str, name: str, number: str) -> list[str]:
    """Publish what the repository at `root` says of a version: VersionConflictError and StorageError as `share_tags`."""
    git = SharedGit(root, remote)
    return in_turn(git, lambda: share_tags(git, fold(name, read_events(git, name)), number))
