"""The verbs of ``proteus model`` that change a registry."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from proteus_pipeline.cli.verbs import add_verb, facts, plain, print_json, registry, tell
from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stages.notes import note

if TYPE_CHECKING:
    from proteus_pipeline.registry.retirement import Deletion
    from proteus_pipeline.registry.version import ModelVersion
    from proteus_pipeline.registry.versions import ModelVersionManager


def add_register(these: Any) -> None:
    register = add_verb(these, "register", _register, "store weights as a version, and tag it")
    register.add_argument("name", metavar="NAME", help="the model")
    number = register.add_mutually_exclusive_group(required=True)
    number.add_argument("--version", metavar="V", help="MAJOR.MINOR.PATCH")
    number.add_argument(
        "--bump", choices=("major", "minor", "patch", "auto"), help="the next number; auto: as the measured drift asks"
    )
    register.add_argument(
        "--weights", type=Path, help="a fair-esm .pt, a Hugging Face folder or file; an official model's are fetched"
    )
    register.add_argument("--meta", action="append", default=[], metavar="K=V", help="metadata to keep; repeatable")
    register.add_argument("--schema", metavar="FILE", help="hold the metadata to a JSON Schema, or to protein-model")
    register.add_argument(
        "--depends", action="append", default=[], metavar="REF", help="a version it builds on; repeatable"
    )
    register.add_argument("--breaking", default="", metavar="TEXT", help="what a MAJOR version breaks")
    register.add_argument("--tolerance", type=float, metavar="X", help="declare the relative drift a PATCH may have")
    register.add_argument("--on-branch", action="store_true", help="advance the checked-out branch as well")
    register.add_argument(
        "--max-versions", metavar="N", default="10", help="delete the oldest beyond N (default 10), or none"
    )
    _add_reason(register)


def add_to(these: Any) -> None:
    rollback = add_verb(these, "rollback", _rollback, "make a version current, once its weights are checked")
    delete = add_verb(
        these, "delete", _delete, "delete a version that nothing needs, with a backup; its number stays taken"
    )
    delete.add_argument("--force", action="store_true", help="also where something needs it")
    restore = add_verb(these, "restore", _restore, "bring a deleted version back, to the bit")
    adopt = add_verb(these, "adopt", _adopt, "give a version that gto or a person tagged the record that ours have")
    prune = add_verb(these, "prune", _prune, "delete the oldest versions that nothing needs")
    prune.add_argument("name", metavar="NAME", help="the model")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many versions stay")
    verify = add_verb(these, "verify", _verify, "check tags, records, weights, remotes, backups; exit 3 or 4 if wrong")
    verify.add_argument("reference", nargs="?", metavar="REF", help="only this version; all versions without it")
    verify.add_argument("--repair", action="store_true", help="mend what can be mended; damaged bytes go to quarantine")
    verify.add_argument("--deep", action="store_true", help="read and hash the copies on remotes as well")
    lock = add_verb(
        these, "lock", _lock, "write what the project's floating references mean to models.lock", home=False
    )
    lock.add_argument("--update", action="store_true", help="also those that are locked already")
    pull = add_verb(
        these, "pull", _pull, "have a version's tag and weights here: from a backup, a remote or its source"
    )
    pull.add_argument("--force", action="store_true", help="check weights that are here, and mend damaged ones")
    push = add_verb(
        these, "push", _push, "send a version: its weights to a DVC remote, then its tags to the git remote"
    )
    push.add_argument(
        "-r", "--remote", metavar="NAME", help="the DVC remote; PROTEUS_S3_URL's or the default one otherwise"
    )
    push.add_argument("--no-tags", action="store_true", help="send the weights alone")
    for verb in (rollback, delete, restore, adopt, pull, push):
        verb.add_argument("reference", metavar="REF", help="the version, such as NAME@v1.2.3")
    for verb in (rollback, delete, restore, adopt, prune):
        _add_reason(verb)
    for verb in (rollback, delete, restore, prune, lock):
        verb.add_argument("--dry-run", action="store_true", help="only say what would be done")
    for verb in (delete, prune):
        verb.add_argument("--no-backup", action="store_true", help="make no backup: the weights are gone for good")


def _add_reason(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", metavar="TEXT", help="why, for the history")


def _register(args: argparse.Namespace) -> int:
    from proteus_pipeline.serving.interface import ModelInterface

    metadata = _pairs(args.meta)
    manager = registry(args, create=True, max_versions=_limit(args.max_versions), metadata_schema=args.schema)
    version = manager.register_version(
        ModelInterface(args.name, manager, weights=args.weights),
        args.version,
        metadata or None,
        bump=args.bump,
        configuration=_configuration(manager),
        dependencies=args.depends,
        reason=args.reason,
        breaking=args.breaking,
        tolerance=args.tolerance,
        on_branch=args.on_branch,
    )
    if args.json:
        print_json(facts(version))
    else:
        digest = version.record.model_digest if version.record else "unknown"
        print(f"registered {version.reference}: digest {digest}, tag {version.tag}")
        if version.record and version.record.compatibility.get("reasons"):
            print(f"  {'; '.join(version.record.compatibility['reasons'])}")
        if version.record and version.record.author["fallback"]:
            note("git has no user.name here, so the tag is by proteus@localhost")
    return 0


def _limit(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isascii() or not text.isdecimal():
        raise ConfigError(f"--max-versions {text!r} is no number", "write 1 or more, or none")
    return int(text)


def _configuration(manager: ModelVersionManager) -> dict[str, Any]:
    """Return the project's resolved settings, for the record; a home that is no project has none."""
    if not (manager.root / "conf" / "config.yaml").is_file():
        return {}
    from proteus_pipeline.config.composition import PARAMS, compose, read_params

    return plain(compose(manager.root, read_params(manager.root / PARAMS)).settings)


