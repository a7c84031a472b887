"""``proteus model``: its verbs, and the listing. The others are in model_views and model_changes."""

from __future__ import annotations

import argparse

from proteus_pipeline.cli.verbs import add_verb, facts, fitted, home, lookup, print_json

TYPE_CHECKING = False  # typing takes 5 ms to import, a tenth of what the listing may take
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from proteus_pipeline.registry.lookup import VersionLookup

_EPILOG = """\
REF is a version: exact, NAME@v1.2.3, or floating, NAME, NAME@latest, NAME@1.x, which means what it means now.

examples:
  proteus model register my_model --version 1.0.0 --weights my_model.pt
  proteus model register my_model --bump auto --weights tuned/ --reason "two more epochs"
  proteus model diff my_model@v1.0.0 my_model
  proteus model rollback my_model@v1.0.0 --reason "1.1.0 loses membrane proteins"
  proteus model verify --repair
"""


def add_to(verbs: Any, only: str = "") -> None:
    """Add the verbs to the command line; where only the listing is asked for, only that."""
    this = verbs.add_parser(
        "model", help="versions of models", epilog=_EPILOG, formatter_class=fitted(argparse.RawDescriptionHelpFormatter)
    )
    this.set_defaults(run=lambda _: this.print_help() or 2)
    these = this.add_subparsers(metavar="VERB", prog="proteus model")
    listing = add_verb(these, "list", _list, "versions, of one model or of all")
    listing.add_argument("name", nargs="?", metavar="NAME", help="a model; all where none is named")
    listing.set_defaults(quick=True)
    if only != "list":
        _add_others(these)


def _add_others(these: Any) -> None:
    from proteus_pipeline.cli import model_changes

    model_changes.add_register(these)
    show = add_verb(these, "show", _view("show"), "everything known of one version, and what depends on it")
    show.add_argument("reference", metavar="REF", help="the version")
    history = add_verb(these, "history", _view("history"), "what happened to a model's versions: who, when, why")
    history.add_argument("name", metavar="NAME", help="the model")
    history.add_argument("--at", metavar="DATE", help="only say what was current then: 2026-01-31, or with a time")
    diff = add_verb(these, "diff", _view("diff"), "what differs between two versions, tensor by tensor")
    check = add_verb(
        these,
        "check",
        _view("check"),
        "measure what SemVer step one version is from another; exit 3 if its number is less",
    )
    check.add_argument("--tolerance", type=float, metavar="X", help="relative drift that a PATCH may have")
    add_verb(these, "stats", _view("stats"), "registrations, conflicts, rollbacks, deletions, and bytes")
    for verb in (diff, check):
        verb.add_argument("old", metavar="REF", help="the version before")
        verb.add_argument("new", metavar="REF", help="the version after")
    model_changes.add_to(these)


def _view(name: str) -> Callable[[argparse.Namespace], int]:
    """Return a verb of model_views, which is imported when it runs."""

    def run(args: argparse.Namespace) -> int:
        from proteus_pipeline.cli import model_views

        verb: Callable[[argparse.Namespace], int] = getattr(model_views, name)
        return verb(args)

    return run


def _list(args: argparse.Namespace) -> int:
    from proteus_pipeline.registry.listing import listed

    root = home(args)
    lines = None
    if not args.json and (root / ".git").exists():
        lines = listed(root, args.name, lambda *names: _lines(lookup(args), *names))
    if lines is None or (args.name and not lines):
        return _list_anew(args, lookup(args))
    _print(str(root), lines)
    return 0


def _list_anew(args: argparse.Namespace, registry: VersionLookup) -> int:
    models = {args.name: registry.list_versions(args.name)} if args.name else registry.list_models()
    versions = [version for found in models.values() for version in found]
    if args.name and not versions:
        registry.resolve(args.name)  # raises the error that says what there is
    if args.json:
        print_json({"home": str(registry.root), "versions": [facts(v) for v in versions]})
    else:
        _print(str(registry.root), [line for name, line in _lines(registry) if args.name in {None, name}])
    return 0


def _print(root: str, lines: list[str]) -> None:
    none = "  none; make repro, or proteus model register NAME --version 1.0.0 --weights PATH"
    print("\n".join([f"models in {root}", *(lines or [none])]))


def _lines(registry: VersionLookup, *names: str) -> list[tuple[str, str]]:
    """Return a line for each live version, with its model: of some models, or of all."""
    lines = []
    models = {name: registry.list_versions(name) for name in names} if names else registry.list_models()
    for name, versions in models.items():
        for v in versions:
            size = "damaged record" if v.damage else f"no record; proteus model adopt {v.reference}"
            if v.record:
                size = f"{v.record.size / 1e6:9.1f} MB  trunk {v.record.trunk_digest[:12]}"
            lines.append((name, f"  {v.reference:<40} {size}{'  current' if v.current else ''}"))
    return lines
