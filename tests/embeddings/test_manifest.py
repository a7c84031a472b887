from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from entries import HERE, THERE, TRUNK, Made, make, publish

from proteus_pipeline.embeddings import manifest as manifest_file
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.manifest import Listed, load_embeddings, read_manifest, write_manifest
from proteus_pipeline.embeddings.sketch import sketch
from proteus_pipeline.embeddings.stored import content_hash, to_fp32
from proteus_pipeline.errors import IntegrityError, StorageError

IDS = ["plain", 'with "quotes" and \\', "sp|P1|é 蛋白 \u2028", "a/b.c"]
RECIPE = {"layer": 2, "pooling": "mean"}


def listed(made: Made, device_class: str = HERE) -> list[Listed]:
    stored = made.recipe.stored
    return [
        Listed(key, a.shape, stored, content_hash(a, stored), device_class, sketch(a, stored))
        for key, a in made.arrays.items()
    ]


def write(path: Path, made: Made, ids: list[str] = IDS) -> Path:
    write_manifest(path, TRUNK, RECIPE, ids, listed(made))
    return path


def test_the_same_numbers_make_the_same_bytes(tmp_path: Path):
    first, second = (write(tmp_path / name, make(4)).read_bytes() for name in "ab")
    assert first == second
    write_manifest(tmp_path / "c", TRUNK, dict(reversed(RECIPE.items())), IDS, listed(make(4)))
    assert (tmp_path / "c").read_bytes() == first


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_one_changed_number_changes_one_line(tmp_path: Path, stored: str):
    made = make(4, stored=stored)
    before = write(tmp_path / "m.json", made).read_text(encoding="utf-8").split("\n")
    list(made.arrays.values())[2].view("u1")[0] ^= 1
    after = write(tmp_path / "m.json", made).read_text(encoding="utf-8").split("\n")
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [3]


def test_what_is_written_is_read_back(tmp_path: Path):
    made = make(4, pooling="per_residue", stored="bf16")
    manifest = read_manifest(write(tmp_path / "m.json", made))
    assert (manifest.trunk, manifest.recipe) == (TRUNK, RECIPE)
    assert list(manifest.ids) == IDS
    assert list(manifest.entries) == listed(made)
    write_manifest(tmp_path / "none.json", TRUNK, RECIPE, [], [])
    assert read_manifest(tmp_path / "none.json").ids == ()


def test_a_manifest_without_an_id_for_each_entry_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="zip"):
        write(tmp_path / "m.json", make(4), IDS[:3])
    assert not (tmp_path / "m.json").exists()


def test_a_manifest_says_where_each_row_was_computed(tmp_path: Path):
    here, there = listed(make(2)), listed(make(2, prefix="other"), THERE)
    rows = [there[0], *here, there[1]]
    write_manifest(tmp_path / "m.json", TRUNK, RECIPE, IDS, rows)
    value = json.loads((tmp_path / "m.json").read_text())
    assert value["device_classes"] == [HERE, THERE]
    assert [r["device_class"] for r in value["sequences"]] == [1, 0, 0, 1]
    assert list(read_manifest(tmp_path / "m.json").entries) == rows


def test_rows_are_of_the_entries_that_were_meant(tmp_path: Path):
    """Whichever device class's entry comes first by now."""
    here, there = make(4, seed=1), make(4, seed=2)
    publish(EmbeddingCache(tmp_path / "c"), here, HERE)
    publish(EmbeddingCache(tmp_path / "c"), there, THERE)
    for made, device_class in ((here, HERE), (there, THERE)):
        rows = listed(made, device_class)
        wanted = [Embedded(e.key, e.shape, e.stored, e.content) for e in rows]
        for mine in (HERE, THERE):
            cache = EmbeddingCache(tmp_path / "c", device_class=lambda mine=mine: mine)
            assert manifest_file.listed(cache, [*wanted, wanted[0]]) == [*rows, rows[0]]


