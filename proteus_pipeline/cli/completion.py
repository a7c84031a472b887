"""``proteus completion SHELL``, and what a shell is offered: verbs, options, references, override keys."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
_SELECTORS = ("", "@latest", "@current")
_OF_A_MODEL = ("model", "candidate", "stages.embed.model", "stages.compare.model")


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "completion",
        help="what makes a shell complete verbs, options, references and settings",
        description="Print what a shell needs to complete proteus's verbs, options, references and settings.",
    )
    this.add_argument("shell", choices=SHELLS, help="which shell")
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["proteus"], shell=args.shell))
    return 0


def complete(top: argparse.ArgumentParser, leaves: Iterator[tuple[str, argparse.ArgumentParser]]) -> None:
    """Answer a shell that asks how the words it has so far may go on, and exit; does nothing where none asks."""
    import argcomplete

    for _, leaf in leaves:
        for action in leaf._actions:  # noqa: SLF001 - argcomplete takes completers as attributes of actions
            shown = action.metavar if isinstance(action.metavar, str) else ""
            if "KEY=VALUE" in shown:
                action.completer = _settings if shown == "KEY=VALUE" else _words  # type: ignore[attr-defined]
            elif shown == "REF":
                action.completer = _references  # type: ignore[attr-defined]
            elif shown == "NAME" and action.dest == "name":
                action.completer = _names  # type: ignore[attr-defined]
    argcomplete.autocomplete(top, always_complete_options=False)


def _or_nothing(completer: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Have a completer offer nothing where it fails: in the middle of a line is no place for an error."""

    @wraps(completer)
    def offered(prefix: str, **options: Any) -> list[str]:
        try:
            return completer(prefix=prefix, **options)
        except Exception:  # noqa: BLE001 - whatever a broken project does to a library
            return []

    return offered


def _versions() -> dict[str, list[str]]:
    """Return the exact references of each model of the registry that a command would use."""
    from proteus_pipeline.registry.lookup import VersionLookup
    from proteus_pipeline.registry.places import registry_home

    models = VersionLookup(registry_home()).list_models()
    return {name: [version.reference for version in versions] for name, versions in models.items()}


@_or_nothing
def _names(**_: object) -> list[str]:
    return list(_versions())


@_or_nothing
def _references(**_: object) -> list[str]:
    return [
        text
        for name, exact in _versions().items()
        for text in (*exact, *(f"{name}{selector}" for selector in _SELECTORS))
    ]


@_or_nothing
def _settings(prefix: str, **_: object) -> list[str]:
    key, equals, _value = prefix.partition("=")
    if equals:
        return [f"{key}={reference}" for reference in _references(prefix="")] if key in _OF_A_MODEL else []
    return [f"{key}=" for key in _keys()]


@_or_nothing
def _words(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Return how a word of `proteus cache` may go on: what the verb is about, or a setting."""
    files = [str(p) for p in sorted(Path().glob(f"{prefix}*"))] if "FASTA" in getattr(parsed_args, "takes", "") else []
    references = _references(prefix=prefix) if getattr(parsed_args, "takes", "") == "REF" else []
    return [*files, *references, *_settings(prefix=prefix)]


def _keys() -> list[str]:
    """Return the dotted keys of params.yaml: those that may be set."""
    import yaml

    from proteus_pipeline.registry.places import project_root
    from proteus_pipeline.stages.template import template_folder

    path = (project_root() or template_folder()) / "params.yaml"
    return sorted(_leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, below in value.items():
        if isinstance(below, dict):
            # groups.data=mine is written data=mine.
            yield from _leaves(below, "" if key == "groups" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
