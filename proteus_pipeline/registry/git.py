"""Git, by its own command line.

Plumbing commands only: they are stable, create tags atomically (GTO's own backend lost 11 of 15 races, git none), and
start faster than any binding imports.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path

from proteus_pipeline.errors import StorageError

FALLBACK_NAME = "proteus"
FALLBACK_EMAIL = "proteus@localhost"
# What says which repository git works on: a git hook's environment names the hook's own, not the one at our folder.
_ELSEWHERE = frozenset(
    f"GIT_{name}"
    for name in (
        "ALTERNATE_OBJECT_DIRECTORIES",
        "COMMON_DIR",
        "DIR",
        "GRAFT_FILE",
        "IMPLICIT_WORK_TREE",
        "INDEX_FILE",
        "NAMESPACE",
        "OBJECT_DIRECTORY",
        "PREFIX",
        "REPLACE_REF_BASE",
        "SHALLOW_FILE",
        "WORK_TREE",
    )
)


@dataclass(frozen=True)
class Identity:
    """Who a tag or commit is by; `fallback` when git knew nobody."""

    name: str
    email: str
    fallback: bool = False


class GitError(StorageError):
    """Git refused; `what` holds its own words."""


class Git:
    """One repository, by its top folder.

    Raises
    ------
    StorageError
        From any method, when git is missing or the folder is no repository.

    """

    def __init__(self, root: Path) -> None:
        self.root = root

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
        inherited = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), *args],
                input=data,
                capture_output=True,
                check=False,
                timeout=timeout_s,
                # Commands that may ask a remote must fail rather than wait for a password nobody types.
                env={**inherited, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **(env or {})},
            )
        except FileNotFoundError as error:
            raise StorageError("git is not installed, or the folder is gone", f"look at {self.root}") from error
        except subprocess.TimeoutExpired as error:
            raise GitError(f"git {args[0]} took over {timeout_s:g} s", "check the remote") from error
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit {done.returncode}"]
            # What went wrong; git's advice comes after it.
            words = next((line for line in lines if line.startswith("fatal: ")), lines[-1])
            raise GitError(f"git {args[0]}: {words}", f"run it by hand in {self.root}")
        return done.stdout

    def try_run(self, *args: str) -> str | None:
        """Return what ``git ARGS`` prints, or None when it fails."""
        try:
            return self.run(*args)
        except GitError:
            return None

    def head(self) -> str | None:
        """Return HEAD's commit id, or None before the first commit."""
        return self.try_run("rev-parse", "--verify", "--quiet", "HEAD^{commit}")

    def read(self, revision: str, path: str) -> str | None:
        """Return a file's text at a revision, or None when it is not there."""
        try:
            # cat-file prints the bytes as they are; run() takes one line end off, which is put back.
            return self.run("cat-file", "blob", f"{revision}:{path}") + "\n"
        except GitError:
            return None

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

    def commit_files(self, files: dict[str, str], message: str) -> str:
        """Return a new commit, HEAD's child, with some files changed; branch, index and working tree stay as they are."""
        head = self.head()
        # Under the repository's own folder, so that a crash leaves nothing in the tree; one for each call, as two threads
        # may register at once.
        index = Path(self.run("rev-parse", "--absolute-git-dir")) / f"proteus-index-{secrets.token_hex(8)}"
        env = {"GIT_INDEX_FILE": str(index)}
        try:
            if head:
                self.run("read-tree", head, env=env)
            for path, text in sorted(files.items()):
                blob = self.run("hash-object", "-w", "--stdin", data=text)
                self.run("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", env=env)
            tree = self.run("write-tree", env=env)
        finally:
            index.unlink(missing_ok=True)
        parents = ("-p", head) if head else ()
        return self.run("commit-tree", tree, *parents, data=message, env=self.identity_env())

    def create_tag(self, name: str, commit: str, message: str) -> bool:
        """Create an annotated tag; return False, and change nothing, when it exists."""
        try:
            # --cleanup=verbatim: a line of the record that begins with # is no comment.
            self.run("tag", "-a", "--cleanup=verbatim", "-F", "-", name, commit, data=message, env=self.identity_env())
        except GitError as error:
            if "already exists" in error.what or "cannot lock ref" in error.what:
                return False
            raise
        return True
