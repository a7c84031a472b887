"""The command line as a page, from its parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from proteus_pipeline.cli.main import parser

WIDTH = 100
"""Columns of usage lines."""


def verbs(this: argparse.ArgumentParser | None = None, says: str = "") -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Yield a command and all below it, each with its line in the list of the one above."""
    this = this or parser()
    yield this, says or this.description or ""
    for action in this._actions:
        if isinstance(action, argparse._SubParsersAction):
            listed = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, below in action.choices.items():
                yield from verbs(below, listed.get(name, ""))


def arguments(this: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return a command's own arguments; --help, and the verbs below it, are none."""
    other = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in this._actions if not isinstance(action, other)]


def called(action: argparse.Action) -> str:
    """Return an argument as a user writes it."""
    value = action.metavar if isinstance(action.metavar, str) else None
    if value is None and action.choices is not None:
        value = "|".join(map(str, action.choices))
    value = value or action.dest.upper()
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


def page() -> str:
    """Return the page, as Markdown."""
    parts = ["# Command line", "", "From the parser of this version; `proteus VERB --help` says the same.", ""]
    for this, says in verbs():
        depth = this.prog.count(" ")
        if depth:
            parts += [f"{'#' * (depth + 1)} {this.prog}", ""]
        parts += [f"{_sentence(this.description or says)}", "", "```text", _usage(this), "```", ""]
        rows = [f"| `{called(a).replace('|', '&#124;')}` | {_cell(a.help or '')} |" for a in arguments(this)]
        # A table's code spans take no entity: there, and only there, HTML is needed.
        rows = [row.replace("`", "<code>", 1).replace("`", "</code>", 1) if "&#124;" in row else row for row in rows]
        if rows:
            parts += ["| argument | what it does |", "|---|---|", *rows, ""]
        if this.epilog:
            parts += ["```text", this.epilog.strip(), "```", ""]
    return "\n".join(parts)


def _usage(this: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(prog=this.prog, width=WIDTH)
    formatter.add_usage(this.usage, this._actions, this._mutually_exclusive_groups, prefix="")
    return formatter.format_help().strip()


def _sentence(text: str) -> str:
    text = _cell(text).strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else ".") if text else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").split())
