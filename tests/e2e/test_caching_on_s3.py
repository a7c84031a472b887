"""``proteus cache`` over a real S3 server, by every way to name a bucket; and what is said of one that can't be used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clone import Clone, said
from daemons import free_port
from s3 import BUCKET, S3Server

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("caching_on_s3")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    made = Clone.make(tmp_path_factory.mktemp("e2e"), weights, every=10)
    made.run("proteus", "embed", "data/demo100.fasta")
    shutil.copytree(made.root / ".proteus/cache", made.root.parent / "cache")
    return made


@pytest.fixture
def url(clone: Clone, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix, in a clone whose cache has ten embeddings."""
    monkeypatch.chdir(clone.root)
    yield s3.url(f"caching-{os.environ.get('PYTEST_XDIST_WORKER', 'one')}/{tmp_path.name}")
    shutil.rmtree(clone.root / ".proteus/cache", ignore_errors=True)
    shutil.copytree(clone.root.parent / "cache", clone.root / ".proteus/cache")
    clone.git("checkout", "--quiet", ".")


def cache(*args: str, code: int = 0) -> Any:
    return json.loads(said("cache", *args, "--json", code=code)[0])


def empty(clone: Clone) -> None:
    shutil.rmtree(clone.root / ".proteus/cache")


def by_name(url: str, _: Clone, __: pytest.MonkeyPatch) -> list[str]:
    return [url]


