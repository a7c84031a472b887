"""What still needs a version: who depends on it, what records it, and which commits point to its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proteus_pipeline.registry.events import History, parse_tag
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.version import ModelVersion

# Files in which a project says which versions it uses.
_FILES = ("dvc.lock", "models.lock", "params.yaml")
_FOLDER = "conf"
_REFERENCE = re.compile(
    r"(?<![\w/@-])([A-Za-z0-9][\w/-]*)@v?(\d+\.\d+\.\d+(?:[-+][0-9A-Za-z.+-]*[0-9A-Za-z])?)", re.ASCII
)
_MD5 = re.compile(r"\bmd5: ([0-9a-f]{32}(?:\.dir)?)\b")
_SHOWN = 3


@dataclass(frozen=True)
class _Ref:
    """A branch or tag, and the commit it leads to."""

    name: str
    commit: str
    is_branch: bool


def users(
    git: Git, history: History, versions: Sequence[ModelVersion], live: Iterable[ModelVersion]
) -> dict[str, list[str]]:
    """Return why each version is needed, by reference; an empty list where nothing needs it.

    Parameters
    ----------
    git
        The registry's repository.
    history
        The model's.
    versions
        Versions of that model.
    live
        The live versions of all models, which may depend on them.

    """
    needed: dict[str, list[str]] = {v.reference: [] for v in versions}
    for version in versions:
        if version.version == history.current:
            needed[version.reference].append("it is the current version")
    for other in live:
        for dependency in other.record.dependencies if other.record else ():
            if dependency in needed:
                needed[dependency].append(f"{other.reference} depends on it")
    for reference, places in _recorded(git, versions).items():
        shown = ", ".join(places[:_SHOWN]) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
        needed[reference].append(f"it is recorded in {shown}")
    return needed


def pointed_to(git: Git) -> set[str]:
    """Return the MD5s that DVC files name at any branch, in the working tree, and at any tag that is no version's."""
    # A version's tag leads to a commit with that one pointer changed; the others in it are a branch's, now or once.
    commits = {r.commit for r in _refs(git) if r.is_branch or parse_tag(r.name) is None}
    blobs = {
        oid
        for commit in commits
        for path, oid in git.tree(commit).items()
        if path.endswith(".dvc") or path.rpartition("/")[2] == "dvc.lock"
    }
    texts = [blob.data.decode("utf-8", "replace") for blob in git.read_objects(sorted(blobs)) if blob]
    texts += [_read(path) for path in (git.root / "models").glob("**/*.dvc")] + [_read(git.root / "dvc.lock")]
    return {md5 for text in texts for md5 in _MD5.findall(text)}


def _recorded(git: Git, versions: Sequence[ModelVersion]) -> dict[str, list[str]]:
    """Return where each version is recorded: ``FILE at BRANCH``; the tags of the version itself do not count."""
    by_reference = {v.reference: v for v in versions}
    found: dict[str, dict[str, None]] = {}
    for path, text, refs in _texts(git):
        for reference in _references(path, text, versions):
            if reference in by_reference:
                own = by_reference[reference].commit
                elsewhere = [r.name for r in refs if r.is_branch or r.commit != own]
                for place in elsewhere or ([] if refs else ["the working tree"]):
                    found.setdefault(reference, {})[f"{path} at {place}"] = None
    return {reference: list(places) for reference, places in found.items()}


def _references(path: str, text: str, versions: Sequence[ModelVersion]) -> set[str]:
    references = {f"{name}@v{number}" for name, number in _REFERENCE.findall(text)}
    if path == "models.lock":
        references |= _locked(text)
    if path == "dvc.lock":
        # A stage that takes the weights' folder itself has its hash there.
        hashes = set(_MD5.findall(text))
        references |= {v.reference for v in versions if v.record and v.record.weights["md5"] in hashes}
    return references


def _locked(text: str) -> set[str]:
    import yaml

    try:
        entries: Mapping[str, Mapping[str, Any]] = (yaml.safe_load(text) or {}).get("references") or {}
        return {f"{wanted.partition('@')[0]}@v{entry['version']}" for wanted, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, yaml.YAMLError):
        return set()


def _texts(git: Git) -> list[tuple[str, str, list[_Ref]]]:
    """Return each distinct file that may record a version: its path, its text, and the refs it is at (none: here)."""
    refs = _refs(git)
    by_commit: dict[str, list[_Ref]] = {}
    for ref in refs:
        by_commit.setdefault(ref.commit, []).append(ref)
    commits = list(by_commit)
    places: dict[tuple[str, str], list[_Ref]] = {}
    trees: dict[str, list[_Ref]] = {}
    names = (*_FILES, _FOLDER)
    ids = git.ids([f"{commit}:{name}" for commit in commits for name in names])
    for index, oid in enumerate(ids):
        if oid is None:
            continue
        commit, name = commits[index // len(names)], names[index % len(names)]
        if name == _FOLDER:
            trees.setdefault(oid, []).extend(by_commit[commit])
        else:
            places.setdefault((name, oid), []).extend(by_commit[commit])
    for tree, at in trees.items():
        for path, oid in git.tree(tree).items():
            places.setdefault((f"{_FOLDER}/{path}", oid), []).extend(at)
    blobs = git.read_objects([oid for _, oid in places])
    texts = [
        (path, blob.data.decode("utf-8", "replace"), at)
        for ((path, _), at), blob in zip(places.items(), blobs, strict=True)
        if blob and blob.kind == "blob"
    ]
    here = [git.root / name for name in _FILES] + sorted((git.root / _FOLDER).glob("**/*.yaml"))
    return texts + [(p.relative_to(git.root).as_posix(), _read(p), []) for p in here]


def _refs(git: Git) -> list[_Ref]:
    names = git.run("for-each-ref", "--format=%(refname)", "refs/heads/", "refs/remotes/", "refs/tags/").splitlines()
    refs = []
    # However many tags of tags lead there.
    for name, commit in zip(names, git.ids([f"{name}^{{commit}}" for name in names]), strict=True):
        if commit:
            _, group, short = name.split("/", 2)
            refs.append(_Ref(short, commit, group != "tags"))
    return refs


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
