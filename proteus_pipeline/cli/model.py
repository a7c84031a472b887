"""``proteus model``: versions of models."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from proteus_pipeline.registry.versions import ModelVersion, ModelVersionManager


def add_to(verbs: Any) -> None:
    this = verbs.add_parser("model", help="versions of models: register, list, show, lock, fetch")
    this.set_defaults(run=lambda _: this.print_help() or 2)
    these = this.add_subparsers(metavar="VERB")
    register = _verb(these, "register", _register, "store weights as a version, and tag it")
    register.add_argument("name", metavar="NAME")
    register.add_argument("--version", required=True, metavar="V", help="MAJOR.MINOR.PATCH")
    register.add_argument("--weights", required=True, type=Path, help="a fair-esm .pt, a Hugging Face folder or file")
    register.add_argument("--meta", action="append", default=[], metavar="K=V", help="metadata to keep; repeatable")
    register.add_argument(
        "--depends", action="append", default=[], metavar="REF", help="a version it builds on; repeatable"
    )
    register.add_argument("--breaking", default="", metavar="TEXT", help="what a MAJOR version breaks")
    register.add_argument("--reason", default="", metavar="TEXT", help="why, for the history")
    listing = _verb(these, "list", _list, "versions, of one model or of all")
    listing.add_argument("name", nargs="?", metavar="NAME")
    show = _verb(these, "show", _show, "everything known of one version")
    show.add_argument("reference", metavar="REF")
    fetch = _verb(these, "fetch", _fetch, "make sure a version's tag and weights are here")
    fetch.add_argument("reference", metavar="REF")
    fetch.add_argument("--force", action="store_true", help="fetch the weights again, to mend damaged ones")
    lock = _verb(these, "lock", _lock, "write what the project's floating references mean to models.lock", home=False)
    lock.add_argument("--update", action="store_true", help="also those that are locked already")


def _verb(these: Any, name: str, run: Any, text: str, *, home: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = these.add_parser(name, help=text, description=text)
    if home:
        parser.add_argument("--home", help="the registry, where it is not this project's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _manager(args: argparse.Namespace, *, create: bool = False) -> ModelVersionManager:
    if args.home and not create and not Path(args.home).expanduser().exists():
        # A listing of a mistyped home would be empty.
        raise StorageError(f"{args.home} does not exist", "name the folder of a registry, or register a model there")
    from proteus_pipeline.registry.home import registry_home
    from proteus_pipeline.registry.versions import ModelVersionManager

    return ModelVersionManager(registry_home(args.home))


def _register(args: argparse.Namespace) -> int:
    from proteus_pipeline.serving.interface import ModelInterface

    metadata = _pairs(args.meta)
    manager = _manager(args, create=True)
    version = manager.register_version(
        ModelInterface(args.name, manager, weights=args.weights),
        args.version,
        metadata or None,
        dependencies=args.depends,
        reason=args.reason,
        breaking=args.breaking,
    )
    if args.json:
        _print_json(_facts(version))
    else:
        digest = version.record.model_digest if version.record else "unknown"
        print(f"registered {version.reference}: digest {digest}, tag {version.tag}")
        if version.record and version.record.author["fallback"]:
            print("note: git has no user.name here, so the tag is by proteus@localhost", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    manager = _manager(args)
    models = {args.name: manager.list_versions(args.name)} if args.name else manager.list_models()
    versions = [version for found in models.values() for version in found]
    if args.name and not versions:
        manager.resolve(args.name)  # raises the error that says what there is
    if args.json:
        _print_json({"home": str(manager.root), "versions": [_facts(v) for v in versions]})
        return 0
    print(f"models in {manager.root}")
    if not versions:
        print("  none; make repro, or proteus model register NAME --version 1.0.0 --weights PATH")
    for v in versions:
        size = "damaged record" if v.damage else "no record (gto)"
        if v.record:
            size = f"{v.record.size / 1e6:9.1f} MB  trunk {v.record.trunk_digest[:12]}"
        print(f"  {v.reference:<40} {size}{'  current' if v.current else ''}")
    return 0


def _show(args: argparse.Namespace) -> int:
    version = _manager(args).resolve(args.reference)
    facts = _facts(version)
    if args.json:
        _print_json(facts)
        return 0
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{key:<14} {text if len(text) < 400 else text[:397] + '...'}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from proteus_pipeline.cli.progress import DownloadProgress
    from proteus_pipeline.models.sources import load_catalogue
    from proteus_pipeline.registry.provision import provide

    manager = _manager(args)
    catalogue = load_catalogue(manager.root / "conf" / "model") if (manager.root / "conf" / "model").is_dir() else {}
    progress = DownloadProgress("fetching weights")
    version = provide(manager, args.reference, catalogue, progress=progress, force=args.force)
    print(json.dumps(_facts(version)) if args.json else f"{version.reference} is here")
    return 0


def _lock(args: argparse.Namespace) -> int:
    from proteus_pipeline.config.composition import PARAMS, compose, read_params
    from proteus_pipeline.stages.pipeline import update_lock
    from proteus_pipeline.stages.project import Project

    project = Project.find()
    composition = compose(project.work, read_params(project.work / PARAMS))
    changed = update_lock(project, composition, refresh=args.update)
    if args.json:
        _print_json({reference: asdict(entry) for reference, entry in changed.items()})
        return 0
    for reference, entry in changed.items():
        print(f"{reference} is v{entry.version}")
    print("models.lock is written; commit it" if changed else "models.lock is up to date")
    return 0


def _facts(version: ModelVersion) -> dict[str, Any]:
    facts: dict[str, Any] = {"reference": version.reference, "current": version.current}
    facts |= {"tag": version.tag, "commit": version.commit}
    if version.damage:
        facts["damage"] = version.damage.what
    return facts | (asdict(version.record) if version.record else {"name": version.name, "version": version.version})


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--meta {text!r} is no KEY=VALUE", "write it as --meta training_data=UR50D")
        pairs[key] = value
    return pairs


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))
