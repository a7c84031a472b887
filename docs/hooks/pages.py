"""The pages that are made from the code when the site is built, so that they can't say anything else than it does."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path

import commands
import settings

import proteus_pipeline

ROOT = Path(__file__).resolve().parents[2]
# What the public functions return or take, beside the public names themselves.
VALUES = (
    "embeddings.recipe.Recipe",
    "registry.version.ModelVersion",
    "registry.records.VersionRecord",
    "registry.differences.VersionDifference",
    "registry.compatibility.Compatibility",
    "registry.verification.Finding",
)
GROUPS = {
    "": "What a run does. `proteus run KEY=VALUE` writes a key to params.yaml.",
    "data": "The sequences, their labels, and the rules by which they are cleaned.",
    "embedding": "What is computed. All of it is part of an embedding's key.",
    "probe": "The linear model that is trained on the embeddings.",
    "cache": "Where embeddings are kept. Only `cache.accept` can change a result.",
    "runtime": "What changes no number: it is in no key, and no stage runs again for it.",
    "stages": "Which version each stage uses.",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to what is in docs/; mkdocs calls this."""
    pages = {
        "reference/cli.md": commands.page(),
        "reference/configuration.md": configuration(ROOT),
        "reference/api.md": api(),
        "architecture.md": of_the_root("ARCHITECTURE.md"),
        "changelog.md": of_the_root("CHANGELOG.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def configuration(root: Path) -> str:
    """Return the page of all settings, as Markdown."""
    parts = [
        "# Configuration",
        "",
        (
            "Defaults are in conf/, a file a group; params.yaml overrides single keys, and is what `proteus run KEY=VALUE` and"
            " `dvc exp run -S KEY=VALUE` write. `null` in params.yaml means what conf/ says. `data=mine` takes conf/data/mine.yaml"
            " for the whole group."
        ),
        "",
    ]
    groups: dict[str, list[settings.Setting]] = {}
    for setting in settings.settings(root):
        groups.setdefault(setting.key.rpartition(".")[0].partition(".")[0], []).append(setting)
    for group, members in groups.items():
        parts += [f"## {group or 'The run'}", "", GROUPS.get(group, ""), ""]
        parts += ["| key | type | default | what it does |", "|---|---|---|---|"]
        parts += [
            f"| `{s.key}` | {s.kind.replace('|', 'or')} | `{s.default}` | {s.says.replace('|', chr(92) + '|')} |"
            for s in members
        ]
        parts += [""]
    files = sorted((root / "conf" / "model").glob("*.yaml"))
    parts += ["## Models that are known by name", "", "conf/model/ says where a version's weights come from.", ""]
    parts += ["| model | versions | what it is |", "|---|---|---|"]
    for file in files:
        known = yaml.safe_load(file.read_text())
        parts.append(f"| `{known['name']}` | {', '.join(known['versions'])} | {known.get('description', '')} |")
    return "\n".join([*parts, ""])


def api() -> str:
    """Return the page of the public names, for mkdocstrings to fill."""
    homes = {name: proteus_pipeline._HOMES.get(name, "errors") for name in proteus_pipeline.__all__}
    names = {f"{home}.{name}" for name, home in homes.items() if home != "errors"}
    errors = [f"errors.{name}" for name, home in homes.items() if home == "errors"]
    parts = [
        "# Python",
        "",
        "All names of the first section, and the errors, are imported from `proteus_pipeline`.",
        "",
    ]
    for title, members in (("Public names", sorted(names)), ("Values", VALUES), ("Errors", errors)):
        parts += [f"## {title}", ""]
        for member in members:
            parts += [f"::: proteus_pipeline.{member}", ""]
            if title == "Errors":
                parts += ["    options: {inherited_members: false}", ""]
    return "\n".join(parts)


def of_the_root(name: str) -> str:
    """Return a document of the repository's root, whose links into docs/ lead to the pages here."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)


def resolved(name: str) -> Any:
    """Return what a dotted name in the package leads to, or None."""
    module, _, last = name.rpartition(".")
    return getattr(import_module(f"proteus_pipeline.{module}"), last, None)
