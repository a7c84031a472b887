"""What conf/ says of each setting: the comment above it, its default, and the type that the schema gives it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from proteus_pipeline.config.schema import Settings

CHOSEN = "defaults"
"""The key of conf/config.yaml that is Hydra's, and no setting."""
_KEY = re.compile(r"^( *)([\w.-]+):(?: |$)")


class Setting(NamedTuple):
    """A key as a user writes it, its type, its default as YAML, what conf/ says of it, and the file that says so."""

    key: str
    kind: str
    default: str
    says: str
    file: str


def comments(text: str) -> dict[str, str]:
    r"""Return the comment above each key of a YAML file of mappings, by dotted key.

    A comment that an empty line ends is the file's, and no key's. A key below another one that has none of its own has
    that of the one above it.

    >>> comments("# Of the file.\n\n# One\n# thing.\na: 1\nb:\n  # Two.\n  c: 2\n")
    {'a': 'One thing.', 'b': '', 'b.c': 'Two.'}
    """
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            lines.append(stripped.lstrip("# "))
        elif match := _KEY.match(line):
            indent = len(match[1])
            path = [(i, key) for i, key in path if i < indent]
            above = found.get(".".join(key for _, key in path), "") if path else ""
            path.append((indent, match[2]))
            found[".".join(key for _, key in path)] = " ".join(lines) or above
            lines = []
        else:
            lines = []
    return found


def settings(root: Path) -> list[Setting]:
    """Return all settings of the schema, in its order, with what the project in `root` says of them."""
    top = root / "conf" / "config.yaml"
    groups = {
        group: name for row in yaml.safe_load(top.read_text())[CHOSEN] if row != "_self_" for group, name in row.items()
    }
    said: dict[str, tuple[str, str, str]] = {}
    for prefix, file in [("", top)] + [(f"{g}.", root / "conf" / g / f"{name}.yaml") for g, name in groups.items()]:
        text = file.read_text()
        values = yaml.safe_load(text)
        for key, says in comments(text).items():
            if key.partition(".")[0] != CHOSEN:
                said[prefix + key] = (_value(values, key), says, str(file.relative_to(root)))
    return [Setting(key, kind, *said.get(key, ("", "", ""))) for key, kind in _leaves(Settings, "")]


def _value(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    return "null" if values is None else str(values)


def _leaves(schema: Any, prefix: str) -> list[tuple[str, str]]:
    """Return each leaf's dotted key and type, as the schema's fields are written."""
    found = []
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            found += _leaves(kind, f"{prefix}{name}.")
        else:
            found.append((prefix + name, kind.__name__ if isinstance(kind, type) else str(kind)))
    return found
