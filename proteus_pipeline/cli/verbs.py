"""What the verbs share."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from proteus_pipeline.errors import StorageError

TYPE_CHECKING = False  # typing takes 5 ms to import, a tenth of what a quick command may take
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from proteus_pipeline.registry.lookup import VersionLookup
    from proteus_pipeline.registry.version import ModelVersion
    from proteus_pipeline.registry.versions import ModelVersionManager


def fitted(formatter: type[argparse.HelpFormatter]) -> Callable[..., argparse.HelpFormatter]:
    """Return a formatter of help for the terminal's width: argparse's own way to ask for it takes 5 ms to import."""
    try:
        columns = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(sys.__stdout__.fileno()).columns  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        columns = 80  # no terminal
    return partial(formatter, width=(columns or 80) - 2)


def add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, *, home: bool = True
) -> argparse.ArgumentParser:
    """Return a new verb's parser, with the options that every verb of a registry has."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, formatter_class=fitted(argparse.HelpFormatter)
    )
    if home:
        parser.add_argument("--home", help="the registry, where it is not this project's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def home(args: argparse.Namespace, *, create: bool = False) -> Path:
    """Return the folder of the registry that a command is about: --home, the project's, or the user's own."""
    if args.home and not create and not Path(args.home).expanduser().exists():
        # A listing of a mistyped home would be empty.
        raise StorageError(f"{args.home} does not exist", "name the folder of a registry, or register a model there")
    from proteus_pipeline.registry.places import registry_home

    return registry_home(args.home)


def registry(args: argparse.Namespace, *, create: bool = False, **options: Any) -> ModelVersionManager:
    """Return the registry in `home`."""
    from proteus_pipeline.registry.versions import ModelVersionManager

    return ModelVersionManager(home(args, create=create), **options)


def lookup(args: argparse.Namespace) -> VersionLookup:
    """Return the registry in `home` to read only: what changes one takes as long to import as a quick command may take."""
    from proteus_pipeline.registry.lookup import VersionLookup

    return VersionLookup(home(args))


def print_json(value: object) -> None:
    """Print a value as JSON, the same text for the same value."""
    import json

    print(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def facts(version: ModelVersion) -> dict[str, Any]:
    """Return what a version's tags say of it, ready for JSON."""
    told: dict[str, Any] = {"reference": version.reference, "current": version.current}
    told |= {"tag": version.tag, "commit": version.commit}
    if version.damage:
        told["damage"] = version.damage.what
    return told | (plain(version.record) if version.record else {"name": version.name, "version": version.version})


def shown(text: str) -> str:
    """Return somebody else's text without what a terminal would obey: its control characters, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tell(args: argparse.Namespace, value: object, text: str) -> None:
    """Print a result: as JSON where that was asked for, else in words."""
    if args.json:
        print_json(value)
    else:
        print(text)


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON takes it."""
    from dataclasses import asdict

    return asdict(value)
