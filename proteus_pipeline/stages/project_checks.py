"""What ``proteus doctor`` looks at of a project: its repository, settings, pipeline, remotes, versions and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from shlex import quote
from typing import TYPE_CHECKING, Any

import yaml

from proteus_pipeline.errors import IntegrityError, ProteusError, StorageError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.lock import Locked, read_lock
from proteus_pipeline.registry.pointers import Pointer, pointer_at
from proteus_pipeline.registry.refs import LEDGER
from proteus_pipeline.registry.weights import DvcCache, dvc_configurations, remote_names
from proteus_pipeline.stages.compose import LOCK, check_cache_folders
from proteus_pipeline.stages.looking import FAIL, OK, WARN, Check, Here, Look
from proteus_pipeline.stages.pipeline import floating_references
from proteus_pipeline.stages.project import STAGES
from proteus_pipeline.stages.template import VERSION_KEY, pipeline, template_folder

if TYPE_CHECKING:
    from proteus_pipeline.registry.version import ModelVersion

_SECRETS = {"password", "secret_access_key", "session_token", "connection_string", "account_key", "sas_token", "token"}
_FEW = 5


def _repository(here: Here) -> Iterator[Check]:
    root = here.root
    if "DVC_ROOT" in os.environ:
        yield Check(
            "project", WARN, f"DVC_ROOT is set: {os.environ['DVC_ROOT']} counts as the project", "unset DVC_ROOT"
        )
    git, dvc = (root / ".git").exists(), (root / ".dvc").is_dir()
    if not git and not dvc and not (root / "dvc.yaml").exists():
        yield Check("project", WARN, f"{root} is in no project", "cd to one, or make one: proteus init DIR")
    elif not git:
        yield Check("project", FAIL, f"{root} is no git repository", "clone the project again, or run git init there")
    elif not dvc:
        yield Check("project", FAIL, f"{root} has no .dvc", "git restore .dvc, or run dvc init there")
    else:
        head = Git(root).head()
        if head is None:
            yield Check("project", FAIL, f"{root} has no commit", "git add --all && git commit -m start")
        else:
            yield Check("project", OK, f"{root}, at {head[:12]}")


def _settings(here: Here) -> Iterator[Check]:
    if not here.is_repository:
        return
    settings = here.composition.settings
    check_cache_folders(here.project, settings.cache)
    fasta = here.project.find_file(settings.data.fasta)
    if not fasta.exists():
        yield Check(
            "settings", FAIL, f"data.fasta: {fasta} does not exist", "set data.fasta=PATH, from the project's root"
        )
    else:
        catalogue = here.project.catalogue
        yield Check(
            "settings", OK, f"model={settings.stages.embed.model}; weights of {len(catalogue)} models are known"
        )


def _pipeline(here: Here) -> Iterator[Check]:
    """Compare the stages with those that this version of the package makes; stages of the user's own do not count."""
    if not here.is_project:
        return
    path = here.root / "dvc.yaml"
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        stages = {name: _described(own[name]) for name in STAGES}
    except FileNotFoundError:
        yield Check("pipeline", FAIL, "dvc.yaml does not exist", "git restore dvc.yaml")
        return
    except (KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = "is no YAML" if isinstance(error, yaml.YAMLError) else "does not have the stages of a proteus project"
        yield Check("pipeline", FAIL, f"dvc.yaml {why}", "git restore dvc.yaml")
        return
    theirs = yaml.safe_load(pipeline((template_folder() / "dvc.yaml").read_text(encoding="utf-8")))["stages"]
    differing = [name for name in STAGES if stages[name] != _described(theirs[name])]
    if differing:
        what = f"dvc.yaml differs from what this version makes: {', '.join(differing)}"
        yield Check("pipeline", WARN, what, "compare it with a new project's: proteus init DIR")
    else:
        yield Check("pipeline", OK, f"dvc.yaml has {', '.join(stages)}")


def _described(stage: dict[str, Any]) -> dict[str, Any]:
    """Return what a stage runs, uses and makes, without this repository's source files and what stands for them."""
    told = {key: value for key, value in stage.items() if key != "desc"}
    told["deps"] = [dep for dep in stage.get("deps", ()) if not str(dep).startswith("proteus_pipeline/")]
    params = [key for group in stage.get("params", ()) for key in group["composed.yaml"]]
    return told | {"params": [key for key in params if key != VERSION_KEY]}


def _dvc(here: Here) -> Iterator[Check]:
    if not here.is_repository:
        return
    names = remote_names(here.root)
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for path, parser in dvc_configurations(here.root):
        for section in parser.sections():
            name = section.strip("'").removeprefix('remote "').removesuffix('"')
            if name not in options:
                continue
            options[name] = dict(parser.items(section)) | options[name]
            open_secrets = sorted(_SECRETS.intersection(parser.options(section)))
            if open_secrets and path == here.root / ".dvc" / "config":
                what = f".dvc/config, which git has, holds {open_secrets[0]} of remote {name}"
                yield Check(
                    "remotes", WARN, what, f"dvc remote modify --local {name} {open_secrets[0]} ..., and change it"
                )
    for name, told in options.items():
        s3 = told.get("url", "").startswith("s3://")
        if s3 and told.get("verify", "").lower() != "true":
            what = f"remote {name} is on S3 without verify: DVC would take damaged bytes for weights"
            yield Check("remotes", WARN, what, f"dvc remote modify {quote(name)} verify true")
    if names:
        yield Check("remotes", OK, f"{', '.join(names)}; {names[0]} first")
    else:
        yield Check(
            "remotes", WARN, "no DVC remote: weights are on this machine alone", "dvc remote add --default NAME URL"
        )


def _versions(here: Here) -> Iterator[Check]:
    """Look at each version's tag, record and pointer, and whether its weights are there; none is read."""
    if not here.is_repository:
        return
    git, cache = Git(here.root), DvcCache(here.root)
    models = here.project.manager.list_models()
    versions = [version for found in models.values() for version in found]
    without: list[str] = []
    wrong = 0
    for version in versions:
        try:
            if cache.files(_pointer(git, version)) is None:
                without.append(version.reference)
        except IntegrityError as error:
            wrong += 1
            yield Check("versions", FAIL, " ".join(error.what.split()), "proteus model verify --repair")
    if without:
        names = ", ".join(without[:_FEW]) + (", ..." if len(without) > _FEW else "")
        what = f"{len(without)} of {len(versions)} versions have no weights here: {names}"
        yield Check("versions", WARN, what, f"proteus model pull {without[0]}, where they are needed")
    if not (wrong or without):
        count = f"{len(versions)} versions of {len(models)} models"
        yield Check("versions", OK, f"{count}; every bit is compared by: proteus model verify")


def _pointer(git: Git, version: ModelVersion) -> Pointer:
    """Return where a version's weights are, as `ModelVersion.pointer` does, and write nothing."""
    if version.damage:
        raise version.damage
    pointer, entered = pointer_at(git, version.commit, version.name, LEDGER + version.tag)
    if entered not in {None, version.oid}:
        raise IntegrityError(f"tag {version.tag} was moved or edited since it was made")
    if version.record and version.record.weights["md5"] != pointer.md5:
        raise IntegrityError(f"tag {version.tag} points to other weights than its record says")
    return pointer


def _lock(here: Here) -> Iterator[Check]:
    if not here.is_project:
        return
    known = read_lock(here.root / LOCK)
    manager = here.project.manager
    sound = True
    for reference, entry in known.items():
        name = reference.partition("@")[0]
        found = {v.version: v for v in manager.list_versions(name)}.get(entry.version)
        if found is None:
            sound = False
            what = f"{LOCK} says that {reference} is v{entry.version}, which is not registered here"
            yield Check("lock", WARN, what, f"proteus model pull {name}@v{entry.version}")
        elif found.record and Locked.of(found) != entry:
            sound = False
            what = f"{LOCK} says that {reference} is v{entry.version} with other weights than that version has"
            yield Check("lock", FAIL, what, "find out which is right, then: proteus model lock --update")
        elif (now := manager.resolve(reference)).version != entry.version:
            sound = False
            what = f"{reference} means v{now.version} now, and {LOCK} says v{entry.version}"
            yield Check("lock", WARN, what, "proteus model lock --update, if runs should follow")
    for reference in floating_references(here.composition):
        if reference not in known:
            sound = False
            yield Check("lock", FAIL, f"{reference} is used and not in {LOCK}", "proteus model lock")
    if sound:
        yield Check("lock", OK, f"{len(known)} floating references are locked")


def _pointers(here: Here) -> Iterator[Check]:
    """Look for pointers in models/ that were edited, or that name weights of no version."""
    if not here.is_repository:
        return
    git = Git(here.root)
    changed = [
        line[3:].strip('"')
        for line in git.run("status", "--porcelain", "--untracked-files=all", "--", "models").splitlines()
        if line.endswith((".dvc", '.dvc"'))
    ]
    for name in changed:
        yield Check("pointers", WARN, f"{name} is not as HEAD has it", f"git restore {quote(name)}, or commit it")
    paths = sorted((here.root / "models").rglob("*.dvc"))
    for path in paths:
        name = path.relative_to(here.root / "models").with_suffix("").as_posix()
        try:
            found = Pointer.parse(path.read_text(encoding="utf-8"), f"models/{name}.dvc")
            known = {_pointer(git, v).md5 for v in here.project.manager.list_versions(name)}
        except (OSError, UnicodeDecodeError, ProteusError) as error:
            what = error.what if isinstance(error, StorageError) else str(error)
            yield Check("pointers", FAIL, " ".join(what.split()), f"git restore models/{quote(name)}.dvc")
            continue
        if known and found.md5 not in known:
            what = f"models/{name}.dvc names weights of no version of {name}"
            yield Check("pointers", WARN, what, f"git restore models/{quote(name)}.dvc, or register them")
    if not changed:
        yield Check("pointers", OK, f"{len(paths)} in models/, as committed")


LOOKS: dict[str, Look] = {
    "project": _repository,
    "settings": _settings,
    "pipeline": _pipeline,
    "remotes": _dvc,
    "versions": _versions,
    "lock": _lock,
    "pointers": _pointers,
}
