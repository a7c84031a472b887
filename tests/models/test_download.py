from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Served, serving

from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.models import download as module
from proteus_pipeline.models.download import download, public_url

DATA = random.Random(0).randbytes(1_000_000)
OTHER = random.Random(1).randbytes(1_000_000)
CUT = 600_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(module, "_BACKOFF_S", 0.005)
    with serving() as served:
        served.files["m.pt"] = DATA
        yield served


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut_once(server: Served, target: Path) -> int:
    """Leave what a run leaves whose only attempt was cut, and return how many bytes that is."""
    server.faults.append(("cut", CUT))
    with pytest.raises(StorageError, match="broke off"):
        download(server.url("m.pt"), target, attempts=1)
    return target.with_name("m.pt.part").stat().st_size


def test_a_file_arrives_whole(server: Served, tmp_path: Path):
    seen: list[tuple[int, int | None]] = []
    target = tmp_path / "new" / "m.pt"
    digest = download(server.url("m.pt"), target, sha256=sha256(DATA).upper(), progress=lambda *at: seen.append(at))
    assert digest == sha256(DATA)
    assert target.read_bytes() == DATA
    assert names(target.parent) == ["m.pt"]
    assert seen[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert server.requests[0]["accept-encoding"] == "identity"


def test_a_cut_transfer_resumes_where_it_stopped(server: Served, tmp_path: Path):
    server.faults.append(("cut", CUT))
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert (tmp_path / "m.pt").read_bytes() == DATA
    first, second = server.requests
    assert "range" not in first
    kept = int(second["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < kept <= CUT
    assert second["if-range"] == '"one"'
    assert server.sent == [CUT, len(DATA) - kept]


def test_the_next_run_resumes_too(server: Served, tmp_path: Path):
    kept = cut_once(server, tmp_path / "m.pt")
    assert 0 < kept <= CUT
    assert names(tmp_path) == ["m.pt.part", "m.pt.part.json"]
    assert download(server.url("m.pt"), tmp_path / "m.pt", sha256=sha256(DATA)) == sha256(DATA)
    assert server.requests[-1]["range"] == f"bytes={kept}-"
    assert names(tmp_path) == ["m.pt"]


def test_a_transfer_that_stays_truncated_says_how_much_there_is(server: Served, tmp_path: Path):
    server.faults += [("cut", CUT), ("cut", 0), ("cut", 0)]
    with pytest.raises(StorageError) as caught:
        download(server.url("m.pt"), tmp_path / "m.pt")
    kept = (tmp_path / "m.pt.part").stat().st_size
    assert f"broke off after {kept:,} of 1,000,000 bytes" in str(caught.value)
    assert "run it again to resume" in caught.value.remedy
    assert type(caught.value) is StorageError
    assert len(server.requests) == 3
    assert not (tmp_path / "m.pt").exists()


def test_an_interrupt_keeps_what_arrived(server: Served, tmp_path: Path):
    def stop(done: int, total: int | None) -> None:
        if done > CUT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url("m.pt"), tmp_path / "m.pt", progress=stop)
    kept = (tmp_path / "m.pt.part").stat().st_size
    assert kept > CUT
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert server.requests[-1]["range"] == f"bytes={kept}-"


def test_without_a_validator_it_starts_over(server: Served, tmp_path: Path):
    server.etag = None
    server.faults.append(("cut", CUT))
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert [("range" in request) for request in server.requests] == [False, False]


def test_a_weak_etag_is_no_validator(server: Served, tmp_path: Path):
    server.etag = 'W/"one"'
    server.faults.append(("cut", CUT))
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert "range" not in server.requests[-1]


def test_without_an_etag_the_date_is_one(server: Served, tmp_path: Path):
    server.etag, server.modified = None, "Mon, 01 Jan 2024 00:00:00 GMT"
    kept = cut_once(server, tmp_path / "m.pt")
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert server.requests[-1]["if-range"] == server.modified
    assert server.sent[-1] == len(DATA) - kept


def test_a_server_that_ignores_ranges_sends_it_again(server: Served, tmp_path: Path):
    server.ranges = False
    server.faults.append(("cut", CUT))
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert "range" in server.requests[1]
    assert server.sent == [CUT, len(DATA)]


def test_a_file_that_changed_between_runs_is_not_spliced(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    server.files["m.pt"], server.etag = OTHER, '"two"'
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(OTHER)
    assert server.requests[-1]["if-range"] == '"one"'
    assert (tmp_path / "m.pt").read_bytes() == OTHER


def test_a_partial_answer_of_another_file_is_not_spliced(server: Served, tmp_path: Path):
    # A server that honours Range and not If-Range.
    cut_once(server, tmp_path / "m.pt")
    server.files["m.pt"] = OTHER
    server.faults.append(("headers", {"ETag": '"two"'}))
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(OTHER)
    assert [("range" in request) for request in server.requests] == [False, True, False]


def test_a_partial_answer_from_elsewhere_in_the_file_is_not_spliced(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    server.faults.append(("headers", {"Content-Range": "bytes 1-999999/1000000"}))
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert "range" not in server.requests[-1]


def test_a_range_beyond_the_end_starts_over(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    server.files["m.pt"] = short = DATA[:1000]
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(short)
    assert (tmp_path / "m.pt").read_bytes() == short
    assert "range" not in server.requests[-1]


def test_a_description_never_outlives_its_bytes(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    # The next answer has no validator, and is cut as well: nothing may take its bytes for the first file's.
    server.files["m.pt"], server.etag = OTHER, None
    cut_once(server, tmp_path / "m.pt")
    server.files["m.pt"], server.etag = DATA, '"one"'
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)


def test_the_partial_file_of_another_address_is_not_used(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    server.files["mirror/m.pt"] = OTHER
    assert download(server.url("mirror/m.pt"), tmp_path / "m.pt") == sha256(OTHER)
    assert "range" not in server.requests[-1]


def test_a_partial_file_whose_description_is_damaged_is_not_used(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    (tmp_path / "m.pt.part.json").write_bytes(b'{"url": \xff')
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert "range" not in server.requests[-1]


def test_a_partial_file_that_is_whole_needs_no_request(server: Served, tmp_path: Path):
    cut_once(server, tmp_path / "m.pt")
    (tmp_path / "m.pt.part").write_bytes(DATA)
    before = len(server.requests)
    assert download(server.url("m.pt"), tmp_path / "m.pt", sha256=sha256(DATA)) == sha256(DATA)
    assert len(server.requests) == before
    assert names(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final_and_named(server: Served, tmp_path: Path, status: int):
    server.faults.append(("status", status))
    with pytest.raises(StorageError) as caught:
        download(server.url("m.pt?token=secret", "me:password@"), tmp_path / "m.pt")
    assert f"http://127.0.0.1:{server.port}/m.pt answered {status}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "password" not in str(caught.value)
    assert "proteus model register" in caught.value.remedy
    assert len(server.requests) == 1
    assert "authorization" in server.requests[0]
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(server: Served, tmp_path: Path, status: int):
    server.faults += [("status", status), ("status", status)]
    assert download(server.url("m.pt"), tmp_path / "m.pt") == sha256(DATA)
    assert len(server.requests) == 3


def test_a_server_that_stays_in_trouble_is_an_error(server: Served, tmp_path: Path):
    server.faults += [("status", 500)] * 3
    with pytest.raises(StorageError, match=r"m\.pt answered 500"):
        download(server.url("m.pt"), tmp_path / "m.pt")
    assert len(server.requests) == 3
    assert names(tmp_path) == []


def test_another_digest_is_refused_and_not_kept(server: Served, tmp_path: Path):
    (tmp_path / "m.pt").write_bytes(b"old")
    with pytest.raises(IntegrityError) as caught:
        download(server.url("m.pt"), tmp_path / "m.pt", sha256=sha256(OTHER))
    assert sha256(OTHER) in str(caught.value)
    assert sha256(DATA) in str(caught.value)
    assert (tmp_path / "m.pt").read_bytes() == b"old"
    assert names(tmp_path) == ["m.pt"]


def test_a_chunked_answer_has_no_length_and_is_checked_all_the_same(server: Served, tmp_path: Path):
    server.chunked = True
    seen: list[int | None] = []
    assert download(server.url("m.pt"), tmp_path / "a", progress=lambda _, total: seen.append(total)) == sha256(DATA)
    assert set(seen) == {None}
    server.faults.append(("cut", CUT))
    with pytest.raises(StorageError, match="of an unknown number of bytes: the connection was closed"):
        download(server.url("m.pt"), tmp_path / "b", attempts=1)
    assert download(server.url("m.pt"), tmp_path / "b") == sha256(DATA)


def test_an_answer_whose_end_cannot_be_told_needs_a_digest(server: Served, tmp_path: Path):
    server.length = False
    with pytest.raises(StorageError, match="does not say how long it is"):
        download(server.url("m.pt"), tmp_path / "m.pt")
    assert download(server.url("m.pt"), tmp_path / "a", sha256=sha256(DATA)) == sha256(DATA)
    server.faults.append(("cut", CUT))
    with pytest.raises(IntegrityError, match=sha256(DATA[:CUT])):
        download(server.url("m.pt"), tmp_path / "b", sha256=sha256(DATA))
    assert len(server.requests) == 3


def test_a_compressed_answer_is_refused(server: Served, tmp_path: Path):
    server.faults.append(("headers", {"Content-Encoding": "gzip"}))
    with pytest.raises(StorageError, match=r"came compressed \(gzip\)"):
        download(server.url("m.pt"), tmp_path / "m.pt")


def test_a_refused_connection_names_the_host_and_the_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Bound and not listening: the port refuses, and nobody else can take it.
        port = closed.getsockname()[1]
        with pytest.raises(StorageError) as caught:
            download(f"http://me:secret@127.0.0.1:{port}/m.pt?token=secret", tmp_path / "m.pt")
    assert str(caught.value) == (
        f"cannot reach 127.0.0.1:{port} for http://127.0.0.1:{port}/m.pt: connection refused; check the network, "
        "or register a local file with `proteus model register NAME --version V --weights PATH`"
    )
    assert names(tmp_path) == []


def test_a_host_that_has_no_address_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(StorageError, match=r"cannot reach nowhere\.invalid for http://nowhere\.invalid/m\.pt: \w+"):
        download("http://nowhere.invalid/m.pt", tmp_path / "m.pt")


def test_a_silent_server_times_out(server: Served, tmp_path: Path):
    server.faults += [("stall", 5)] * 2
    with pytest.raises(StorageError, match=r"no answer within 0\.2 s"):
        download(server.url("m.pt"), tmp_path / "m.pt", timeout_s=0.2, attempts=2)
    assert len(server.requests) == 2


def test_an_existing_file_with_the_right_digest_makes_no_request(server: Served, tmp_path: Path):
    (tmp_path / "m.pt").write_bytes(DATA)
    assert download(server.url("m.pt"), tmp_path / "m.pt", sha256=sha256(DATA)) == sha256(DATA)
    assert server.requests == []


def test_an_existing_file_with_another_digest_is_replaced(server: Served, tmp_path: Path):
    (tmp_path / "m.pt").write_bytes(OTHER)
    assert download(server.url("m.pt"), tmp_path / "m.pt", sha256=sha256(DATA)) == sha256(DATA)
    assert (tmp_path / "m.pt").read_bytes() == DATA


def test_two_downloads_of_one_file_do_not_mix(server: Served, tmp_path: Path):
    started, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        started.set()
        go_on.wait(10)

    first = threading.Thread(target=download, args=(server.url("m.pt"), tmp_path / "m.pt"), kwargs={"progress": hold})
    first.start()
    assert started.wait(10)
    try:
        with pytest.raises(StorageError, match=r"another process is downloading m\.pt"):
            download(server.url("m.pt"), tmp_path / "m.pt")
    finally:
        go_on.set()
        first.join()
    assert (tmp_path / "m.pt").read_bytes() == DATA


def test_a_full_disk_is_named(server: Served, tmp_path: Path):
    (tmp_path / "m.pt.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*m\.pt\.part: no space left on device; free space"):
        download(server.url("m.pt"), tmp_path / "m.pt")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a", "m.pt", "http:///a", "https://me:secret@host:99999/a?token=secret"]
)
def test_only_http_is_a_url_here(tmp_path: Path, url: str):
    with pytest.raises(ConfigError, match="no URL to download from") as caught:
        download(url, tmp_path / "m.pt")
    assert "secret" not in str(caught.value)


def test_what_is_shown_of_a_url():
    assert public_url("https://u:p@[::1]:8443/a/b.pt?X-Amz-Signature=s#f") == "https://[::1]:8443/a/b.pt"