def _rollback(args: argparse.Namespace) -> int:
    manager = registry(args)
    version = manager.resolve(args.reference)
    before = manager.history(version.name).current
    if args.dry_run:
        planned = {"reference": version.reference, "would": "make current", "current": before}
        now = f"which is v{before} now" if before else "and none is now"
        tell(args, planned, f"would make {version.reference} current, {now}")
        return 0
    version = manager.rollback(version.name, version.version, reason=args.reason)
    if args.json:
        print_json(facts(version))
        return 0
    print(f"{version.reference} is current" + (" already" if before == version.version else f"; it was v{before}"))
    _tell_of_lock(manager, version)
    return 0


def _tell_of_lock(manager: ModelVersionManager, version: ModelVersion) -> None:
    """Say so where models.lock pins floating references of the model to another version: pipelines go by it."""
    from proteus_pipeline.registry.lock import read_lock

    locked = read_lock(manager.root / "models.lock")
    for reference, entry in locked.items():
        if reference == f"{version.name}@current" and entry.version != version.version:
            print(f"note: models.lock says that {reference} is v{entry.version}; proteus model lock --update")


def _delete(args: argparse.Namespace) -> int:
    manager = registry(args, backup_enabled=not args.no_backup)
    name, number = _named(manager, args.reference)
    deletion = manager.plan_deletion(name, number)
    if not args.dry_run:
        deletion = manager.delete_version(name, number, reason=args.reason, force=args.force)
    return _told(args, [deletion])


def _prune(args: argparse.Namespace) -> int:
    manager = registry(args, backup_enabled=not args.no_backup)
    deletions = manager.prune(args.name, args.keep, reason=args.reason, dry_run=args.dry_run)
    if not deletions and not args.json:
        print(f"nothing to delete: {args.name} has {len(manager.list_versions(args.name))} versions, or all are needed")
        return 0
    return _told(args, deletions)


def _told(args: argparse.Namespace, deletions: list[Deletion]) -> int:
    if args.json:
        print_json([plain(d) for d in deletions])
        return 0
    for d in deletions:
        did = "would delete" if args.dry_run else "deleted"
        if d.done:
            print(
                f"{d.reference} is deleted already" + (f"; {d.frees / 1e6:.1f} MB were left to drop" if d.frees else "")
            )
            continue
        backup = "with a backup" if d.backup else "without a backup"
        print(f"{did} {d.reference}, {backup}: {d.frees / 1e6:.1f} MB leave the DVC cache")
        for why in d.needed:
            print(f"  {'needed' if args.dry_run else 'although'}: {why}")
    return 0


def _restore(args: argparse.Namespace) -> int:
    manager = registry(args)
    name, number = _named(manager, args.reference)
    if args.dry_run:
        deleted = number not in manager.history(name).live
        if deleted and number not in manager.history(name).known:
            manager.get_version(name, number)  # raises the error that says what there is
        state = "would be restored" if deleted else "is not deleted"
        tell(
            args,
            {"reference": f"{name}@v{number}", "would": "restore" if deleted else None},
            f"{name}@v{number} {state}",
        )
        return 0
    version = manager.restore_version(name, number, reason=args.reason)
    tell(args, facts(version), f"{version.reference} is back")
    return 0


