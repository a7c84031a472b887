"""docs/cache-format.md: what it says, and the reader in it, which knows nothing of proteus_pipeline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entries import HERE, TRUNK, headers, make, publish
from write_golden_cache import LENGTHS, RECIPES, sequence, value
from write_golden_cache import TRUNK as GOLDEN_TRUNK

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.embeddings.index import RECORD
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.segment import describe
from proteus_pipeline.embeddings.usage import Use, _came_to
from proteus_pipeline.identity import digests
from proteus_pipeline.identity.encoding import encode

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden_cache"
DOCUMENT = (ROOT / "docs" / "cache-format.md").read_text()
(CODE,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    names: dict[str, Any] = {}
    above = DOCUMENT[: DOCUMENT.index(CODE)].count("\n")  # so that an error names its line
    exec(compile("\n" * above + CODE, ROOT / "docs" / "cache-format.md", "exec"), names)
    return names


def same(reader: dict[str, Any], path: Path, keys: list[str]) -> int:
    """Make sure that the document's reader and ours agree on some keys, and return how many have entries."""
    theirs, ours = reader["entries"](path), EmbeddingCache(path, device_class=lambda: HERE)
    for key in keys:
        array = ours.get(key)
        assert (array is None) == (key not in theirs)
        if array is not None:
            read = reader["load"](path, *theirs[key][0])
            assert read.dtype == np.float32
            assert (read.shape, read.tobytes()) == (array.shape, array.tobytes())
            contents = [row["content"].tobytes().hex() for _, row in theirs[key]]
            assert contents == [entry.content for entry in ours.candidates([key])[key]]
    return len(theirs)


def test_the_documents_reader_reads_the_golden_cache(reader: dict[str, Any]):
    keys = []
    for name, recipe in RECIPES.items():
        for length in LENGTHS if name == "pooled" else LENGTHS[::6]:
            keys.append(reader["key_of"](GOLDEN_TRUNK, recipe.described(), sequence(length)))
            assert keys[-1] == recipe.key(GOLDEN_TRUNK, sequence(length))
            (found,) = reader["entries"](GOLDEN)[keys[-1]]
            np.testing.assert_array_equal(reader["load"](GOLDEN, *found), value(name, length))
    assert same(reader, GOLDEN, keys) == len(keys) == EmbeddingCache(GOLDEN).stats()["entries"]


def test_it_needs_nothing_of_ours():
    code = "import sys\nsys.modules['proteus_pipeline'] = sys.modules['zarr'] = None\n" + CODE
    code += f"\nprint(len(entries({str(GOLDEN)!r})))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == EmbeddingCache(GOLDEN).stats()["entries"]


def test_it_computes_all_golden_keys(reader: dict[str, Any]):
    for row in json.loads((GOLDEN.parent / "golden_keys.json").read_text()):
        described = Recipe(**row["recipe"]).described()
        assert reader["key_of"](row["trunk"], described, row["sequence"]) == row["key"], row["why"]
    for odd in ({"ä": ["ö", -12, True, False, None, {}], "b": [[]]}, "", [], 0, 10**30):
        assert reader["canonical"](odd) == encode(odd)
    assert encode({"b": [1, None], "a": "x"}) == b"d2:s1:as1:xs1:bl2:i1:1N"
    assert "`d2:s1:as1:xs1:bl2:i1:1N`" in DOCUMENT


def test_it_reads_what_is_written_today_merged_and_hidden(reader: dict[str, Any], tmp_path: Path):
    kinds = [("mean", "fp32"), ("per_residue", "fp16"), ("max", "bf16"), ("per_residue", "bf16"), ("cls", "fp16")]
    mades = [make(40, pooling=p, stored=s, seed=n, prefix=str(n), width=80) for n, (p, s) in enumerate(kinds)]
    keys = [key for made in mades for key in made.arrays]
    cache = EmbeddingCache(tmp_path)
    for made in mades:
        publish(cache, made)
    publish(cache, make(40, seed=9, prefix="0", width=80))  # a second entry of the first's keys
    assert same(reader, tmp_path, keys) == 200
    segment = cache.candidates(keys[40:41])[keys[40]][0].segment
    hidden = write_event(cache.store, make_event("quarantined", "ätzend", segments={segment: keys[40:50]}))
    assert same(reader, tmp_path, keys) == 190
    write_event(cache.store, make_event("invalidated", "x", trunk=TRUNK, recipe={"pooling": "max", "windows": None}))
    assert same(reader, tmp_path, keys) == 150
    cache.refresh()
    cache.visible.merge(everything=True)
    assert list((tmp_path / "runs").iterdir())
    assert same(reader, tmp_path, keys) == 150
    (last,) = {e.segment for e in cache.candidates(keys[160:]).popitem()[1]}
    write_event(cache.store, make_event("retired", "x", segments={last: []}))
    assert same(reader, tmp_path, keys) == 110
    (tmp_path / hidden).unlink()
    (tmp_path / "index" / ".tmp-1.idx").write_bytes(b"half")
    assert same(reader, tmp_path, keys) == 120


def test_it_reads_a_segment_alone(reader: dict[str, Any]):
    for path in (GOLDEN / "seg").iterdir():
        said, rows = reader["described"](path)
        ours = describe(path)
        assert said == ours.attributes["proteus"]
        assert rows == list(zip(ours.keys, ours.contents, ours.lengths, strict=True))


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_it_refuses_what_is_damaged(reader: dict[str, Any], tmp_path: Path):
    made = make(3, pooling="per_residue")
    cache = EmbeddingCache(tmp_path / "whole")
    publish(cache, made)
    write_event(cache.store, make_event("retired", "x", segments={"1-a.zip": []}))
    key = next(iter(made.arrays))

    def read(path: Path) -> None:
        reader["load"](path, *reader["entries"](path)[key][0])

    read(tmp_path / "whole")
    (entry,) = cache.candidates([key])[key]
    places: dict[str, Callable[[Path], int]] = {
        "seg": lambda _: entry.offset + entry.nbytes // 2,
        "index": lambda path: path.stat().st_size - 20,
        "events": lambda _: 30,
    }
    for number, (folder, place) in enumerate(places.items()):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        (path,) = (copy / folder).iterdir()
        flipped(path, place(path))
        with pytest.raises((AssertionError, ValueError)):
            read(copy)


def test_the_document_names_every_field(tmp_path: Path):
    publish(EmbeddingCache(tmp_path), make(3))
    (header,) = headers(tmp_path)
    names = [*vars(header), *vars(header.attestation), *header.recipe, *vars(make_event("retired", "x"))]
    (path,) = (tmp_path / "seg").iterdir()
    names += [*describe(path).attributes["proteus"]]
    EmbeddingCache(tmp_path).record_use(1, 2, 3)
    head, line = _came_to([Use(1.0, 1, 2, 3, {"a.zip": 1})], ["a.zip"]).splitlines()
    names += [*json.loads((tmp_path / "uses.jsonl").read_text()), *json.loads(head), *json.loads(line)]
    assert [name for name in names if f"`{name}`" not in DOCUMENT] == []
    offsets = [RECORD.fields[name][1] for name in RECORD.names]
    sizes = [RECORD.fields[name][0].itemsize for name in RECORD.names]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ", DOCUMENT, re.MULTILINE)
    assert rows == [(str(o), str(s)) for o, s in zip(offsets, sizes, strict=True)]
    assert f"{digests.SCHEMA} is the digests' schema" in DOCUMENT
