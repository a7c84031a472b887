"""What benchmarks take from the package is there, in the programs that they hand to child processes too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield modules of the package that a program names, and what it takes from them; of programs in its strings too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("proteus_pipeline"):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "__name__") for a in node.names if a.name.startswith("proteus_pipeline"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "proteus_pipeline" in node.value:
            try:
                yield from imported(ast.parse(node.value))
            except SyntaxError:  # prose
                continue


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_what_a_benchmark_imports_is_there(program: Path):
    for module, name in imported(ast.parse(program.read_text())):
        if not hasattr(import_module(module), name):
            import_module(f"{module}.{name}")


def test_programs_in_strings_are_seen():
    source = (
        'CHILD = """\nfrom proteus_pipeline.embeddings.keys import key_array\nimport proteus_pipeline.errors\n"""\n'
    )
    assert list(imported(ast.parse(source))) == [
        ("proteus_pipeline.embeddings.keys", "key_array"),
        ("proteus_pipeline.errors", "__name__"),
    ]
    lookup = ast.parse((ROOT / "benchmarks" / "cache_lookup.py").read_text())
    assert any(module.endswith("keys") for module, _ in imported(lookup))