def _adopt(args: argparse.Namespace) -> int:
    manager = registry(args)
    name, number = _named(manager, args.reference)
    version = manager.adopt(name, number, reason=args.reason)
    digest = version.record.model_digest if version.record else "unknown"
    tell(args, facts(version), f"adopted {version.reference}: digest {digest}")
    return 0


def _named(manager: ModelVersionManager, reference: str) -> tuple[str, str]:
    """Return a reference's name and number; an exact one may be of a version that is deleted."""
    from proteus_pipeline.identity.names import Reference

    wanted = Reference.parse(reference)
    return wanted.name, wanted.selector if wanted.exact else manager.resolve(reference).version


def _verify(args: argparse.Namespace) -> int:
    manager = registry(args)
    findings = manager.verify(args.reference, repair=args.repair, deep=args.deep)
    code = max((f.exit_code for f in findings), default=0)
    if args.json:
        print_json({"home": str(manager.root), "exit_code": code, "findings": [plain(f) for f in findings]})
        return code
    for f in findings:
        print(f"{f.kind:<8} {f.part:<12} {f.what}; " + (f"repaired: {f.repaired}" if f.repaired else f.remedy))
    versions = sum(len(found) for found in manager.list_models().values())
    about = args.reference or f"{versions} versions"
    left = sum(1 for f in findings if f.exit_code)
    print(f"{about} in {manager.root}: " + (f"{len(findings)} findings, {left} not mended" if findings else "sound"))
    return code


def _pull(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import DownloadProgress
    from proteus_pipeline.identity.names import Reference
    from proteus_pipeline.models.official import catalogue_at
    from proteus_pipeline.registry.bucket import named_bucket
    from proteus_pipeline.registry.fetching import fetch_events
    from proteus_pipeline.registry.provision import provide

    manager = registry(args, create=True)
    name = Reference.parse(args.reference).name
    if git := manager.found():
        named_bucket(manager.root)
        failures = fetch_events(git, name)
        if failures and manager.list_versions(name):
            print(f"warning: going by the tags that are here: {'; '.join(failures)}", file=sys.stderr)
    progress = DownloadProgress("fetching weights")
    version = provide(manager, args.reference, catalogue_at(manager.root), progress=progress, force=args.force)
    tell(args, facts(version), f"{version.reference} is here")
    return 0


def _push(args: argparse.Namespace) -> int:
    from proteus_pipeline.registry.bucket import named_bucket
    from proteus_pipeline.registry.shared import group_remote, push_tags
    from proteus_pipeline.registry.supply import send

    manager = registry(args)
    version = manager.resolve(args.reference)
    hub = None if args.no_tags else group_remote(manager.ensure_home())
    place = args.remote or named_bucket(manager.root)
    sent, remote = send(manager.root, version.pointer, version.reference, place)
    # A tag comes last: whoever sees it finds its weights.
    tags = push_tags(manager.root, hub, version.name, version.version) if hub else []
    told = {"reference": version.reference, "remote": remote, "sent": sent, "tags": tags}
    said = f"{version.reference} is on DVC remote {remote}: {sent} objects sent; "
    if hub:
        said += f"its tags are on the git remote: {len(tags)} sent"
    else:
        said += f"its tag: git push origin {quote(version.tag)}"
    tell(args, told, said)
    return 0


def _lock(args: argparse.Namespace) -> int:
    from proteus_pipeline.config.composition import PARAMS, compose, read_params
    from proteus_pipeline.stages.pipeline import update_lock
    from proteus_pipeline.stages.project import Project

    project = Project.find()
    composition = compose(project.work, read_params(project.work / PARAMS))
    changed = update_lock(project, composition, refresh=args.update, dry_run=args.dry_run)
    if args.json:
        print_json({reference: plain(entry) for reference, entry in changed.items()})
        return 0
    for reference, entry in changed.items():
        print(f"{reference} {'would be' if args.dry_run else 'is'} v{entry.version}")
    written = "models.lock is as it was" if args.dry_run else "models.lock is written; commit it"
    print(written if changed else "models.lock is up to date")
    return 0


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--meta {text!r} is no KEY=VALUE", "write it as --meta training_data=UR50D")
        pairs[key] = value
    return pairs
