"""Git, by its own command line.

Plumbing commands only: they are stable, create tags atomically (GTO's own backend lost 11 of 15 races, git none), and
start faster than any binding imports.
"""

from __future__ import annotations

import logging
import re
import secrets
import shlex
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.environment import git_environment

TEMPORARY_INDEX = "proteus-index-"
FALLBACK_NAME = "proteus"
FALLBACK_EMAIL = "proteus@localhost"
# A user and password in a remote's address.
_SECRET = re.compile(r"://[^/\s]*@")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Who a tag or commit is by; `fallback` when git knew nobody."""

    name: str
    email: str
    fallback: bool = False


@dataclass(frozen=True)
class GitObject:
    """A blob, tree, commit or tag: its id and its bytes."""

    oid: str
    kind: str
    data: bytes


class GitError(StorageError):
    """Git refused; `what` holds its own words."""


class GitKilledError(GitError):
    """Git was killed, and so may have left its locks, and half of what it was to do."""


class BehindError(StorageError):
    """Somebody else of a group published first: what was to be published has to be thought over again."""


class Git:
    """One repository, by its top folder. What is published in it is nobody else's: `SharedGit` has others to ask.

    Raises
    ------
    StorageError
        From any method, when git is missing or the folder is no repository.

    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._held = threading.local()

    @property
    def held(self) -> tuple[int, ...]:
        """Descriptors that this thread's git processes inherit: a lock held through one lasts while any of them lives."""
        return getattr(self._held, "descriptors", ())

    @held.setter
    def held(self, descriptors: tuple[int, ...]) -> None:
        self._held.descriptors = descriptors

    @classmethod
    def find(cls, start: Path) -> Git:
        """Return the repository `start` lies in."""
        try:
            top = cls(start).run("rev-parse", "--show-toplevel")
        except GitError as error:
            if "not a git repository" not in error.what:
                raise
            raise StorageError(
                f"{start} is not in a git repository",
                "run git init and dvc init there, or work in a clone of the project",
            ) from error
        return cls(Path(top))

    def run(
        self, *args: str, data: str | None = None, env: dict[str, str] | None = None, timeout_s: float | None = None
    ) -> str:
        """Run ``git ARGS`` and return what it prints, without the last line end."""
        printed = self.run_bytes(*args, data=None if data is None else data.encode(), env=env, timeout_s=timeout_s)
        return printed.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")

    def run_bytes(
        self, *args: str, data: bytes | None = None, env: dict[str, str] | None = None, timeout_s: float | None = None
    ) -> bytes:
        """Run ``git ARGS`` and return the bytes it prints."""
        _log.debug("git -C %s %s", self.root, _SECRET.sub("://", shlex.join(args)))
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), *args],
                input=data,
                capture_output=True,
                check=False,
                timeout=timeout_s,
                pass_fds=self.held,
                env={**git_environment(), **(env or {})},
            )
        except FileNotFoundError as error:
            raise StorageError("git is not installed, or the folder is gone", f"look at {self.root}") from error
        except subprocess.TimeoutExpired as error:
            raise GitError(f"git {args[0]} took over {timeout_s:g} s", "check the remote") from error
        if done.returncode < 0:
            raise GitKilledError(f"git {args[0]} was killed by signal {-done.returncode}", "run the command again")
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit {done.returncode}"]
            # What went wrong; git's advice comes after it. Of several refs that a remote refuses, the one with a reason.
            refused = [line.strip() for line in lines if line.startswith(" ! [") and "atomic" not in line]
            words = next((line for line in lines if line.startswith("fatal: ")), (refused or lines[-1:])[0])
            raise GitError(f"git {args[0]}: {anonymous(words)}", f"run it by hand in {self.root}")
        return done.stdout

    def try_run(self, *args: str) -> str | None:
        """Return what ``git ARGS`` prints, or None when it fails."""
        try:
            return self.run(*args)
        except GitError:
            return None

    def refresh(self) -> None:
        """Bring what others have published: `exclusive` asks for it, so that a change is made to what is so now."""

    def offer(self, tags: Mapping[str, str]) -> bool:
        """Publish tag objects, by name, with whoever else decides of names; False where one of the names is taken."""
        del tags
        return True

    def withdraw(self, tags: Iterable[str]) -> None:
        """Take tags away where they were published; they are there under other names."""

    def folder(self) -> Path:
        """Return the repository's own folder, which its worktrees share."""
        return Path(self.run("rev-parse", "--path-format=absolute", "--git-common-dir"))

    def head(self) -> str | None:
        """Return HEAD's commit id, or None before the first commit."""
        return self.try_run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")

    def read(self, revision: str, path: str) -> str | None:
        """Return a file's text at a revision, or None when it is not there."""
        (found,) = self.read_objects([f"{revision}:{path}"])
        return found.data.decode("utf-8", "replace") if found and found.kind == "blob" else None

    def read_objects(self, names: Sequence[str]) -> list[GitObject | None]:
        """Return objects by any name git knows them by, in one process; None for what is not there."""
        if any("\n" in name for name in names):
            raise GitError("git cat-file: a name holds a line end", "give another name")
        printed = self.run_bytes("cat-file", "--batch", data="".join(f"{name}\n" for name in names).encode())
        found: list[GitObject | None] = []
        place = 0
        for _ in names:
            end = printed.index(b"\n", place)
            words = printed[place:end].split(b" ")
            place = end + 1
            # "NAME missing" or "NAME ambiguous" otherwise; a name may hold spaces.
            if len(words) != 3 or words[1] not in {b"blob", b"tree", b"commit", b"tag"}:
                found.append(None)
                continue
            size = int(words[2])
            found.append(GitObject(words[0].decode(), words[1].decode(), printed[place : place + size]))
            place += size + 1
        return found

    def ids(self, names: Sequence[str]) -> list[str | None]:
        """Return objects' ids by any name git knows them by, in one process, without reading them."""
        lines = self.run("cat-file", "--batch-check", data="".join(f"{name}\n" for name in names)).split("\n")
        words = [line.split(" ") for line in lines[: len(names)]]
        return [w[0] if len(w) == 3 and w[2].isdecimal() else None for w in words]

    def tree(self, oid: str) -> dict[str, str]:
        """Return the ids of all files below a commit or tree, by their paths."""
        entries = self.run("ls-tree", "-r", "-z", oid).split("\0")
        split = (entry.partition("\t") for entry in entries if entry)
        return {path: meta.split(" ")[2] for meta, _, path in split}

    def identity(self) -> Identity:
        """Return who commits here, or the fallback where git has no identity."""
        found = self.try_run("-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT")
        if not found:
            return Identity(FALLBACK_NAME, FALLBACK_EMAIL, fallback=True)
        name, _, rest = found.partition(" <")
        return Identity(name, rest.partition(">")[0])

    def identity_env(self) -> dict[str, str]:
        """Return the environment under which commit-tree and tag work without a configured identity."""
        who = self.identity()
        return {
            f"GIT_{role}_{field}": value
            for role in ("AUTHOR", "COMMITTER")
            for field, value in (("NAME", who.name), ("EMAIL", who.email))
        }

    def commit_files(self, files: Mapping[str, str], message: str, parent: str | None) -> str:
        """Return a new commit, a child of `parent`, with some files changed; branch, index and tree stay as they are."""
        # Under the repository's own folder, so that a crash leaves nothing in the tree.
        index = self.folder() / f"{TEMPORARY_INDEX}{secrets.token_hex(8)}"
        env = {"GIT_INDEX_FILE": str(index)}
        try:
            if parent:
                self.run("read-tree", parent, env=env)
            self.stage_files(files, env=env)
            tree = self.run("write-tree", env=env)
        finally:
            index.unlink(missing_ok=True)
        parents = ("-p", parent) if parent else ()
        return self.run("commit-tree", tree, *parents, data=message, env=self.identity_env())

    def stage_files(self, files: Mapping[str, str], env: dict[str, str] | None = None) -> None:
        """Put files' texts into the index, and nowhere else."""
        lines = []
        for path, text in sorted(files.items()):
            blob = self.run("hash-object", "-w", "--stdin", data=text)
            lines.append(f"100644 {blob}\t{path}\0")
        self.run("update-index", "--add", "-z", "--index-info", data="".join(lines), env=env)

    def make_tag(self, name: str, commit: str, message: str, time: int) -> str:
        """Write an annotated tag's object, by whoever commits here at `time`, and return its id; no ref names it yet."""
        who = self.identity()
        header = f"object {commit}\ntype commit\ntag {name}\ntagger {who.name} <{who.email}> {time} +0000\n\n"
        return self.run("mktag", data=header + message)


def anonymous(text: str) -> str:
    """Return a text without the users and passwords of addresses in it."""
    return _SECRET.sub("://", text)
