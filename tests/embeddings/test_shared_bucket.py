"""A group's cache in a bucket of a real S3 server: pushed to, pulled from, read through, written back to, done without."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from entries import HERE, THERE, TRUNK, Made, headers, made_by, make, publish, serves
from processes import ends_well, script
from proxy import Proxy, proxy
from s3 import BUCKET, S3Server, s3_server

from proteus_pipeline.embeddings import shared as shared_module
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.stores import read_through, s3_uploads
from proteus_pipeline.stores.ranges import Range
from proteus_pipeline.stores.s3 import S3Store
from proteus_pipeline.stores.s3_access import Patience

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
LIVES = 50 if TORTURE else 2  # of each of four writers
FAST = Patience(connect=1.0, stall=1.0, request=3.0, retries=2, retrying=1.0)


@pytest.fixture
def url(s3: S3Server, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return s3.url(f"{os.environ.get('PYTEST_XDIST_WORKER', 'one')}/{tmp_path.name}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for three seconds, as a run asks for seventy."""
    monkeypatch.setattr(shared_module, "QUICK", FAST)


def objects(s3: S3Server, url: str, folder: str = "") -> list[str]:
    prefix = f"{url.split('/', 3)[3]}/{folder}"
    listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    return [o["Key"] for o in listed if not o["Key"].endswith("/")]


def damage(s3: S3Server, key: str, at: int) -> None:
    """Replace an object by one of the same size with a bit flipped."""
    client = s3.client()
    data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[at] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))


def kinds() -> list[Made]:
    return [make(5, prefix=f"{n}{p}", pooling=p, stored="fp16") for n in range(3) for p in ("mean", "per_residue")]


def test_push_and_pull_bring_what_is_missing_and_no_more(s3: S3Server, url: str, tmp_path: Path):
    here, there = EmbeddingCache(tmp_path / "here"), EmbeddingCache(tmp_path / "there")
    made = kinds()
    for one in made:
        publish(here, one)
    assert here.push(url, dry_run=True).entries == 30
    assert objects(s3, url) == []
    copied = here.push(url)
    assert (copied.segments, copied.entries, copied.there) == (6, 30, 0)
    assert here.push(url).segments == 0
    assert len(objects(s3, url, "runs/")) == 1  # merged: nobody else would
    assert not objects(s3, url, ".tmp")
    assert there.pull(url).entries == 30
    assert [serves(there, one) for one in made] == [5] * 6
    assert there.verify().findings == ()
    assert there.pull(url).there == 6
    # Interrupted between any two objects, a push goes on from there.
    gone = objects(s3, url, "seg/")[0]
    s3.client().delete_object(Bucket=BUCKET, Key=gone)
    again = here.push(url)
    assert (again.segments, again.there) == (1, 5)
    assert EmbeddingCache(tmp_path / "third").pull(url).entries == 30


def test_of_a_segment_that_is_not_what_was_written_nothing_arrives(s3: S3Server, url: str, tmp_path: Path):
    """It is sent as it lies, and looked at before; of a longer one only what was looked at may be sent."""
    here, made = EmbeddingCache(tmp_path / "here"), make(3)
    publish(here, made)
    (path,) = (tmp_path / "here" / "seg").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"\1\1")
    with pytest.raises(IntegrityError, match="is not the file that was written"):
        EmbeddingCache(tmp_path / "here").push(url)
    assert objects(s3, url) == []
    path.write_bytes(whole + b"and more")
    EmbeddingCache(tmp_path / "here").push(url)
    (sent,) = objects(s3, url, "seg/")
    assert s3.client().get_object(Bucket=BUCKET, Key=sent)["Body"].read() == whole
    assert path.read_bytes() == whole + b"and more"
    there = EmbeddingCache(tmp_path / "there")
    there.pull(url)
    assert serves(there, made) == 3


