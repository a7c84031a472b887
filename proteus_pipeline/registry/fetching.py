"""Tags from git remotes: one, looked at before it counts; or all of a model's, as ``git fetch`` brings them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from proteus_pipeline.registry.git import Git, GitError, anonymous
from proteus_pipeline.registry.shared import REMOTE_VARIABLE, group_remote

_TIMEOUT_S = 15.0


def offered(git: Git, tag: str) -> Iterator[tuple[str, str]]:
    """Yield each remote that has a tag, as it may be shown, and the tag's object, which is here then though nothing names it.

    A remote that can't be reached is passed over: registries are used offline too.
    """
    for remote in _remotes(git):
        incoming = f"refs/proteus/incoming/{tag}"
        try:
            git.run("fetch", "--quiet", "--no-tags", remote, f"+refs/tags/{tag}:{incoming}", timeout_s=_TIMEOUT_S)
            oid = git.run("rev-parse", incoming)
        except GitError:
            continue
        finally:
            git.try_run("update-ref", "-d", incoming)
        yield anonymous(remote), oid


def fetch_events(git: Git, name: str) -> list[str]:
    """Bring all of a model's tags from every remote; those that are here stay as they are. Return what went wrong."""
    failures = []
    patterns = [f"refs/tags/{name}{mark}*:refs/tags/{name}{mark}*" for mark in ("@", "#")]
    for remote in _remotes(git):
        # Fails, too, where a tag here differs: that one stays, and the others come.
        try:
            git.run("fetch", "--quiet", "--no-tags", remote, *patterns, timeout_s=_TIMEOUT_S)
        except GitError as error:
            failures.append(f"{anonymous(remote)}: {error.what}")
    return failures


def _remotes(git: Git) -> list[str]:
    names = (git.try_run("remote") or "").split()
    group = group_remote(git) if os.environ.get(REMOTE_VARIABLE) else None
    return [*names, group] if group and group not in names else names
