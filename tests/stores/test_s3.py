"""What a bucket promises beyond the contract of every place: create-only, its errors, whole uploads, credentials."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy import proxy
from s3 import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server

from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.stores import s3 as s3_module
from proteus_pipeline.stores.places import check_location, open_place, scheme_of
from proteus_pipeline.stores.ranges import PART_BYTES, spans_of
from proteus_pipeline.stores.read_through import ReadThrough
from proteus_pipeline.stores.s3 import S3Store
from proteus_pipeline.stores.s3_access import Patience, parse_url
from proteus_pipeline.stores.store import LocalStore

FAST = Patience(connect=1.0, stall=1.0, request=2.0, retries=1, retrying=1.0)


@pytest.fixture
def url(s3: S3Server, tmp_path: Path) -> str:
    return s3.url(f"s3/{os.environ.get('PYTEST_XDIST_WORKER', 'one')}/{tmp_path.name}")


def send(store: S3Store, name: str, data: bytes) -> None:
    unfinished = store.begin(name)
    unfinished.path.write_bytes(data)
    unfinished.publish()


def test_of_many_who_create_one_name_one_does(url: str):
    honours = S3Store(url).honours()
    assert (honours.create_only, honours.removes) == ("refuses", True)
    for number in range(5):
        stores = [S3Store(url) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, n=number, s=stores: s[i].create(f"claims/{n}", b"%d" % i), range(8)))
        assert won.count(True) == 1
        assert S3Store(url).read(f"claims/{number}") == b"%d" % won.index(True)
    assert S3Store(url).create("claims/0", S3Store(url).read("claims/0")) is False  # the same bytes, and another's


def test_what_is_there_is_not_replaced(url: str):
    store = S3Store(url)
    for data in (b"small", bytes(17 << 20)):
        send(store, "seg/a.zip", data)
        with pytest.raises(StorageError, match=rf"^{url}/seg/a\.zip is there already; look at who wrote it there$"):
            send(store, "seg/a.zip", data + b"other")
        assert store.size("seg/a.zip") == len(data)
        store.remove("seg/a.zip")


class Overwriting(BaseHTTPRequestHandler):
    """A server that answers as some do which know no If-None-Match: it keeps what came last."""

    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        import hashlib

        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self.path] = data
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self.send_response(204)
        self.end_headers()

    def do_POST(self) -> None:
        self.do_DELETE()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def overwriting(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Overwriting,), {"objects": {}}))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_server_that_overwrites_is_named_and_nothing_is_arbitrated_on_it(
    overwriting: str, caplog: pytest.LogCaptureFixture
):
    store = S3Store("s3://bucket/x", endpoint=overwriting, patience=FAST)
    with pytest.raises(StorageError) as caught:
        store.create("claims/a", b"mine")
    assert str(caught.value) == (
        f"cannot create s3://bucket/x/claims/a: {overwriting} overwrites objects without a word (If-None-Match: *); "
        "use a server that honours it, as AWS, MinIO, Ceph and SeaweedFS do"
    )
    store.write("seg/a", b"of a name that nobody else writes")
    assert [r.getMessage()[: len(overwriting)] for r in caplog.records] == [overwriting]


def errors(work: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        work()
    said = str(caught.value)
    assert "\n" not in said
    assert "SECRET" not in said.replace("AWS_SECRET_ACCESS_KEY", "")
    assert SECRET_KEY not in said
    return said


def test_each_reason_is_one_line_without_a_secret(s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch):
    store = S3Store(url, patience=FAST)
    store.write("seg/a", b"a")
    assert "there is no such bucket at http" in errors(lambda: S3Store("s3://nosuch/x", patience=FAST).names("seg"))
    said = errors(lambda: S3Store(url, endpoint="http://me:SECRET@127.0.0.1:1", patience=FAST).size("seg/a"))
    assert said.endswith("nobody answers at http://127.0.0.1:1; check AWS_ENDPOINT_URL, and that the server runs")
    assert "its endpoint is no URL" in errors(lambda: S3Store(url, endpoint="SECRET", patience=FAST).size("seg/a"))
    assert "profile (nosuch) could not be found" in errors(lambda: S3Store(url, profile="nosuch").size("seg/a"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET-and-wrong")
    for work in (lambda: S3Store(url).read("seg/a"), lambda: S3Store(url).write("seg/b", b"")):
        assert "refuses it (" in errors(work) and "check the credentials" in errors(work)
    assert "SECRET" not in repr(S3Store(url))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "there are no AWS credentials; set AWS_ACCESS_KEY_ID" in errors(lambda: S3Store(url).names("seg"))


def test_a_profile_says_who_and_where(s3: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[profile group]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        f"services = own\n[services own]\ns3 =\n  endpoint_url = {s3.endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    S3Store(url, profile="group").write("seg/a", b"a")
    monkeypatch.setenv("AWS_PROFILE", "group")
    assert S3Store(url).read("seg/a") == b"a"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert "nobody answers at http://127.0.0.1:1" in errors(lambda: S3Store(url, patience=FAST).read("seg/a"))


def test_an_upload_that_breaks_leaves_no_parts_and_no_object(s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch):
    with proxy(s3.port) as between:
        store = S3Store(url, endpoint=between.endpoint, patience=FAST)
        store.honours()
        between.cut_sending_after = 3 << 20
        errors(lambda: send(store, "seg/a.zip", bytes(20 << 20)))
        assert between.cuts
        between.cut_sending_after = None
        assert store.names("seg") == set()
        uploads = s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        assert not [u for u in uploads if u["Key"].startswith(url.split("/", 3)[3])]
        send(store, "seg/a.zip", bytes(20 << 20))
        assert store.size("seg/a.zip") == 20 << 20


def test_a_range_beyond_a_files_end_takes_no_request_for_each_part_of_it(url: str):
    store = S3Store(url)
    store.write("seg/a", b"0123456789")
    wanted = ("seg/a", 4, 1 << 42)  # as a damaged index may ask for
    (((future, first),),) = store.begin_ranges([wanted]).values()
    try:
        assert first == 4
        assert bytes(future.result(timeout=20)) == b"456789"
    finally:
        store.remove("seg/a")  # and who asked on would now be told that it is gone


def test_a_forked_process_is_told_so_and_does_not_hang(url: str):
    store = S3Store(url)
    store.write("seg/a", b"a")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.read("seg/a")
        except StorageError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"start processes by spawn" in os.read(reading, 1000)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3://a",
        "s3://b/../c",
        "s3://bb//c",
        "s3://bb/a b",
        "s3://bb/%2e",
        "s3:/bb/c",
        "s3://bb/c\n",
        "s3://bb/" + "x" * 701,
    ],
)
def test_a_url_that_is_none_is_refused(url: str):
    with pytest.raises(ConfigError, match=r"write s3://BUCKET/PREFIX"):
        parse_url(url)


def test_a_location_is_a_folder_or_a_bucket(tmp_path: Path):
    assert isinstance(open_place(tmp_path), LocalStore)
    assert isinstance(open_place("a:b/c"), LocalStore)
    assert isinstance(open_place("s3://bucket/x"), S3Store)
    for wrong in ("gs://bucket/x", "https://host/x", "file:///x", "redis://u:SECRET@host"):
        with pytest.raises(ConfigError) as caught:
            check_location(wrong)
        assert "SECRET" not in str(caught.value)
    with pytest.raises(ConfigError, match="holds no credentials") as caught:
        check_location("s3://KEY:SECRET@bucket")
    assert "SECRET" not in str(caught.value)
    assert scheme_of(Path("s3://bucket/x")) == "s3"


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 30 << 20), st.integers(0, 1 << 20) | st.integers(0, 20 << 20)),
        max_size=30,
    ),
)
def test_requests_cover_each_range_once_and_lie_in_one_part(wanted: list[tuple[str, int, int]]):
    covered: dict[int, list[tuple[int, int]]] = {}
    for name, start, end, members in spans_of(wanted, 1 << 40):
        assert start // PART_BYTES == (end - 1) // PART_BYTES or (
            len(members) == 1 and wanted[members[0]] == (name, start, end - start) and end - start > PART_BYTES
        )
        for i in members:
            its, offset, nbytes = wanted[i]
            assert its == name
            covered.setdefault(i, []).append((max(start, offset), min(end, offset + nbytes)))
    for i, (_, offset, nbytes) in enumerate(wanted):
        pieces = covered.get(i, [(offset, offset)])
        assert [pieces[0][0], pieces[-1][1]] == [offset, offset + nbytes]
        assert all(one[1] == next_one[0] for one, next_one in pairwise(pieces))


def test_ranges_that_lie_in_two_parts_are_whole(url: str, tmp_path: Path):
    data = random.Random(0).randbytes((17 << 20) + 100)
    store = S3Store(url)
    send(store, "seg/a", data)
    edges = [n * PART_BYTES for n in (1, 2)]
    wanted = [("seg/a", edge - before, nbytes) for edge in edges for before, nbytes in ((1, 2), (900, 5000), (0, 7))]
    wanted += [("seg/a", 5, PART_BYTES), ("seg/a", 3, 2 * PART_BYTES), ("seg/a", 17 << 20, 500), ("seg/a", 1 << 30, 5)]
    expected = [data[offset : offset + nbytes] for _, offset, nbytes in wanted]
    assert [bytes(found) for found in store.ranges(wanted)] == expected
    tier = ReadThrough(store, tmp_path, 1 << 20)
    assert sorted(tier.read_ahead(wanted)) == sorted(wanted)
    assert [bytes(tier.view(*one)) for one in wanted] == expected
    assert [tier.read(*one) for one in wanted] == expected  # asked for again: they were let go
    assert sorted({*tier.read_ahead([*wanted, *wanted])}) == sorted(wanted)  # two entries in one place
    assert [bytes(tier.view(*one)) for one in wanted] == expected
    assert [bytes(store.view(*one)) for one in wanted] == expected


def test_a_listing_does_not_wait_for_what_is_read_ahead(url: str, tmp_path: Path):
    store = S3Store(url)
    store.write("seg/a", b"0123456789")
    tier, waits = ReadThrough(store, tmp_path, 1 << 20), threading.Event()
    try:
        for name in 2 * s3_module._READ_AT_ONCE * ("s3", "s3-ahead"):
            store._threads(name).submit(waits.wait, 60)
        before = time.monotonic()
        with tier.listing(["seg", "index"]):
            assert tier.names("seg") == {"a"} and tier.names("index") == set()
            assert before <= tier.mark("seg") <= time.monotonic()
            assert tier.mark("seg") == tier.mark("index")
        assert time.monotonic() - before < 30
    finally:
        waits.set()


def test_of_a_place_that_fails_nothing_more_is_asked(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, asked = S3Store(url), []

    def fails(self: S3Store, name: str, start: int, end: int) -> memoryview:
        asked.append(start)
        time.sleep(0.05)
        raise StorageError("it does not answer", "wait")

    monkeypatch.setattr(S3Store, "_span", fails)
    tier = ReadThrough(store, tmp_path, 1 << 20)
    wanted = [("seg/a", n * PART_BYTES, 10) for n in range(20 * s3_module._READ_AT_ONCE)]
    tier.read_ahead(wanted)
    for one in wanted:
        with pytest.raises(StorageError, match="it does not answer"):
            tier.view(*one)
    assert len(asked) < len(wanted) / 2
    assert tier._ahead == {}


def test_bytes_that_another_reader_let_go_are_read_again(url: str, tmp_path: Path):
    store = S3Store(url)
    store.write("seg/a", b"0123456789")
    tier = ReadThrough(store, tmp_path, 1 << 20)
    waits = threading.Event()
    for _ in range(s3_module._READ_AT_ONCE):  # all who read are busy: what is asked for is still to be begun
        store._threads("s3-ahead").submit(waits.wait)
    begun = tier.read_ahead([("seg/a", 0, 5), ("seg/a", 5, 5)])
    tier.forget_ahead({one: begun[one] for one in begun if one[1] == 0})
    for future, _ in begun["seg/a", 5, 5]:  # not yet: a neighbour of the same request is still wanted
        assert not future.cancelled()
        assert future.cancel()
    waits.set()
    assert bytes(tier.view("seg/a", 5, 5)) == b"56789"
