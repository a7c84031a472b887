"""The environment git runs in here."""

from __future__ import annotations

import os

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


def git_environment() -> dict[str, str]:
    """Return this process's environment without what would lead git to another repository."""
    inherited = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    # Commands that may ask a remote must fail rather than wait for a password nobody types.
    return {**inherited, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
