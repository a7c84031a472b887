"""The house as a whole: its files and functions are short, imports go one way, and ARCHITECTURE.md says what is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import grimp
import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "proteus_pipeline"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
FILE_LINES, FUNCTION_LINES = 400, 60


def modules() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}


def long_files(sources: dict[str, str], most: int = FILE_LINES) -> list[str]:
    lengths = {name: len(text.splitlines()) for name, text in sources.items()}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > most]


def long_functions(sources: dict[str, str], most: int = FUNCTION_LINES) -> list[str]:
    return [
        f"{name}:{node.lineno} {node.name}: {lines} lines"
        for name, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := code_lines(node)) > most
    ]


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from its ``def`` on, without those of its docstring."""
    first, docstring = node.body[0], ast.get_docstring(node, clean=False) is not None
    return spanned(node) - (spanned(first) if docstring else 0)


def spanned(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def cycles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Return each set of modules that import each other, directly or through one another."""
    found: list[list[str]] = []
    left = set(graph.modules)
    while left:
        module = left.pop()
        around = graph.find_downstream_modules(module) & graph.find_upstream_modules(module)
        if around:
            found.append(sorted({module, *around}))
            left -= around
    return sorted(found)


def rooms() -> list[tuple[list[str], str]]:
    """Return the rows of ARCHITECTURE.md's table of rooms: the names in the first column, and what they hold."""
    table = ARCHITECTURE.partition("\n| room | holds |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ", 1) for row in table.splitlines()]
    return [(re.findall(r"`(\w+)`", names), holds) for names, holds in rows]


def test_no_file_is_too_long_to_be_read_at_once():
    assert long_files(modules()) == []
    assert long_files({"a.py": "\n" * 400, "b.py": "\n" * 401}) == ["b.py: 401 lines"]


def test_no_function_is_too_long_to_be_read_at_once():
    assert long_functions(modules()) == []


@pytest.mark.parametrize("begin", ["def f(", "async def f(", "@staticmethod\ndef f("])
def test_a_function_is_as_long_as_its_code(begin: str):
    def of(lines: int, doc: str = "") -> str:
        return f"{begin}\n    a,\n):\n{doc}" + "    a += 1\n" * (lines - 3)

    doc = '    """What it does.\n\n    More.\n    """\n'
    line = 2 if begin.startswith("@") else 1
    for text in (of(60), of(60, doc)):
        assert long_functions({"a.py": text}) == []
    for text in (of(61), of(61, doc)):
        assert long_functions({"a.py": text}) == [f"a.py:{line} f: 61 lines"]
    nested = "class C:\n" + "".join(f"    {row}\n" for row in of(61).splitlines())
    assert long_functions({"a.py": nested}) == [f"a.py:{line + 1} f: 61 lines"]


def test_imports_go_one_way():
    """Also those within functions; only a type's name may be needed both ways."""
    graph = grimp.build_graph("proteus_pipeline", exclude_type_checking_imports=True, cache_dir=None)
    assert len(graph.modules) > 100
    assert cycles(graph) == []
    both = ["proteus_pipeline.embeddings.index", "proteus_pipeline.embeddings.merging"]
    graph.add_import(importer=both[0], imported=both[1])
    assert cycles(graph) == [both]


def test_the_table_of_rooms_names_the_packages_that_there_are_in_the_order_of_the_layers():
    named = [name for names, _ in rooms() for name in names]
    there = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} | {p.stem for p in PACKAGE.glob("[a-z]*.py")}
    assert sorted(named) == sorted(there)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert [set(names) for names, _ in rooms()] == [set(layer.split(" | ")) for layer in layers]


def test_the_modules_that_a_room_is_said_to_hold_are_there():
    for (name, *others), holds in rooms():
        if not others:
            gone = [m for m in re.findall(r"`([a-z_*]\w*)`", holds) if not any((PACKAGE / name).glob(f"{m}.py"))]
            assert gone == [], name


def test_the_files_that_the_architecture_names_are_there():
    named = set(re.findall(r"(?:[\w*]+/)+[\w*]+\.py\b", ARCHITECTURE))
    assert len(named) > 30
    assert [p for p in sorted(named) if not any((*ROOT.glob(p), *PACKAGE.glob(p)))] == []


@pytest.mark.xdist_group("house")
def test_tests_of_a_group_go_to_one_worker(request: pytest.FixtureRequest):
    if not getattr(request.config.option, "loadgroup", False):  # what xdist tells its workers
        pytest.skip("nothing is divided")
    assert request.node.nodeid.endswith("@house")  # what xdist divides by: else each worker makes all groups' fixtures


def test_no_two_test_files_share_a_name():
    names = sorted(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert [n for n in names if names.count(n) > 1] == []  # pytest imports both by that name, and refuses the second


def test_no_test_fails_for_being_slow():
    settings = hypothesis.settings()
    assert settings.deadline is None
    assert hypothesis.HealthCheck.too_slow in settings.suppress_health_check
