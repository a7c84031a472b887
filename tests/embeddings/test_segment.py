from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from entries import Made, make, publish, serves

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.chunks import ROWS_PER_CHUNK, decode_entry, decode_rows, with_crc
from proteus_pipeline.embeddings.segment import Placed, SegmentWriter, describe
from proteus_pipeline.embeddings.stored import content_hash, to_stored
from proteus_pipeline.errors import IntegrityError

KINDS = [("mean", "fp32"), ("mean", "bf16"), ("per_residue", "fp32"), ("per_residue", "fp16"), ("per_residue", "bf16")]
FLIPS = 10_000 if os.environ.get("PROTEUS_TORTURE") == "1" else 1000
RESERVED = range(12, 16)  # the only bytes of an index that say nothing


def files(folder: Path) -> tuple[Path, Path]:
    (segment,), (index,) = (folder / "seg").iterdir(), (folder / "index").iterdir()
    return segment, index


def blocks(path: Path, place: Placed) -> int:
    """Return how many blocks a chunk of blosc has, by its header."""
    nbytes, block = np.frombuffer(path.read_bytes(), "<u4", 2, place.offset + 4).tolist()
    return -(-nbytes // block)


def written(path: Path, made: Made, attributes: dict[str, object]) -> list[Placed]:
    stored = made.recipe.stored
    pooled = made.recipe.pooling != "per_residue"
    writer = SegmentWriter(path, stored, "pooled" if pooled else "per_residue")
    for (key, array), length in zip(made.arrays.items(), made.lengths, strict=True):
        start = None if pooled else array[0] * np.ones_like(array[0])
        writer.add(key, array, length, content_hash(array, stored), start)
    return writer.finish(array.shape[-1], attributes)[0]


@pytest.mark.parametrize("number", [1, ROWS_PER_CHUNK, 2 * ROWS_PER_CHUNK + 5])
@pytest.mark.parametrize(("pooling", "stored"), KINDS)
def test_any_zarr_reader_opens_a_segment(tmp_path: Path, pooling: str, stored: str, number: int):
    import zarr

    made = make(number, pooling=pooling, stored=stored)
    path = tmp_path / "s.zip"
    written(path, made, {"proteus": {"format": 1}})
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    assert group.attrs.asdict() == {"proteus": {"format": 1}}
    columns = ["contents", "keys", "lengths"]
    if pooling == "per_residue":
        assert sorted(group) == sorted([*made.arrays, *columns, "start"])
        for key, array in made.arrays.items():
            assert group[key].dtype == array.dtype
            np.testing.assert_array_equal(group[key][:], array)
        np.testing.assert_array_equal(group["start"][:], np.stack([a[0] for a in made.arrays.values()]))
    else:
        assert sorted(group) == [*columns, "pooled"]
        assert group["pooled"].dtype == next(iter(made.arrays.values())).dtype
        np.testing.assert_array_equal(group["pooled"][:], np.stack(list(made.arrays.values())))
    assert [bytes(row).hex() for row in group["keys"][:]] == list(made.arrays)
    assert [bytes(row).hex() for row in group["contents"][:]] == [content_hash(a, stored) for a in made.arrays.values()]
    assert group["lengths"][:].tolist() == made.lengths


@pytest.mark.parametrize(("pooling", "stored"), KINDS)
def test_places_are_where_the_entries_lie(tmp_path: Path, pooling: str, stored: str):
    made = make(ROWS_PER_CHUNK + 1, pooling=pooling, stored=stored)
    path = tmp_path / "s.zip"
    placed = written(path, made, {"proteus": {"format": 1}})
    assert [p.row for p in placed] == list(range(ROWS_PER_CHUNK + 1))
    with path.open("rb") as file:
        for place, array in zip(placed, made.arrays.values(), strict=True):
            data = os.pread(file.fileno(), place.nbytes, place.offset)
            if array.ndim == 1:
                assert data == array.tobytes()
            else:
                np.testing.assert_array_equal(decode_entry(data, stored, array.shape, "s.zip"), array)
    said = describe(path)
    assert (said.placed, said.keys, said.lengths) == (placed, list(made.arrays), made.lengths)
    assert said.contents == [content_hash(a, stored) for a in made.arrays.values()]
    assert (said.attributes, said.width) == ({"proteus": {"format": 1}}, 8)
    assert said.layout == ("pooled" if pooling == "mean" else "per_residue")


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_chunks_made_here_are_blosc_like_any_other(tmp_path: Path, stored: str):
    """Of one block and of several: noise, numbers that compress, an odd number of residues, zeros, a prime of rows."""
    import tensorstore
    import zarr

    rng = np.random.default_rng(0)
    values = {"a" * 32: rng.standard_normal((301, 96)), "b" * 32: np.full((64, 96), 0.5), "c" * 32: np.zeros((99, 96))}
    values["d" * 32] = np.frombuffer(rng.bytes(200 * 96), np.uint8).reshape(200, 96) / 256
    # Each byte is tried in the first block, and compresses there alone.
    values["e" * 32] = np.concatenate([np.zeros((776, 96)), rng.standard_normal((3104, 96))])
    values["f" * 32] = rng.standard_normal((7919, 96))
    arrays = {key: to_stored(value.astype(np.float32), stored) for key, value in values.items()}
    lengths = [len(array) for array in arrays.values()]
    path = tmp_path / "s.zip"
    recipe = make(1, pooling="per_residue", stored=stored).recipe
    placed = written(path, Made(recipe, arrays, lengths), {})
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    base = {"driver": "zip", "base": {"driver": "file", "path": str(path)}}
    for (key, array), place in zip(arrays.items(), placed, strict=True):
        data = path.read_bytes()[place.offset : place.offset + place.nbytes]
        np.testing.assert_array_equal(decode_entry(data, stored, array.shape, "s.zip"), array)
        np.testing.assert_array_equal(group[key][:], array)
        opened = tensorstore.open({"driver": "zarr3", "kvstore": base | {"path": f"{key}/"}}).result()
        np.testing.assert_array_equal(opened.read().result(), array)
    assert placed[2].nbytes < 500  # zeros
    assert blocks(path, placed[0]) == 1
    assert blocks(path, placed[4]) > 4


def test_what_a_damaged_segment_says_of_itself_is_not_believed(tmp_path: Path):
    path = tmp_path / "s.zip"
    written(path, make(3), {"proteus": {"format": 1}})
    whole = path.read_bytes()
    keys = whole.index(bytes.fromhex(next(iter(make(3).arrays))))
    for damaged in (b"", b"no zip", whole[:-5], whole[:keys] + b"\0" + whole[keys + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"s\.zip does not say what it holds"):
            describe(path)


def test_equal_entries_make_equal_bytes(tmp_path: Path):
    made = make(20)
    for name in "ab":
        written(tmp_path / name, made, {"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_segment_is_never_written_over(tmp_path: Path):
    path = tmp_path / "s.zip"
    path.write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        written(path, make(1), {})
    assert path.read_bytes() == b"kept"


def test_chunks_of_another_shape_or_dtype_are_refused(tmp_path: Path):
    """Sound bytes in the wrong place: what an index of another segment would point to."""
    made = make(3, pooling="per_residue", width=3)
    path = tmp_path / "s.zip"
    arrays = list(made.arrays.values())
    place = written(path, made, {})[0]
    data = path.read_bytes()[place.offset : place.offset + place.nbytes]
    rows = len(arrays[0])
    assert decode_entry(data, "fp32", (rows, 3), "here").shape == (rows, 3)
    for shape in ((rows + 1, 3), (rows, 4)):
        with pytest.raises(IntegrityError, match="a chunk of here"):
            decode_entry(data, "fp32", shape, "here")
    never_compressed = with_crc(bytes(200))
    with pytest.raises(IntegrityError, match="a chunk of here is not what its index says"):
        decode_entry(never_compressed, "fp32", (16, 3), "here")
    for data in (b"", b"abc", b"\0\0\0\0"):
        with pytest.raises(IntegrityError, match="checksum"):
            decode_entry(data, "fp32", (16, 3), "here")
        with pytest.raises(IntegrityError, match="checksum"):
            decode_rows(data, "fp32", 3, "here")


@pytest.mark.torture
@pytest.mark.parametrize(("pooling", "stored"), [("mean", "fp32"), ("per_residue", "bf16")])
def test_no_flipped_bit_is_ever_served(tmp_path: Path, pooling: str, stored: str):
    """Single flips over both files: an entry reads as a miss, or as what was written."""
    made = make(20, pooling=pooling, stored=stored)
    publish(EmbeddingCache(tmp_path), made)
    segment, index = files(tmp_path)
    assert serves(EmbeddingCache(tmp_path), made) == 20
    chunks = {
        byte
        for entries in EmbeddingCache(tmp_path).candidates(list(made.arrays)).values()
        for e in entries
        for byte in range(e.offset, e.offset + e.nbytes)
    }
    sizes = {path: path.stat().st_size for path in (segment, index)}
    rng = np.random.default_rng(1)
    detected = 0
    for flip in range(FLIPS):
        path = segment if flip % 2 else index
        at, bit = int(rng.integers(sizes[path])), 1 << int(rng.integers(8))
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        hits = serves(EmbeddingCache(tmp_path), made)
        path.write_bytes(whole)
        if path == index:
            assert hits == (20 if at in RESERVED else 0)
        else:
            assert (hits < 20) == (at in chunks)
        detected += hits < 20
    assert detected > FLIPS // 2
    assert serves(EmbeddingCache(tmp_path), made) == 20


@pytest.mark.parametrize(("pooling", "stored"), [("mean", "fp16"), ("per_residue", "fp32")])
def test_truncated_files_are_misses(tmp_path: Path, pooling: str, stored: str):
    made = make(20, pooling=pooling, stored=stored)
    publish(EmbeddingCache(tmp_path), made)
    found = EmbeddingCache(tmp_path).candidates(list(made.arrays))
    ends = [entries[0].offset + entries[0].nbytes for entries in found.values()]
    for path in files(tmp_path):
        whole = path.read_bytes()
        for size in range(0, len(whole), 97):
            path.write_bytes(whole[:size])
            sound = sum(end <= size for end in ends) if path.suffix == ".zip" else 0
            assert serves(EmbeddingCache(tmp_path), made) == sound
        path.write_bytes(whole)
    assert serves(EmbeddingCache(tmp_path), made) == 20


def test_swapped_files_serve_nothing_wrong(tmp_path: Path):
    """Of two segments of one shape, so that offsets fit: each other's segment, then each other's index."""
    first, second = make(20, seed=1, prefix="a"), make(20, seed=2, prefix="b")
    for name, made in (("one", first), ("two", second)):
        publish(EmbeddingCache(tmp_path / name), made)
    (seg1, index1), (seg2, index2) = files(tmp_path / "one"), files(tmp_path / "two")
    cache = tmp_path / "both"
    for folder in ("seg", "index"):
        (cache / folder).mkdir(parents=True)
    shutil.copy(seg1, cache / "seg" / seg2.name)
    shutil.copy(seg2, cache / "seg" / seg1.name)
    shutil.copy(index1, cache / "index")
    shutil.copy(index2, cache / "index")
    assert serves(EmbeddingCache(cache), first) + serves(EmbeddingCache(cache), second) == 0
    shutil.copy(seg1, cache / "seg")
    shutil.copy(seg2, cache / "seg")
    assert serves(EmbeddingCache(cache), first) == serves(EmbeddingCache(cache), second) == 20
    shutil.copy(index1, cache / "index" / index2.name)
    assert serves(EmbeddingCache(cache), first) == 20
    assert serves(EmbeddingCache(cache), second) == 0
