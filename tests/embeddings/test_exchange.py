from __future__ import annotations

from pathlib import Path

import pytest
from entries import TRUNK, headers, make, publish, serves

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.errors import IntegrityError, StorageError


def test_push_and_pull_bring_what_is_missing_and_no_more(tmp_path: Path):
    here, there = EmbeddingCache(tmp_path / "here"), EmbeddingCache(tmp_path / "there")
    made = [make(6, prefix=f"{n}{p}", pooling=p, stored="fp16") for n in range(5) for p in ("mean", "per_residue")]
    for one in made:
        publish(here, one)  # some are merged into a run, some are not
    assert there.pull(tmp_path / "here", dry_run=True).entries == 60
    assert not (tmp_path / "there").exists()
    copied = here.push(tmp_path / "there")
    assert (copied.segments, copied.entries, copied.there) == (10, 60, 0)
    assert copied.nbytes == sum(h.segment_bytes for h in headers(tmp_path / "here"))
    assert [serves(there, one) for one in made] == [6] * 10
    assert there.verify().findings == ()
    again = here.push(tmp_path / "there")
    assert (again.segments, again.there) == (0, 10)
    more = make(2, prefix="more")
    publish(there, more)
    assert here.pull(tmp_path / "there").entries == 2
    assert serves(here, more) == 2
    assert there.stats()["entries"] == here.stats()["entries"] == 62


def test_only_one_models_embeddings_go_where_one_is_named(tmp_path: Path):
    here = EmbeddingCache(tmp_path / "here")
    made = make(3)
    publish(here, made)
    assert here.push(tmp_path / "there", trunk="f" * 32).segments == 0
    assert here.push(tmp_path / "there", trunk=TRUNK).segments == 1


def test_a_damaged_segment_is_refused_and_nothing_of_it_arrives(tmp_path: Path):
    here = EmbeddingCache(tmp_path / "here")
    publish(here, make(3))
    (path,) = (tmp_path / "here" / "seg").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(IntegrityError, match="is not the file that was written"):
        here.push(tmp_path / "there")
    assert [p for p in (tmp_path / "there").rglob("*") if p.is_file()] == []
    path.unlink()
    with pytest.raises(StorageError, match="is gone; run: proteus cache verify"):
        EmbeddingCache(tmp_path / "here").push(tmp_path / "there")


def test_what_was_hidden_stays_hidden_on_the_other_side(tmp_path: Path):
    here, there = EmbeddingCache(tmp_path / "here"), EmbeddingCache(tmp_path / "there")
    made = make(4)
    publish(here, made)
    here.push(tmp_path / "there")
    here.invalidate(TRUNK, "a bug")
    assert here.push(tmp_path / "there").events == 1
    assert serves(there, made) == 0
    publish(here, made)
    here.push(tmp_path / "there")
    assert serves(there, made) == 4


def test_a_shared_cache_is_read_beneath_the_own_and_never_written(tmp_path: Path):
    shared = EmbeddingCache(tmp_path / "shared")
    ours, theirs = make(4, prefix="ours"), make(4, prefix="theirs", pooling="per_residue")
    publish(shared, theirs)
    publish(shared, ours)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "shared").rglob("*"))
    mine = EmbeddingCache(tmp_path / "mine", shared=tmp_path / "shared")
    assert serves(mine, theirs) == serves(mine, ours) == 4
    assert all(mine.get(key) is not None for key in [*ours.arrays, *theirs.arrays])
    assert mine.vectors(list(ours.arrays)).shape == (4, 8)
    own = make(3, prefix="own")
    publish(mine, own)
    assert serves(mine, own) == 3
    assert serves(shared, own) == 0
    assert mine.stats()["entries"] == 3
    # What the own cache hides is hidden beneath it, for whoever reads through it.
    assert mine.invalidate(TRUNK, "a bug", pooling="mean") == 7
    assert (serves(mine, ours), serves(mine, theirs), serves(mine, own)) == (0, 4, 0)
    assert serves(shared, ours) == 4
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "shared").rglob("*")) == before


def test_an_event_about_one_entry_hides_it_beneath_too(tmp_path: Path):
    made = make(4)
    publish(EmbeddingCache(tmp_path / "shared"), made)
    (header,) = headers(tmp_path / "shared")
    mine = EmbeddingCache(tmp_path / "mine", shared=tmp_path / "shared")
    assert serves(mine, made) == 4
    write_event(mine.store, make_event("quarantined", "why", segments={header.segment: list(made.arrays)[:1]}))
    assert serves(mine, made) == 3
