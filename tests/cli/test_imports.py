"""What a quick command may not import: it would be slower than what it says is worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, git

from proteus_pipeline.registry.records import read_record

HEAVY = {
    "torch", "dvc", "zarr", "numpy", "scipy", "sklearn", "hydra", "omegaconf", "plotly", "requests", "git",
    "safetensors", "esm", "transformers", "numcodecs", "jinja2", "jsonschema",
    "anndata", "h5py", "pandas", "pyarrow", "dask", "dask_jobqueue", "distributed",
}  # fmt: skip
RUN = """
import json, sys
from proteus_pipeline.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code or 0
print()
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported(root: Path, *args: str) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *args],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, set(names)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["model", "--help"], 0),
        (["model", "list"], 0),
        (["model", "list", "--json"], 0),
        (["model", "list", "m"], 0),
        (["model", "show", "m"], 0),
        (["model", "history", "m"], 0),
        (["model", "show", "nobody"], 1),
    ],
)
def test_quick_commands_import_nothing_heavy(repository: Path, args: list[str], expected: int):
    record = read_record((Path(__file__).parents[1] / "registry" / "golden_record.txt").read_text(), "esm2_tiny@v1.0.0")
    assert record
    message = replace(record, name="m").message()
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    git(repository, *who, "tag", "-a", "--cleanup=verbatim", "-m", message, "m@v1.0.0")
    code, names = imported(repository, *args)
    assert code == expected
    assert "proteus_pipeline" in names
    assert not HEAVY & names


def test_importing_the_package_imports_nothing_heavy():
    code = "import json, sys, proteus_pipeline; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout))


def test_the_list_of_heavy_libraries_is_of_libraries_that_are_here():
    import importlib.util

    assert {name for name in HEAVY if importlib.util.find_spec(name) is None} == set()