def test_a_push_sends_segments_from_where_they_lie(
    s3: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = EmbeddingCache(tmp_path / "here")
    publish(here, make(5, pooling="per_residue"))
    (path,) = (tmp_path / "here" / "seg").iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    monkeypatch.setattr(s3_uploads, "_ONE_REQUEST", 0)  # as a large file is sent
    here.push(url)
    (sent,) = objects(s3, url, "seg/")
    assert s3.client().get_object(Bucket=BUCKET, Key=sent)["Body"].read() == path.read_bytes()


def test_who_stops_asking_leaves_nothing_under_way(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, made = EmbeddingCache(tmp_path / "here"), kinds()
    for one in made:
        publish(here, one)
    here.push(url)
    reader = EmbeddingCache(tmp_path / "reader", shared=url)
    monkeypatch.setattr(shared_module, "_AHEAD_BYTES", 10_000)
    keys = [key for one in made for key in one.arrays]
    random.Random(0).shuffle(keys)
    assert [entry.key for entry, _ in reader.find(keys)] == keys
    assert reader._beneath._ahead == {}
    found = reader.find(keys)
    assert next(found)[0].key == keys[0]
    del found
    gc.collect()
    assert reader._beneath._ahead == {}
    assert not [t.name for t in threading.enumerate() if t.name.startswith("reader")]


def test_what_was_seen_last_is_fetched_while_it_is_asked_whether_that_still_holds(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, made = EmbeddingCache(tmp_path / "here"), make(12, pooling="per_residue")
    publish(here, made)
    here.push(url)
    reader = EmbeddingCache(tmp_path / "reader", shared=url)
    assert serves(reader, made) == 12
    asked: list[Range] = []
    begun, in_time = threading.Event(), []
    begin_ranges, sizes = S3Store.begin_ranges, S3Store.sizes

    def begins(store: S3Store, wanted: Sequence[Range]) -> Any:
        asked.extend(wanted)
        coming = begin_ranges(store, wanted)
        begun.set()
        return coming

    def lists(store: S3Store, folder: str) -> Any:
        in_time.append(begun.wait(10))
        return sizes(store, folder)

    monkeypatch.setattr(S3Store, "begin_ranges", begins)
    monkeypatch.setattr(S3Store, "sizes", lists)
    time.sleep(read_through.BELIEVED_SECONDS + 0.1)
    assert serves(reader, made) == 12
    assert in_time == [True] * 3
    assert len(asked) == len(set(asked)) == 12  # each once
    assert reader._beneath._ahead == {}

    # What is hidden by then is not served, and nothing of it stays under way.
    admin = EmbeddingCache(tmp_path / "admin")
    admin.pull(url)
    admin.invalidate(TRUNK, "a bug")
    admin.push(url)
    asked.clear()
    time.sleep(read_through.BELIEVED_SECONDS + 0.1)
    assert serves(reader, made) == 0
    assert len(asked) == 12
    assert reader._beneath._ahead == {}


def test_nothing_is_fetched_beforehand_that_is_of_another_class_where_only_the_own_is_accepted(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, made = EmbeddingCache(tmp_path / "here"), make(5, pooling="per_residue")
    publish(here, made, THERE)
    here.push(url)
    reader = EmbeddingCache(tmp_path / "reader", shared=url, accept="same_class", device_class=lambda: HERE)
    assert serves(reader, made) == 0
    asked: list[Range] = []
    begin_ranges = S3Store.begin_ranges
    monkeypatch.setattr(
        S3Store, "begin_ranges", lambda self, wanted: asked.extend(wanted) or begin_ranges(self, wanted)
    )
    time.sleep(read_through.BELIEVED_SECONDS + 0.1)
    assert serves(reader, made) == 0
    assert asked == []


def test_who_lets_go_of_what_comes_leaves_what_another_began(url: str, tmp_path: Path):
    here, made = EmbeddingCache(tmp_path / "here"), make(6, pooling="per_residue")
    publish(here, made)
    here.push(url)
    reader = EmbeddingCache(tmp_path / "reader", shared=url)
    entries = [entries[0] for entries in reader.candidates(list(made.arrays)).values()]
    wanted = [(f"seg/{e.segment}", e.offset, e.nbytes) for e in entries]
    tier = reader._beneath
    mine, theirs = tier.read_ahead(wanted), tier.read_ahead(wanted)
    tier.forget_ahead(mine)
    assert tier._ahead == theirs
    # They are neighbours, and come by one request: one of them is wanted no more, and the others are.
    tier.forget_ahead({wanted[0]: theirs[wanted[0]]})
    assert tier.read_ahead(wanted[1:], theirs) == {one: theirs[one] for one in wanted[1:]}
    for one in wanted[1:]:
        (path,) = (tmp_path / "here" / "seg").iterdir()
        assert bytes(tier.view(*one)) == path.read_bytes()[one[1] : one[1] + one[2]]
        assert not any(future.cancelled() for future, _ in theirs[one])
    assert tier._ahead == {}


def test_new_indexes_do_not_wait_for_what_is_read_ahead(url: str, tmp_path: Path):
    here, made = EmbeddingCache(tmp_path / "here"), kinds()
    for one in made:
        publish(here, one)
    here.push(url)
    reader = EmbeddingCache(tmp_path / "reader", shared=url)
    over, late = threading.Event(), []
    threads = reader._beneath.far._threads("s3-ahead")
    busy = [threads.submit(lambda: late.append(not over.wait(30))) for _ in range(100)]
    assert len(reader.candidates(list(made[0].arrays))) == len(made[0].arrays)
    over.set()
    for one in busy:
        one.result()
    assert not any(late)


def test_a_prefix_without_a_cache_is_refused(url: str, tmp_path: Path):
    with pytest.raises(
        StorageError, match=f"^{url}/none is no embedding cache; it has none of seg, index, runs, events$"
    ):
        EmbeddingCache(tmp_path).pull(f"{url}/none")


def test_a_shared_cache_is_read_through_and_never_written(s3: S3Server, url: str, tmp_path: Path):
    source = EmbeddingCache(tmp_path / "source")
    made = kinds()
    for one in made:
        publish(source, one)
    source.push(url)
    before = objects(s3, url)
    mine = EmbeddingCache(tmp_path / "mine", shared=url)
    assert [serves(mine, one) for one in made] == [5] * 6
    assert all(mine.get(key) is not None for one in made for key in one.arrays)
    assert mine.vectors(list(made[0].arrays)).tobytes() == b"".join(a.tobytes() for a in made[0].arrays.values())
    assert mine.view(next(iter(made[0].arrays))) is not None
    assert mine.stats()["entries"] == 0
    # Order, and entries of its own among those beneath.
    own = make(3, prefix="own")
    publish(mine, own)
    mixed = [*made[1].arrays, *own.arrays, *made[3].arrays]
    random.Random(0).shuffle(mixed)
    assert [entry.key for entry, _ in mine.find(mixed)] == mixed
    assert mine.invalidate(TRUNK, "a bug", pooling="mean") == 18
    assert [serves(mine, one) for one in made] == [0, 5] * 3
    assert objects(s3, url) == before


def test_indexes_are_fetched_once_and_kept_within_a_bound(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    source = EmbeddingCache(tmp_path / "source")
    for n in range(3):
        publish(source, make(50, prefix=f"{n}-"))
        source.push(url)
    made = make(50, prefix="1-")
    fetched: list[str] = []
    fetch = S3Store.fetch
    monkeypatch.setattr(S3Store, "fetch", lambda self, name, *a: (fetched.append(name), fetch(self, name, *a)))
    for _ in range(3):
        assert serves(EmbeddingCache(tmp_path / "mine", shared=url), made) == 50
    assert len(fetched) == len(set(fetched)) == 3
    kept = [p for p in (tmp_path / "mine" / "shared").rglob("*") if p.is_file()]
    most = max(p.stat().st_size for p in kept)
    # Damage on this disk is seen, and the file is fetched again.
    kept[0].write_bytes(bytes(kept[0].stat().st_size))
    assert serves(EmbeddingCache(tmp_path / "mine", shared=url), made) == 50
    assert len(fetched) == 4
    small = EmbeddingCache(tmp_path / "small", shared=url, local_bytes=most)
    assert serves(small, made) == 50
    assert "are fetched again and again: raise cache.local_bytes" in caplog.text
    assert sum(p.stat().st_size for p in (tmp_path / "small" / "shared").rglob("*") if p.is_file()) <= most


def test_an_index_beyond_the_bound_is_refused_by_name(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = EmbeddingCache(tmp_path / "source")
    publish(source, make(5))
    source.push(url)
    assert serves(EmbeddingCache(tmp_path / "mine", shared=url, local_bytes=10), make(5)) == 0
    assert "and cache.local_bytes is 10; raise cache.local_bytes" in caplog.text


def test_a_corrupted_object_of_the_right_size_is_refused(
    s3: S3Server, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """On pull, with the others copied; and through reading, as a miss with one warning, that can be computed."""
    source = EmbeddingCache(tmp_path / "source")
    sound, hurt = make(3, prefix="sound", pooling="per_residue"), make(3, prefix="hurt", pooling="per_residue")
    publish(source, hurt)
    source.push(url)
    (key,) = objects(s3, url, "seg/")
    publish(source, sound)
    source.push(url)
    ((entry,),) = source.candidates([list(hurt.arrays)[1]]).values()
    damage(s3, key, entry.offset + 5)
    fresh = EmbeddingCache(tmp_path / "fresh")
    with pytest.raises(IntegrityError, match=rf"{url}/seg/.* is not the file that was written; remove it there, and"):
        fresh.pull(url)
    assert (serves(fresh, hurt), serves(fresh, sound)) == (0, 3)
    mine = EmbeddingCache(tmp_path / "mine", shared=url)
    caplog.clear()
    assert serves(mine, hurt) == 2
    assert serves(mine, sound) == 3
    assert len(caplog.records) == 1
    publish(mine, hurt)
    assert serves(mine, hurt) == 3
    # Put right: removed, and pushed again from where it is sound.
    s3.client().delete_object(Bucket=BUCKET, Key=key)
    source.push(url)
    assert serves(EmbeddingCache(tmp_path / "other", shared=url), hurt) == 3


@pytest.mark.parametrize("folder", ["index", "events"])
def test_a_damaged_index_or_event_hides_and_is_warned_of(
    s3: S3Server, url: str, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
):
    source = EmbeddingCache(tmp_path / "source")
    made, more = make(3), make(3, prefix="more", pooling="max")
    publish(source, made)
    source.invalidate(TRUNK, "a bug", pooling="max")
    publish(source, more)
    source.invalidate(TRUNK, "a bug", pooling="max")
    source.push(url)
    publish(source, more)
    source.push(url)
    damage(s3, objects(s3, url, f"{folder}/")[0], 60)
    mine = EmbeddingCache(tmp_path / "mine", shared=url)
    assert serves(mine, made) == 0
    assert serves(mine, more) == (3 if folder == "index" else 0)
    assert len(caplog.records) == 1
    publish(mine, made)
    assert serves(mine, made) == 3


def test_entries_of_another_device_class_are_hits_that_say_so_and_refused_where_only_the_own_is_accepted(
    url: str, tmp_path: Path
):
    source = EmbeddingCache(tmp_path / "source")
    made = make(4)
    publish(source, made, THERE)
    source.push(url)
    mine = EmbeddingCache(tmp_path / "mine", shared=url, device_class=lambda: HERE)
    assert {entry.device_class for entry, _ in mine.find(made.arrays)} == {THERE}
    strict = EmbeddingCache(tmp_path / "mine", shared=url, device_class=lambda: HERE, accept="same_class")
    assert serves(strict, made) == 0
    assert all(strict.get(key) is None for key in made.arrays)
    publish(strict, made)
    assert serves(strict, made) == 4
    # Damaged here, what lies beneath is still of the other class.
    (path,) = (tmp_path / "mine" / "seg").iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    again = EmbeddingCache(tmp_path / "mine", shared=url, device_class=lambda: HERE, accept="same_class")
    assert serves(again, made) == 0


def test_new_segments_are_written_back_where_asked(s3: S3Server, url: str, tmp_path: Path):
    mine = EmbeddingCache(tmp_path / "mine", shared=url, write_back=True)
    made = kinds()
    for one in made:
        publish(mine, one)
    assert [serves(EmbeddingCache(tmp_path / "theirs", shared=url), one) for one in made] == [5] * 6
    assert len(objects(s3, url, "seg/")) == 6
    assert mine.gc(grace_seconds=0) is not None  # what is written again is not new
    assert len(objects(s3, url, "seg/")) == 6
    assert mine.push(url).segments == 0
    folder = EmbeddingCache(tmp_path / "local", shared=tmp_path / "group", write_back=True)
    publish(folder, made[0])
    assert serves(EmbeddingCache(tmp_path / "group"), made[0]) == 5


def test_what_is_invalidated_in_the_bucket_is_hidden_here_too(url: str, tmp_path: Path):
    made = make(4)
    mine = EmbeddingCache(tmp_path / "mine", shared=url, write_back=True)
    publish(mine, made)
    admin = EmbeddingCache(tmp_path / "admin")
    admin.pull(url)
    admin.invalidate(TRUNK, "a bug")
    assert admin.push(url).events == 1
    assert serves(EmbeddingCache(tmp_path / "mine", shared=url), made) == 0
    time.sleep(read_through.BELIEVED_SECONDS + 0.1)
    assert serves(mine, made) == 0
    assert mine.get(next(iter(made.arrays))) is None
    publish(mine, made)
    assert serves(mine, made) == serves(EmbeddingCache(tmp_path / "theirs", shared=url), made) == 4


def test_wrong_settings_are_one_line(tmp_path: Path):
    for options, said in (
        ({"shared": "gs://bucket/x"}, "gs:// is no place for embeddings; use a folder's path, or s3://BUCKET/PREFIX"),
        ({"shared": "s3://KEY:SECRET@bucket"}, "an S3 URL holds no credentials; "),
        ({"shared": "s3://"}, "'s3://' is no S3 URL; write s3://BUCKET/PREFIX"),
        ({"write_back": True}, "cache.write_back is true, and there is no shared cache; set cache.shared, or false"),
        ({"local_bytes": 0}, "cache.local_bytes is 0; use a number of bytes above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            EmbeddingCache(tmp_path, **options)
        assert str(caught.value).startswith(said)
        assert "SECRET" not in str(caught.value)
    with pytest.raises(ConfigError, match="ftp:// is no place"):
        EmbeddingCache(tmp_path).push("ftp://host/x")


# Without the server.


@pytest.fixture
def away(tmp_path: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path / "server") as server:
        yield server


@pytest.fixture
def between(away: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before a server of the test's own, which may break it."""
    with proxy(away.port) as made:
        for name, value in (away.environment | {"AWS_ENDPOINT_URL": made.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield made


def stalled(_: S3Server, between: Proxy) -> None:
    between.stalled = True


def paused(away: S3Server, _: Proxy) -> None:
    away.pause()


def killed(away: S3Server, _: Proxy) -> None:
    away.kill()


@pytest.mark.parametrize("breaking", [stalled, paused, killed])
def test_a_run_goes_on_without_a_server_with_one_warning_and_with_it_again_later(
    away: S3Server,
    between: Proxy,
    breaking: Callable[[S3Server, Proxy], None],
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    url = "s3://proteus/away"
    source = EmbeddingCache(tmp_path / "source")
    theirs, own = make(6, prefix="theirs", pooling="per_residue"), make(3, prefix="own")
    publish(source, theirs)
    source.push(url)
    mine = EmbeddingCache(tmp_path / "mine", shared=url, write_back=True)
    publish(mine, own)
    assert serves(mine, theirs) == 6
    breaking(away, between)
    caplog.clear()
    began = time.monotonic()
    late = make(3, prefix="late")
    for _ in range(5):
        assert (serves(mine, theirs), serves(mine, own)) == (0, 3)
    publish(mine, late)
    assert serves(mine, late) == 3
    assert time.monotonic() - began < 2 * FAST.longest + 3
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2, said
    assert said[0].startswith("the shared cache is left out: cannot ")
    assert said[1].startswith("new embeddings were kept here alone: ")
    assert said[1].endswith(f"run: proteus cache push {url}")
    began = time.monotonic()
    monkeypatch.setattr(shared_module, "PATIENT", FAST)
    with pytest.raises(StorageError):
        mine._local_bytes and mine.push(S3Store(url, patience=FAST))
    with pytest.raises(StorageError):
        EmbeddingCache(tmp_path / "new").pull(S3Store(url, patience=FAST))
    assert time.monotonic() - began < 2 * FAST.longest + 3
    # And back.
    between.stalled = False
    away.start() if breaking is killed else away.resume()
    monkeypatch.setattr(read_through, "LEFT_ALONE_SECONDS", 0.0)
    mine._beneath._again = 0.0
    assert serves(mine, theirs) == 6
    assert mine.push(url).segments == 1
    assert serves(EmbeddingCache(tmp_path / "new", shared=url), late) == 3


def test_a_hung_server_costs_a_run_that_writes_back_one_wait(
    between: Proxy, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
):
    """And not one for each segment: a run publishes them for hours."""
    mine = EmbeddingCache(tmp_path / "mine", shared="s3://proteus/hung", write_back=True)
    publish(mine, make(3, prefix="first"))
    between.stalled = True
    began = time.monotonic()
    for n in range(6):
        publish(mine, make(3, prefix=f"{n}"))
    assert time.monotonic() - began < 2 * FAST.longest + 1
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "new embeddings were kept here alone",
        "the shared cache is left out",
    ]
    assert serves(mine, make(3, prefix="5")) == 3


def test_connections_cut_in_mid_transfer_lose_nothing_and_serve_nothing_wrong(
    away: S3Server, between: Proxy, tmp_path: Path, quick: None
):
    url = "s3://proteus/cut"
    source = EmbeddingCache(tmp_path / "source")
    made = [make(40, prefix=f"{n}", pooling="per_residue", width=200, seed=n) for n in range(3)]
    for one in made:
        publish(source, one)
    said: list[str] = []
    for limit in (100, 5_000, 100_000, 200_000):
        between.cut_sending_after = limit
        said += attempt(lambda: source.push(S3Store(url, patience=FAST)))
    assert between.cuts
    between.cut_sending_after = None
    source.push(url)
    for limit in (100, 5_000, 50_000, None):
        between.cut_after = limit
        mine, fresh = EmbeddingCache(tmp_path / "mine", shared=url), EmbeddingCache(tmp_path / "fresh")
        hits = [serves(mine, one) for one in made]  # each equal to what was written
        said += attempt(lambda fresh=fresh: fresh.pull(S3Store(url, patience=FAST)))
        assert limit or hits == [40] * 3
    assert [serves(EmbeddingCache(tmp_path / "fresh"), one) for one in made] == [40] * 3
    assert EmbeddingCache(tmp_path / "fresh").verify().findings == ()
    assert said
    assert not [line for line in said if "\n" in line or "secret" in line]


def attempt(work: Callable[[], object]) -> list[str]:
    try:
        work()
    except StorageError as error:
        return [str(error)]
    return []


# Writers killed, on the real server, which is itself killed and started again. Each writer is a new process: obstore's
# threads do not survive a fork, so that a child is forked before anything is asked of S3.
WRITERS = """
import os, random, signal, sys, time
from entries import *
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.shared import open_tier, merge_far
from proteus_pipeline.embeddings.visible import Visible
from proteus_pipeline.errors import StorageError
import obstore.store, botocore.session
Path(sys.argv[2]).mkdir()
url, folder, slot, lives = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(slot)
for life in range(lives):
    child = os.fork()
    if child == 0:
        tier = open_tier(url, Path(folder), 1 << 30)
        seen, number = Visible(tier), 0
        while True:
            name = f"{slot}-{life}-{number}"
            made = made_by(name)
            try:
                publication = Publication(tier.far, TRUNK, made.recipe)
                for (key, array), length in zip(made.arrays.items(), made.lengths):
                    publication.add(key, array, length)
                publication.publish(Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 3.0, 100))
                os.write(1, f"{name}\\n".encode())
                Path(folder, f"ready-{life}").touch()
                seen.refresh()
                merge_far(tier, seen)
            except StorageError:
                time.sleep(0.05)  # the server was killed: nothing was acknowledged
            number += 1
    # Half of them while they open the bucket, half while they write and merge.
    deadline = time.monotonic() + 20
    while life % 2 and not Path(folder, f"ready-{life}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.01, 0.8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
READER = """
import random, sys, threading, time, logging
from entries import *
from proteus_pipeline.embeddings import shared
logging.disable()
cache, told, over = EmbeddingCache(sys.argv[2], shared=sys.argv[1]), [], threading.Event()
def listen():
    for line in sys.stdin:
        told.append((time.monotonic(), line.strip()))
    over.set()
threading.Thread(target=listen, daemon=True).start()
chance, reads, away = random.Random(0), 0, 0
ended = None
# On a busy machine the writers may be done before this one has read: it then has half a minute to.
while not over.is_set() or (not reads and time.monotonic() < (ended := ended or time.monotonic() + 30)):
    before = time.monotonic()
    known = [name for when, name in told if before - when > 1.5]  # a listing may be a second old
    for name in chance.sample(known, min(len(known), 4)):
        hits = serves(cache, made_by(name))
        if not cache._visible_beneath.indexes:
            away += 1  # the server is down: left out, and not wrong
            cache._beneath._again = 0.0
            continue
        assert hits == 3 or cache._beneath._failed, f"{name} was acknowledged, and is a miss"
        reads += hits == 3
    time.sleep(0.05)
print(reads)
"""


@pytest.mark.torture
def test_killed_writers_and_a_killed_server_lose_nothing_and_no_reader_notices(
    away: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name, value in away.environment.items():
        monkeypatch.setenv(name, value)
    url = "s3://proteus/killed"
    reader = script(READER, url, tmp_path / "reader")
    writers = [script(WRITERS, url, tmp_path / f"w{slot}", slot, LIVES) for slot in range(4)]
    acknowledged: list[str] = []
    lock = threading.Lock()

    def listen(writer: subprocess.Popen[str]) -> None:
        assert writer.stdout is not None and reader.stdin is not None
        for line in writer.stdout:
            with lock:
                acknowledged.append(line.strip())
                if reader.poll() is None:
                    reader.stdin.write(line)
                    reader.stdin.flush()

    threads = [threading.Thread(target=listen, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    server_kills = 0
    while any(writer.poll() is None for writer in writers):
        time.sleep(1.5)
        if server_kills < (10 if TORTURE else 1):
            away.kill()
            away.start()
            server_kills += 1
    for thread in threads:
        thread.join()
    for writer in writers:
        assert writer.stderr is not None
        assert (writer.wait(timeout=60), writer.stderr.read()) == (0, "")
    reads = int(ends_well(reader))
    assert len(acknowledged) == len(set(acknowledged)) > LIVES
    assert reads > 0
    cache = EmbeddingCache(tmp_path / "last", shared=url)
    for name in acknowledged:
        assert serves(cache, made_by(name)) == 3, name
    beneath = cache._visible_beneath
    assert isinstance(beneath, Visible) and beneath.unreadable == []
    visible = {key for index in beneath.indexes for key in key_strings(index.keys())}
    assert len(list(cache.find(visible))) == len(visible) >= 3 * len(acknowledged)
    pulled = EmbeddingCache(tmp_path / "pulled")
    pulled.pull(url)
    assert pulled.verify().findings == ()
    assert sum(h.entries for h in headers(tmp_path / "pulled")) >= len(visible)
    print(f"{4 * LIVES} kills of writers, {server_kills} of the server, {len(acknowledged)} acknowledged, {reads} read")
