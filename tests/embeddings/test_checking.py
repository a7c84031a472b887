from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from entries import HERE, Made, headers, make, publish, serves

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.embeddings.merging import MERGE_AT
from proteus_pipeline.errors import IntegrityError

KINDS = [("mean", "fp32"), ("per_residue", "bf16")]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(params=KINDS, ids=["pooled", "residues"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Made]:
    pooling, dtype = request.param
    made = make(10, pooling=pooling, stored=dtype)
    publish(EmbeddingCache(tmp_path), made)
    return tmp_path, made


def test_a_sound_cache_has_nothing_to_find(stored: tuple[Path, Made]):
    folder, _ = stored
    verified = EmbeddingCache(folder).verify()
    assert (verified.entries, verified.segments, verified.findings) == (10, 1, ())
    assert verified.nbytes == headers(folder)[0].segment_bytes
    assert EmbeddingCache(folder / "none").verify().findings == ()


def test_a_damaged_entry_is_named_and_then_reads_as_a_miss_without_a_word(
    stored: tuple[Path, Made], caplog: pytest.LogCaptureFixture
):
    folder, made = stored
    cache = EmbeddingCache(folder)
    key = list(made.arrays)[4]
    (entry,) = cache.candidates([key])[key]
    flip(folder / "seg" / entry.segment, entry.offset + entry.nbytes // 2)
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.name, finding.repaired) == ("entry", key, "")
    assert serves(EmbeddingCache(folder), made) == 9  # warned of
    (finding,) = cache.verify(repair=True).findings
    assert finding.repaired.startswith("quarantined")
    caplog.clear()
    for opened in (cache, EmbeddingCache(folder)):
        assert serves(opened, made) == 9
        assert opened.get(key) is None
    assert caplog.text == ""
    assert EmbeddingCache(folder).verify().findings == ()
    publish(cache, made)  # computed again
    assert serves(cache, made) == 10


def test_damage_that_only_another_reader_would_meet_is_mended_without_loss(stored: tuple[Path, Made]):
    folder, made = stored
    (header,) = headers(folder)
    flip(folder / "seg" / header.segment, header.segment_bytes - 30)  # the zip's directory
    cache = EmbeddingCache(folder)
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.what) == ("segment", "is not the file that was written")
    (finding,) = cache.verify(repair=True).findings
    assert finding.repaired == "written again"
    assert cache.verify().findings == ()
    assert serves(EmbeddingCache(folder), made) == 10


@pytest.mark.parametrize("how", ["flipped header", "flipped body", "truncated", "deleted"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_lost_index_is_made_again_from_its_segments(tmp_path: Path, how: str, merged: bool):
    made = [
        make(5, pooling=p, prefix=f"{n}{p}")
        for n in range(MERGE_AT // 2 if merged else 1)
        for p in ("mean", "per_residue")
    ]
    for one in made:
        publish(EmbeddingCache(tmp_path), one)
    folder = tmp_path / ("runs" if merged else "index")
    for path in folder.iterdir():
        if how == "flipped header":
            flip(path, 60)
        elif how == "flipped body":
            flip(path, path.stat().st_size - 100)
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        else:
            path.unlink()
    assert sum(serves(EmbeddingCache(tmp_path), one) for one in made) == 0
    cache = EmbeddingCache(tmp_path)
    found = cache.verify().findings
    assert {f.kind for f in found} == {"orphan"} | ({"run" if merged else "index"} if how != "deleted" else set())
    repaired = cache.verify(repair=True)
    assert all(f.repaired for f in repaired.findings)
    assert [serves(EmbeddingCache(tmp_path), one) for one in made] == [5] * len(made)
    assert [serves(cache, one) for one in made] == [5] * len(made)
    assert EmbeddingCache(tmp_path).verify().findings == ()
    kept = list((tmp_path / "quarantine").iterdir()) if how != "deleted" else []
    assert len(kept) == sum(f.kind in {"index", "run"} for f in found)  # what was damaged can still be looked at


def test_a_segment_that_is_gone_is_named_and_no_longer_listed(
    stored: tuple[Path, Made], caplog: pytest.LogCaptureFixture
):
    folder, made = stored
    shutil.rmtree(folder / "seg")
    cache = EmbeddingCache(folder)
    (finding,) = cache.verify().findings
    assert "the file is gone" in finding.what
    cache.verify(repair=True)
    caplog.clear()
    assert serves(cache, made) == 0
    assert caplog.text == ""
    assert cache.verify().findings == ()
    assert cache.stats()["segments"] == 0


def test_a_segment_that_is_no_longer_one_is_set_aside(stored: tuple[Path, Made]):
    folder, _ = stored
    (header,) = headers(folder)
    shutil.rmtree(folder / "index")
    (folder / "seg" / header.segment).write_bytes(b"no zip")
    cache = EmbeddingCache(folder)
    (finding,) = cache.verify(repair=True).findings
    assert finding.repaired == "set aside"
    assert list((folder / "seg").iterdir()) == []
    (kept,) = (folder / "quarantine").iterdir()
    assert kept.read_bytes() == b"no zip"
    assert cache.verify().findings == ()


def test_a_damaged_event_stops_reading_until_it_is_set_aside(stored: tuple[Path, Made]):
    folder, made = stored
    cache = EmbeddingCache(folder)
    (header,) = headers(folder)
    name = write_event(cache.store, make_event("quarantined", "why", segments={header.segment: list(made.arrays)[:3]}))
    assert serves(cache, made) == 7
    flip(folder / name, 5)
    with pytest.raises(IntegrityError, match="which entries it hides is not known"):
        EmbeddingCache(folder).get(next(iter(made.arrays)))
    (finding,) = EmbeddingCache(folder).verify(repair=True).findings
    assert (finding.kind, finding.repaired) == ("event", "")  # what it hid must not come back by itself
    (folder / name).unlink()
    assert serves(EmbeddingCache(folder), made) == 10


def test_files_of_another_format_are_left_alone(stored: tuple[Path, Made]):
    folder, _ = stored
    (path,) = (folder / "index").iterdir()
    data = bytearray(path.read_bytes())
    data[7] = 2
    path.write_bytes(data)
    finding = EmbeddingCache(folder).verify(repair=True).findings[0]
    assert "has format 2, and this proteus reads 1; upgrade it" in finding.what
    assert finding.repaired == ""
    assert path.read_bytes() == data


def test_a_damaged_start_token_costs_no_entry(tmp_path: Path):
    made = make(40, pooling="per_residue", width=16)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    (header,) = headers(tmp_path)
    flip(tmp_path / "seg" / header.segment, header.chunk_starts[0] + 5)
    (finding,) = cache.verify(repair=True).findings
    assert finding.repaired == "written again"
    assert serves(EmbeddingCache(tmp_path), made) == 40
    assert cache.verify().findings == ()


def test_every_flipped_bit_of_a_segment_is_found_by_verify(stored: tuple[Path, Made]):
    folder, _ = stored
    (header,) = headers(folder)
    path = folder / "seg" / header.segment
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        flip(path, at)
        assert EmbeddingCache(folder).verify().findings, at
        path.write_bytes(whole)
    assert EmbeddingCache(folder).verify().findings == ()


def test_a_run_of_another_class_is_verified_alike(tmp_path: Path):
    made = make(5)
    publish(EmbeddingCache(tmp_path), made, "cuda/sm_90")
    assert EmbeddingCache(tmp_path, accept="same_class", device_class=lambda: HERE).verify().entries == 5