def test_rows_of_what_is_gone_are_an_error(tmp_path: Path):
    made = make(4)
    publish(EmbeddingCache(tmp_path / "c"), Made(made.recipe, dict(list(made.arrays.items())[:3]), made.lengths[:3]))
    with pytest.raises(StorageError, match="1 of 4 embeddings are gone"):
        manifest_file.listed(EmbeddingCache(tmp_path / "c"), listed(made))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sketch", ["1"]),
        ("sketch", ["1", "2", "3", "4", "five"]),
        ("sketch", ["1", "2", "3", "4", "nan"]),
        ("sketch", ["1", "2", "3", "4", "1e308"]),
        ("sketch", ["1", "-1e61", "3", "4", "5"]),
        ("sketch", [1, 2, 3, 4, 5]),
        ("sketch", None),
        ("device_class", 1),
        ("device_class", -1),
        ("device_class", True),
        ("device_class", "cpu"),
        ("shape", None),
        ("shape", ["x"]),
        ("shape", [float("inf")]),
        ("shape", [8.0]),
        ("shape", [True]),
        ("shape", "8"),
        ("content", 7),
        ("key", None),
        ("id", ["a"]),
        ("id", "\ud800"),
        ("content", [[0] * 10_000]),
    ],
)
def test_a_row_that_is_none_is_damage(tmp_path: Path, field: str, value: object):
    path = write(tmp_path / "m.json", make(4))
    whole = json.loads(path.read_text())
    whole["sequences"][2][field] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(IntegrityError, match=r"m\.json is damaged") as error:
        read_manifest(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", []),
        ("engine", 1.5),
        ("layer", True),
        ("pooling", {}),
        ("windows", 3),
        ("windows", [1, "x"]),
        ("x", "\ud800"),
    ],
)
def test_a_recipe_of_what_no_recipe_holds_is_damage(tmp_path: Path, field: str, value: object):
    path = write(tmp_path / "m.json", make(4))
    whole = json.loads(path.read_text())
    whole["recipe"][field] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(IntegrityError, match=r"m\.json is damaged"):
        read_manifest(path)
    whole["recipe"][field] = [4, 1] if field == "windows" else 7
    path.write_text(json.dumps(whole))
    assert read_manifest(path).recipe == whole["recipe"]


@pytest.mark.parametrize(
    ("name", "stage"), [("results/embeddings.json", "embed"), ("results/candidate.json", "compare")]
)
def test_the_remedy_is_of_the_stage_that_makes_the_file(tmp_path: Path, name: str, stage: str):
    path = tmp_path / name
    path.parent.mkdir()
    with pytest.raises(StorageError, match=f"does not exist; run: dvc repro {stage}$"):
        read_manifest(path)
    path.write_text("{")
    with pytest.raises(IntegrityError, match=f"is damaged .*; run: dvc repro --force --single-item {stage}$"):
        read_manifest(path)
    path.write_text('{"format": 2}')
    with pytest.raises(IntegrityError, match=f"has format 2.*; run: dvc repro {stage}$"):
        read_manifest(path)
    (tmp_path / "README.md").write_text("# A project\n")
    for other in ("README.md", "none.json"):
        with pytest.raises(StorageError, match=r"; give a manifest, such as results/embeddings\.json") as error:
            read_manifest(tmp_path / other)
        assert "dvc" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"trunk": "x"}',
        '{"format": 1, "trunk": "x", "recipe": {}, "sequences": [{}]}',
        '{"format": 1, "trunk": "x", "recipe": {}, "device_classes": [], "sequences": [{}]}',
        '{"format": 1, "trunk": 3, "recipe": {}, "device_classes": [], "sequences": []}',
        '{"format": 1, "trunk": "x", "recipe": 3, "device_classes": [], "sequences": []}',
        '{"format": 1, "trunk": "x", "recipe": [], "device_classes": [], "sequences": []}',
        '{"format": 1, "trunk": "\\ud800", "recipe": {}, "device_classes": [], "sequences": []}',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"m\.json is damaged .*; give a manifest"):
        read_manifest(tmp_path / "m.json")


def test_a_manifest_that_is_no_text_is_damaged(tmp_path: Path):
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IntegrityError, match="is damaged"):
        read_manifest(tmp_path / "m.json")


def test_another_format_is_refused_by_number(tmp_path: Path):
    path = write(tmp_path / "m.json", make(4))
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"format": 2}))
    with pytest.raises(IntegrityError, match="has format 2, and this proteus reads 1"):
        read_manifest(path)


def test_a_manifest_that_is_not_there_or_no_file(tmp_path: Path):
    with pytest.raises(StorageError, match=r"m\.json does not exist; give a manifest"):
        read_manifest(tmp_path / "m.json")
    with pytest.raises(StorageError, match=r"cannot read .*: is a directory"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("pooling", "stored"), [("mean", "fp32"), ("per_residue", "fp16"), ("per_residue", "bf16")])