def by_environment(url: str, _: Clone, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PROTEUS_S3_URL", url)
    return []


def by_setting(url: str, _: Clone, __: pytest.MonkeyPatch) -> list[str]:
    return [f"cache.shared={url}"]


def by_dvc_remote(url: str, clone: Clone, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Its endpoint is the remote's own; only the keys are AWS's chain's."""
    clone.run("dvc", "remote", "add", "--default", "--force", "group", url)
    clone.run("dvc", "remote", "modify", "group", "endpointurl", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    return []


@pytest.mark.parametrize("named", [by_name, by_environment, by_setting, by_dvc_remote])
def test_push_and_pull(named: Any, url: str, clone: Clone, monkeypatch: pytest.MonkeyPatch):
    words = named(url, clone, monkeypatch)
    place = f"{url}/embeddings" if named is by_dvc_remote else url
    assert "10 entries in 1 segments" in said("cache", "push", *words, "--dry-run")[0]
    output = said("cache", "push", *words)[0]
    assert output.startswith("10 entries in 1 segments, ") and output.endswith(f" pushed to {place}; 0 were there\n")
    assert cache("push", *words)["there"] == 1
    empty(clone)
    assert cache("stats")["entries"] == 0
    output = said("cache", "pull", *words)[0]
    assert output.endswith(f" pulled from {place}; 0 were there\n")
    assert cache("stats")["entries"] == 10
    assert cache("verify")["findings"] == []
    assert cache("plan")["hits"] == 10


def test_a_shared_cache_in_a_bucket_beneath_ones_own(url: str, clone: Clone, s3: S3Server):
    shared = f"cache.shared={url}"
    output = said("embed", "data/demo100.fasta", shared, "cache.write_back=true", "embedding.layer=3")[0]
    assert "10 sequences: 0 hits, 0 derived, 10 computed" in output
    empty(clone)
    planned = cache("plan", shared, "embedding.layer=3")
    assert (planned["hits"], planned["misses"]) == (10, 0)
    assert cache("plan", shared)["misses"] == 10  # layer 6 was never shared
    stats = cache("stats", shared)
    assert (stats["entries"], stats["shared"]["entries"], stats["shared"]["place"]) == (0, 10, url)
    assert f"  beneath it {url}: 10 entries in 1 segments, " in said("cache", "stats", shared)[0]
    assert "10 of 10 equal bit for bit" in said("cache", "audit", shared, "embedding.layer=3")[0]


def test_a_clusters_workers_write_back_to_the_bucket(url: str):
    shared = f"cache.shared={url}"
    cluster = ("engine=dask", "cluster.workers=1", shared, "cache.write_back=true", "embedding.layer=1")
    assert "10 computed" in (told := said("embed", "data/demo100.fasta", *cluster)[0]) and "on 1 worker" in told
    assert cache("stats", shared)["shared"]["entries"] == 10


def test_repair_takes_what_is_damaged_from_a_bucket(url: str, clone: Clone):
    said("cache", "push", url)
    (segment,) = (clone.root / ".proteus/cache/seg").iterdir()
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    done = cache("verify", "--repair", "--from", url)
    assert len(done["findings"]) == 1
    assert (done["pulled"]["entries"], done["computed"]) == (10, 0)
    assert cache("verify")["findings"] == []
    assert cache("plan")["hits"] == 10
    error = said("cache", "verify", "--repair", "--from", f"{url}/nothing", code=1)[1]
    assert error.startswith(f"proteus: {url}/nothing is no embedding cache; it has none of ")


VERBS = (("push",), ("pull",), ("verify", "--repair", "--from"))


def refused(verb: tuple[str, ...], place: str, code: int = 1) -> str:
    """The one line that a verb says of a place that it can't use."""
    output, error = said("cache", *verb, place, code=code)
    assert error.startswith("proteus: ") and error.count("\n") == 1, error
    assert "; " in error and "secret" not in error.lower().replace("aws_secret_access_key", "")
    assert "pulled" not in output and "pushed" not in output
    return error


@pytest.mark.parametrize("verb", VERBS)
def test_a_url_that_is_none(verb: tuple[str, ...], url: str):
    for wrong, why in (
        ("gs://bucket/x", "gs:// is no place for embeddings; use a folder's path, or s3://BUCKET/PREFIX"),
        ("s3://KEY:SECRET@bucket/x", "an S3 URL holds no credentials"),
        ("s3://", "is no S3 URL; write s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "has a prefix that can't be used"),
        ("file:///tmp/x", "is a file URL; write the path alone"),
    ):
        assert why in refused(verb, wrong, code=2)


@pytest.mark.parametrize("verb", VERBS)
def test_a_bucket_that_is_not_there(verb: tuple[str, ...], url: str):
    assert "there is no such bucket at http://127.0.0.1" in refused(
        verb, url.replace(f"//{BUCKET}/", "//nosuchbucket/")
    )


@pytest.mark.parametrize("verb", VERBS)
def test_credentials_that_are_wrong_or_none(verb: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    assert "refuses it (SignatureDoesNotMatch); check the credentials (AWS_ACCESS_KEY_ID" in refused(verb, url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "refuses it (InvalidAccessKeyId); check the credentials" in refused(verb, url)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "there are no AWS credentials; set AWS_ACCESS_KEY_ID" in refused(verb, url)


@pytest.mark.parametrize("verb", VERBS)
def test_a_server_that_is_not_there(verb: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert "nobody answers at http://127.0.0.1" in refused(verb, url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "its endpoint is no URL; set AWS_ENDPOINT_URL=" in refused(verb, url)


def test_the_environments_url_is_blamed_by_its_name(url: str, monkeypatch: pytest.MonkeyPatch):
    for wrong in ("https://key:hidden@example.org", "s3://key:hidden@bucket", "s3://", "/a/folder"):
        monkeypatch.setenv("PROTEUS_S3_URL", wrong)
        for verb in ("push", "pull"):
            error = said("cache", verb, code=2)[1]
            assert error.startswith("proteus: PROTEUS_S3_URL: ") and error.count("\n") == 1
            assert "hidden" not in error


def test_no_place_at_all(url: str):
    for verb in ("push", "pull"):
        error = said("cache", verb, code=1)[1]
        assert error == (
            "proteus: no other cache is named; name a folder or s3://BUCKET/PREFIX, or set PROTEUS_S3_URL, or cache.shared\n"
        )


def test_a_run_does_without_a_shared_cache_that_can_not_be_asked(
    url: str, clone: Clone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What can be computed is; one warning says what is left out. Where nothing but a count is asked, it says so too."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    shared = f"cache.shared={url}"
    counts = json.loads(
        said("embed", "data/demo100.fasta", shared, "cache.write_back=true", "embedding.layer=2", "--json")[0]
    )
    assert (counts["hits"], counts["computed"]) == (0, 10)
    told = [r.getMessage() for r in caplog.records]
    assert [line.partition(":")[0] for line in told] == [
        "the shared cache is left out",
        "new embeddings were kept here alone",
    ]
    assert told[1].endswith(f"run: proteus cache push {url}")
    stats = cache("stats", shared)
    assert (stats["entries"], stats["shared"]) == (20, {"place": url, "entries": None, "segments": None, "bytes": None})
    assert f"  beneath it {url}: can not be asked now\n" in said("cache", "stats", shared)[0]
