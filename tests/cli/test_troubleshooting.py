"""docs/troubleshooting.md: its commands are commands, and its error lines are the program's."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from proteus_pipeline.cli.main import main, parser

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
LISTED = (
    "Version conflicts", "Storage corruption", "Metadata inconsistency", "Rollback failures", "Memory overflow",
    "Cache corruption", "Slow performance", "Inconsistent state",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return [
        line
        for text in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        for line in text.splitlines()
    ]


def sentences() -> set[str]:
    """Every text in the code, an f-string's values left out."""
    found = set()
    for path in (ROOT / "proteus_pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


SENTENCES = sentences()
COMMANDS = sorted(
    {line.partition("#")[0].strip() for line in blocks("console")}
    | set(re.findall(r"`(proteus [^`]+|dvc [^`]+)`", PAGE))
)


def test_each_issue_has_symptom_cause_and_commands():
    for title in LISTED:
        section = PAGE.partition(f"### {title}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
        assert "```text\n" in section and "**Cause.**" in section and "```console\n" in section, title


@pytest.mark.parametrize("line", blocks("text"))
def test_an_error_line_is_the_programs(line: str):
    # Values stand between the pieces; what and remedy are two texts; DVC's messages are printf's.
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|; ", line)]
    known = [p for p in pieces if len(p) > 3]
    assert known
    unknown = [p for p in known if not any(p.rstrip(",(") in s for s in SENTENCES)]
    assert unknown == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command: str):
    words = shlex.split(command)
    if words[0] == "git":
        assert words[1] in {"fetch", "restore", "status"}
    elif words[0] == "dvc":
        assert words[1:3] in (["remote", "modify"], ["remote", "add"]) or words[1] in {"checkout", "repro"}
    elif words[1] == "--debug":
        assert words[2] == "VERB"
    else:
        args, rest = parser().parse_known_args(words[1:])
        assert hasattr(args, "run") and not rest


def test_the_settings_it_names_are_settings():
    from proteus_pipeline.config.composition import known_keys

    sections = "data|embedding|probe|cache|runtime"
    named = set(re.findall(rf"\b(?:{sections})\.[a-z_]+", PAGE))
    assert len(named) > 5 and named <= set(known_keys())


def test_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert "docs/troubleshooting.md" in readme
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists()


def test_an_error_of_each_kind_for_real(tmp_path: Path, monkeypatch, capsys):
    """Some lines, provoked: the page quotes what a user sees."""
    monkeypatch.chdir(tmp_path)
    assert main(["model", "rollback", "nobody@v1.0.0", "--home", str(tmp_path)]) == 1
    assert "no model nobody is registered in" in capsys.readouterr().err
    assert main(["model", "register", "m", "--version", "1.0", "--weights", "x.pt", "--home", str(tmp_path / "h")]) == 2
    assert "'1.0' is no semantic version (MAJOR.MINOR.PATCH); the nearest is" in capsys.readouterr().err
