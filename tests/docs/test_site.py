"""The site builds without a warning and fetches nothing; what the documents lead to, and what they tell to type, is there."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import commands
import pytest
from conftest import ROOT

ROOT_DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "data/README.md")]
DOCUMENTS = [*ROOT_DOCUMENTS, *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag in LOADED and told.get("rel") not in {"canonical", "next", "prev", "edit"}:
            self.found.append(told.get(LOADED[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    # A proxy that is not there: whatever asks for the network fails.
    environment = os.environ | {
        "NO_MKDOCS_2_WARNING": "1",
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "", "")
    return folder


def test_the_site_builds_without_a_warning(site: Path) -> None:
    written = {p.relative_to(site).with_suffix(".md") for p in site.rglob("*.html")}
    assert {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")} <= written
    assert "def register_version" not in (site / "reference" / "api.html").read_text()  # signatures, not sources
    assert "register_version" in (site / "reference" / "api.html").read_text()


def test_a_page_makes_a_browser_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    loads = [(p.name, where) for p in pages for where in Loads(p.read_text()).found]
    assert len(loads) > len(pages)  # a style sheet each, at least
    assert [(p, where) for p, where in loads if urlsplit(where).netloc] == []
    styles = [p for p in site.rglob("*.css") if re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", p.read_text())]
    assert styles == []


def test_no_path_of_this_machine_is_in_the_site(site: Path) -> None:
    assert [p.name for p in site.rglob("*.html") if str(ROOT) in p.read_text()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Pages of the site to each other, mkdocs checks; here the documents of the repository, and addresses by their form."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text) + re.findall(r"<(https?://[^>]*)>", text):
        address = urlsplit(target)
        if address.scheme:
            assert address.scheme == "https" and re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), target
        elif document in ROOT_DOCUMENTS and address.path:
            assert (document.parent / address.path).exists(), target


def said_commands(text: str) -> list[str]:
    """Each `proteus …` in a code span, and each line of a block that is one."""
    spans = re.findall(r"`(proteus [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [" ".join(s.split()) for s in spans] + [line.strip() for line in lines if line.startswith("proteus ")]


def unknown(command: str, verbs: dict[str, argparse.ArgumentParser]) -> list[str]:
    """Return the words of a command that the command line does not know: a verb or an option that is not there."""
    words = shlex.split(command.replace("…", ""), comments=True)
    this, rest = verbs["proteus"], words[1:]
    while rest and f"{this.prog} {rest[0]}" in verbs:
        this, rest = verbs[f"{this.prog} {rest[0]}"], rest[1:]
    below = any(isinstance(a, argparse._SubParsersAction) for a in this._actions)
    lost = [rest[0]] if below and rest and not rest[0].startswith("-") and rest[0] not in {"VERB", "|"} else []
    options = {o for p in (this, verbs["proteus"]) for a in p._actions for o in a.option_strings}
    return lost + [w for w in rest if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in options]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_commands_that_are_told_exist(document: Path) -> None:
    verbs = {this.prog: this for this, _ in commands.verbs()}
    assert {c: lost for c in said_commands(document.read_text()) if (lost := unknown(c, verbs))} == {}


def test_a_command_that_does_not_exist_is_found() -> None:
    verbs = {this.prog: this for this, _ in commands.verbs()}
    told = "`proteus fly` `proteus cache polish`\n```sh\nproteus model list --yaml  # all\nproteus cache gc --dry-run\n```\n"
    assert [unknown(c, verbs) for c in said_commands(told)] == [["fly"], ["polish"], ["--yaml"], []]
