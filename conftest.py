"""What the examples in docstrings find: an empty folder, an empty HOME, and two checkpoints of one small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def examples(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return  # tests have their own
    folder: Path = request.getfixturevalue("tmp_path")
    request.getfixturevalue("monkeypatch").setenv("HOME", str(folder / "home"))
    doctest_namespace["folder"] = folder
    if any("weights=" in example.source for example in request.node.dtest.examples):
        from layouts import make_checkpoint, write_official

        for seed, name in enumerate(("weights", "tuned")):
            doctest_namespace[name] = write_official(make_checkpoint(seed=seed), folder / f"{name}.pt")