def test_embeddings_come_in_the_manifests_order(tmp_path: Path, pooling: str, stored: str):
    made = make(4, pooling=pooling, stored=stored)
    publish(EmbeddingCache(tmp_path / ".proteus" / "cache"), made)
    turned = Made(made.recipe, dict(reversed(made.arrays.items())), made.lengths)
    (tmp_path / "results").mkdir()
    path = write(tmp_path / "results" / "m.json", turned)
    # The nearest cache above the manifest, a path, a path in words, an open cache.
    cache = tmp_path / ".proteus" / "cache"
    for where in (None, cache, str(cache), EmbeddingCache(cache)):
        ids, arrays = load_embeddings(str(path), where)
        assert ids == IDS
        for array, kept in zip(arrays, turned.arrays.values(), strict=True):
            assert array.dtype == np.float32
            assert array.tobytes() == to_fp32(kept, stored).tobytes()
            assert array.flags.writeable
            assert array.base is None or array.base.nbytes == array.nbytes  # and keeps no other rows in memory


def test_two_ids_may_share_an_embedding(tmp_path: Path):
    made = make(1)
    publish(EmbeddingCache(tmp_path / "c"), made)
    write_manifest(tmp_path / "m.json", TRUNK, RECIPE, ["a", "b"], listed(made) * 2)
    ids, arrays = load_embeddings(tmp_path / "m.json", tmp_path / "c")
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(arrays[0], arrays[1])


def test_missing_embeddings_are_counted_and_named(tmp_path: Path):
    made = make(4)
    (tmp_path / "results").mkdir()
    path = write(tmp_path / "results" / "embeddings.json", made, ["a", "b", "c", "d"])
    some = Made(made.recipe, dict(list(made.arrays.items())[::2]), made.lengths[::2])
    publish(EmbeddingCache(tmp_path / "c"), some)
    with pytest.raises(
        StorageError,
        match=r"2 of 4 embeddings of .*embeddings\.json are not in .*, b first; run: dvc repro --force --single-item embed",
    ) as caught:
        load_embeddings(path, tmp_path / "c")
    assert not isinstance(caught.value, IntegrityError)
    with pytest.raises(StorageError, match="4 of 4"):
        load_embeddings(path)


def test_the_entry_that_the_manifest_means_is_taken(tmp_path: Path):
    here, there = make(4, seed=1), make(4, seed=2)
    publish(EmbeddingCache(tmp_path / "c"), here, HERE)
    publish(EmbeddingCache(tmp_path / "c"), there, THERE)
    for made in (here, there):
        path = write(tmp_path / "m.json", made)
        for mine in (HERE, THERE):
            cache = EmbeddingCache(tmp_path / "c", device_class=lambda mine=mine: mine)
            arrays = load_embeddings(path, cache)[1]
            assert [a.tobytes() for a in arrays] == [a.tobytes() for a in made.arrays.values()]


def test_other_numbers_in_an_entrys_place_are_refused(tmp_path: Path):
    path = write(tmp_path / "m.json", make(4, seed=1))
    publish(EmbeddingCache(tmp_path / "c"), make(4, seed=2))
    with pytest.raises(StorageError, match="4 of 4 embeddings"):
        load_embeddings(path, tmp_path / "c")


def test_a_damaged_entry_is_an_error_unless_it_is_stored_twice(tmp_path: Path):
    made = make(4)
    path = write(tmp_path / "m.json", made)
    publish(EmbeddingCache(tmp_path / "c"), made)
    publish(EmbeddingCache(tmp_path / "c"), made)
    older, newer = sorted((tmp_path / "c" / "seg").iterdir())
    newer.write_bytes(newer.read_bytes()[:40])
    assert [a.tobytes() for a in load_embeddings(path, tmp_path / "c")[1]] == [
        a.tobytes() for a in made.arrays.values()
    ]
    older.write_bytes(older.read_bytes()[:40])
    with pytest.raises(IntegrityError, match="4 of 4") as caught:
        load_embeddings(path, tmp_path / "c")
    assert "is truncated" in str(caught.value.__cause__)


def test_a_manifest_entry_knows_its_dtype(tmp_path: Path):
    """An array and the same bits under another dtype are two contents."""
    made = make(4, stored="bf16")
    first, *others = listed(made)
    write_manifest(tmp_path / "m.json", TRUNK, RECIPE, IDS, [replace(first, content="0" * 32), *others])
    publish(EmbeddingCache(tmp_path / "c"), made)
    with pytest.raises(StorageError, match=r"1 of 4 .*, plain first"):
        load_embeddings(tmp_path / "m.json", tmp_path / "c")
