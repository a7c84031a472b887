from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from entries import HERE, TRUNK, headers, make, publish
from hypothesis import given
from hypothesis import strategies as st
from write_golden_cache import LENGTHS, RECIPES, sequence, value
from write_golden_cache import TRUNK as GOLDEN_TRUNK

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import RECORD, Attestation, Index, SegmentHeader, encode_index
from proteus_pipeline.embeddings.keys import KEY, key_array
from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.stores.store import LocalStore

GOLDEN = Path(__file__).parent / "golden_cache"


def header(entries: int) -> SegmentHeader:
    attestation = Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 10)
    return SegmentHeader("1-s.zip", 1000, "pooled", "fp32", 8, TRUNK, {"layer": 2}, attestation, entries)


def write(path: Path, pairs: list[tuple[int, int]]) -> Path:
    records = np.zeros(len(pairs), dtype=RECORD)
    records["length"] = range(len(pairs))
    keys = np.array(pairs, dtype=KEY)
    path.write_bytes(encode_index([header(len(pairs))], keys, records))
    return path


def read(path: Path) -> Index:
    return Index.read(LocalStore(path.parent), path.name)


@given(st.data())
def test_one_key_is_found_where_it_is_first(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    halves = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, (1 << 64) - 1, (1 << 63), (1 << 63) + 1]))
    pairs = data.draw(st.lists(st.tuples(halves, st.integers(0, 3)), max_size=300))
    more = data.draw(st.integers(0, 400))
    pairs += [(n * ((1 << 64) // 401), 7) for n in range(more)]
    index = read(write(tmp_path_factory.mktemp("one") / "1.idx", pairs))
    stored = list(zip(index.high.tolist(), index.records["low"].tolist(), strict=True))
    asked = [*pairs, *data.draw(st.lists(st.tuples(halves, st.integers(0, 3)), max_size=20))]
    for high, low in asked:
        found = index.find_one(high, low)
        if (high, low) in pairs:
            row = stored.index((high, low))
            assert found == (row, index.record(row)) and found[1][0] == low
        else:
            assert found is None


@pytest.mark.parametrize(
    "key",
    ["", "ab", "0" * 31, "0" * 33, "0x" + "0" * 30, "0" * 30 + " 0", "+" + "0" * 31, "g" * 32, "0" * 64, "é" * 32],
)
def test_what_is_no_key_is_refused(tmp_path: Path, key: str):
    cache = EmbeddingCache(tmp_path)
    publish(cache, make(3))
    cache.refresh()
    asks = (cache.get, cache.find_one, cache.view, lambda k: cache.look_up([k]), lambda k: cache.vectors(["0" * 32, k]))
    for ask in asks:
        with pytest.raises(ValueError, match="is no embedding key: it has 32 hexadecimal digits"):
            ask(key)
    # Together they have as many digits as two keys have.
    with pytest.raises(ValueError, match="'a' is no embedding key"):
        key_array(["a", "b" * 63])
    assert len(key_array([])) == 0


def find(index: Index, keys: np.ndarray) -> np.ndarray:
    """Return the first row of each key, or -1."""
    found = np.full(len(keys), -1, dtype=np.int64)
    places, rows, _ = index.locate(keys)
    found[places[::-1]] = rows[::-1]
    return found


def test_the_golden_cache_reads_to_what_was_written():
    cache = EmbeddingCache(GOLDEN)
    for name, recipe in RECIPES.items():
        for length in LENGTHS if name == "pooled" else LENGTHS[::6]:
            key = recipe.key(GOLDEN_TRUNK, sequence(length))
            array = cache.get(key)
            assert array is not None, (name, length)
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, value(name, length))
            (entry,) = cache.candidates([key])[key]
            assert entry.stored == recipe.stored
            assert entry.device_class == "cpu/x86_64/AVX2/GenuineIntel"
            assert entry.seconds == pytest.approx(1.5 * (length + 2) / 300)
    assert cache.stats() == {
        "entries": 24,
        "segments": 3,
        "bytes": sum(p.stat().st_size for p in GOLDEN.glob("*/*")),
        "raw_bytes": 18 * 4 * 4 + 2 * (3 + 9 + 15) * 4 * 2,
        "hits": 2,
        "derived": 1,
        "misses": 24,
        "redis_hits": 0,
        "redis_rejected": 0,
    }
    assert {h.trunk for h in headers(GOLDEN)} == {GOLDEN_TRUNK}


def test_keys_are_found_among_neighbours_with_the_same_high_half(tmp_path: Path):
    top = (1 << 64) - 1
    pairs = [(top, top), (7, 3), (0, 0), (7, 1), (7, 2), (1 << 63, 5)]
    index = read(write(tmp_path / "i.idx", pairs))
    wanted = [*pairs, (7, 0), (7, 4), (6, 1), (top, 0), (0, 1)]
    rows = find(index, key_array([f"{high:016x}{low:016x}" for high, low in wanted]))
    assert [int(index.records[row]["length"]) for row in rows[:6]] == [0, 1, 2, 3, 4, 5]
    assert rows[6:].tolist() == [-1] * 5


def test_random_keys_are_found_and_others_are_not(tmp_path: Path):
    rng = np.random.default_rng(0)
    raw = [rng.bytes(16).hex() for _ in range(3000)]
    pairs = [(int(k[:16], 16), int(k[16:], 16)) for k in raw[:2000]]
    index = read(write(tmp_path / "i.idx", pairs))
    rows = find(index, key_array(raw))
    assert [int(n) for n in index.records["length"][rows[:2000]]] == list(range(2000))
    assert (rows[2000:] == -1).all()


def test_what_a_header_says_comes_back(tmp_path: Path):
    index = read(write(tmp_path / "i.idx", [(1, 2)]))
    assert index.segments == (header(1),)
    assert index.segments[0].published == 1


def test_an_index_of_a_later_format_is_refused_by_name(tmp_path: Path):
    path = write(tmp_path / "i.idx", [(1, 2)])
    data = bytearray(path.read_bytes())
    data[7] = 2
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"i\.idx has format 2, and this proteus reads 1; upgrade it"):
        read(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is truncated"),
        (b"x" * 31, "is truncated"),
        (b"x" * 32, "is no index file"),
        (b"\0" * 400, "is no index file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, said: str):
    (tmp_path / "i.idx").write_bytes(data)
    with pytest.raises(IntegrityError, match=said):
        read(tmp_path / "i.idx")


def test_records_missing_or_added_are_refused(tmp_path: Path):
    path = write(tmp_path / "i.idx", [(1, 2), (3, 4)])
    whole = path.read_bytes()
    for changed in (whole[: -RECORD.itemsize], whole + whole[-RECORD.itemsize :], whole + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="is truncated"):
            read(path)


def test_an_index_that_is_gone_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "i.idx")


def test_an_index_that_cant_be_read_is_passed_over_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made = make(3)
    publish(EmbeddingCache(tmp_path), made)
    (tmp_path / "index" / "0-folder.idx").mkdir()
    (tmp_path / "index" / "1-other.idx").write_bytes(b"not an index")
    (tmp_path / "index" / "notes.txt").write_bytes(b"nobody's business")
    (tmp_path / "index" / ".tmp-ab.idx").write_bytes(b"unfinished")
    cache = EmbeddingCache(tmp_path)
    for _ in range(2):
        assert all(cache.get(key) is not None for key in made.arrays)
    assert len(caplog.messages) == 2
    assert "0-folder.idx" in caplog.messages[0]
    assert "1-other.idx is truncated" in caplog.messages[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"segment": "../../x.zip"},
        {"segment": "abc.zip"},
        {"segment": "99999999999999999999-a.zip"},
        {"stored": "fp8"},
        {"layout": "sideways"},
        {"width": 0},
        {"entries": -1},
        {"entries": 1.5},
        {"recipe": []},
        {"trunk": None},
        {"segment_bytes": 1 << 70},
        {"attestation": Attestation(HERE, "2.0.0", "", float("nan"), 1)},
        {"attestation": Attestation(HERE, "2.0.0", "", -1.0, 1)},
    ],
)
def test_a_header_that_means_nothing_is_refused(tmp_path: Path, changes: dict[str, object]):
    forged = dataclasses.replace(header(1), **changes)  # type: ignore[arg-type]
    data = encode_index([forged], np.zeros(1, dtype=KEY), np.zeros(1, dtype=RECORD))
    (tmp_path / "i.idx").write_bytes(data)
    with pytest.raises(IntegrityError, match="says what no index of format 1 says"):
        read(tmp_path / "i.idx")


def test_fields_that_a_later_writer_added_are_passed_over(tmp_path: Path):
    @dataclasses.dataclass(frozen=True)
    class Later(SegmentHeader):
        colour: str = "green"

    later = Later(**{f.name: getattr(header(1), f.name) for f in dataclasses.fields(SegmentHeader)})
    data = encode_index([later], np.zeros(1, dtype=KEY), np.zeros(1, dtype=RECORD))
    assert b"green" in data
    (tmp_path / "i.idx").write_bytes(data)
    assert read(tmp_path / "i.idx").segments == (header(1),)
