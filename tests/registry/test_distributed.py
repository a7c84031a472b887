"""A group's registry, on a real S3 server and a real git remote: what one registers is everybody's, or nobody's."""

from __future__ import annotations

import logging
import pickle
import socket
from pathlib import Path

import pytest
from conftest import git, make_checkpoint
from groups import Group
from registering import Given, flip, objects
from s3 import BUCKET

from proteus_pipeline.errors import (
    ConfigError,
    IntegrityError,
    StorageError,
    VersionConflictError,
    VersionNotFoundError,
)
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry import shared
from proteus_pipeline.registry.distributed import DistributedVersionManager
from proteus_pipeline.registry.versions import ModelVersionManager


@pytest.fixture(scope="module")
def other() -> Checkpoint:
    return make_checkpoint(seed=1)


def test_a_version_that_one_registers_is_used_by_another_of_another_home(
    group: Group, tmp_path: Path, tiny: Checkpoint, other: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    first = group.clone(tmp_path / "first")
    first.register_version(Given("lab/m", tiny), "1.0.0", {"data": "UR50D"}, reason="first")
    first.register_version(Given("lab/m", other), "1.1.0", dependencies=["lab/m@1.0.0"])
    monkeypatch.setenv("HOME", str(tmp_path))
    second = group.clone(tmp_path / "second")
    version = second.get_version("lab/m", "1.0.0")
    assert version.record
    assert (version.record.metadata, version.record.reason) == ({"data": "UR50D"}, "first")
    assert objects(second.root) == {}, "weights come when they are used"
    assert version.checkpoint.model_digest == tiny.model_digest
    assert objects(second.root).keys() < objects(first.root).keys()
    assert [v.reference for v in second.dependents("lab/m@1.0.0")] == ["lab/m@v1.1.0"]
    # And back: what happens to a version there is so here.
    second.rollback("lab/m", "1.0.0", reason="1.1.0 is worse")
    assert first.resolve("lab/m").version == "1.0.0"
    second.delete_version("lab/m", "1.1.0")
    with pytest.raises(VersionNotFoundError, match="it was deleted"):
        first.get_version("lab/m", "1.1.0")
    first.restore_version("lab/m", "1.1.0")
    assert [v.version for v in second.list_versions("lab/m")] == ["1.0.0", "1.1.0"]
    told = [[(e.kind, e.sequence) for e in manager.history("lab/m").events] for manager in (first, second)]
    assert told[0] == told[1]
    assert [kind for kind, _ in told[0]] == ["registered", "registered", "made current", "deleted", "restored"]
    assert not [tag for tag in group.published() if "!" in tag], "gto counts the restored version as live"
    assert first.verify() == []
    assert {finding.kind for finding in second.verify()} <= {"missing"}, "what it has not used yet"


def test_whoever_is_not_the_first_is_told_and_keeps_nothing_of_it(
    group: Group, tmp_path: Path, tiny: Checkpoint, other: Checkpoint
):
    winner, loser = group.clone(tmp_path / "winner"), group.clone(tmp_path / "loser")
    send = loser.store_weights

    def store_while_another_registers(name: str, checkpoint: Checkpoint):
        stored = send(name, checkpoint)
        winner.register_version(Given("m", tiny), "1.0.0")
        return stored

    loser.store_weights = store_while_another_registers  # type: ignore[method-assign]
    with pytest.raises(VersionConflictError, match="exists with other weights") as caught:
        loser.register_version(Given("m", other), "1.0.0")
    assert tiny.model_digest in caught.value.what
    assert other.model_digest in caught.value.what
    for manager in (winner, loser):
        assert git(manager.root, "rev-parse", "m@v1.0.0") == group.published()["m@v1.0.0"]
        assert manager.get_version("m", "1.0.0").checkpoint.model_digest == tiny.model_digest
        assert manager.verify() == []


def test_a_bump_that_another_was_faster_with_takes_the_next_number(
    group: Group, tmp_path: Path, tiny: Checkpoint, other: Checkpoint
):
    one, two = group.clone(tmp_path / "one"), group.clone(tmp_path / "two")
    one.register_version(Given("m", tiny), "1.0.0")
    send = two.store_weights

    def store_while_another_registers(name: str, checkpoint: Checkpoint):
        two.store_weights = send  # type: ignore[method-assign]
        one.register_version(Given("m", make_checkpoint(seed=2)), bump="major")
        return send(name, checkpoint)

    two.store_weights = store_while_another_registers  # type: ignore[method-assign]
    assert two.register_version(Given("m", other), bump="major").version == "3.0.0"
    assert [e.sequence for e in one.history("m").events] == [1, 2, 3]


def test_an_event_that_came_first_is_thought_of(group: Group, tmp_path: Path, tiny: Checkpoint, other: Checkpoint):
    """One makes current what another deletes at that moment: somebody is told, and both see the same."""
    one, two = group.clone(tmp_path / "one"), group.clone(tmp_path / "two")
    one.register_version(Given("m", tiny), "1.0.0")
    one.register_version(Given("m", other), "1.1.0")
    assert two.get_version("m", "1.0.0").checkpoint.model_digest == tiny.model_digest
    offer, turns = two._git.offer, []

    def offer_after_another(tags: dict[str, str]) -> bool:
        if not turns:
            turns.append(one.delete_version("m", "1.0.0"))
        return offer(tags)

    two._git.offer = offer_after_another  # type: ignore[method-assign]
    with pytest.raises(VersionNotFoundError, match="it was deleted"):
        two.rollback("m", "1.0.0")
    assert one.resolve("m").version == two.resolve("m").version == "1.1.0"
    assert [e.kind for e in two.history("m").events] == ["registered", "registered", "deleted"]


def test_a_tag_is_nobodys_before_its_weights_are_on_s3(
    group: Group, tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    manager = group.clone(tmp_path / "clone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "no key of anybody")
    with pytest.raises(StorageError) as caught:
        manager.register_version(Given("m", tiny), "1.0.0")
    assert "\n" not in str(caught.value)
    assert "no key of anybody" not in str(caught.value)
    assert group.published() == {}
    assert manager.list_versions("m") == []
    assert git(manager.root, "for-each-ref", "refs/tags", "refs/proteus") == ""


def test_a_damaged_object_of_the_right_size_is_refused(
    group: Group, tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    group.clone(tmp_path / "first").register_version(Given("m", tiny), "1.0.0")
    largest, size = max(group.objects().items(), key=lambda item: item[1])
    key = f"{group.prefix}/files/md5/{largest[:2]}/{largest[2:]}"
    client = group.s3.client()
    data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[-5] ^= 0x10
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    assert group.objects()[largest] == size
    second = group.clone(tmp_path / "second")
    with pytest.raises(IntegrityError, match=f"sent {largest} damaged"):
        _ = second.get_version("m", "1.0.0").checkpoint
    assert largest not in {path.replace("/", "") for path in objects(second.root)}
    # Plain DVC, too: it checks since the remote says verify.
    from dvc.exceptions import CheckoutError
    from dvc.repo import Repo

    tag = second.get_version("m", "1.0.0")
    git(second.root, "checkout", "--quiet", tag.commit)
    with Repo(str(second.root)) as repo, pytest.raises(CheckoutError):
        repo.pull(remote=second.bucket.name)
    assert largest not in {path.replace("/", "") for path in objects(second.root)}


def test_without_the_remote_reading_goes_by_what_is_here_and_writing_says_so(
    group: Group, tmp_path: Path, tiny: Checkpoint, other: Checkpoint, caplog: pytest.LogCaptureFixture
):
    manager = group.clone(tmp_path / "clone")
    manager.register_version(Given("m", tiny), "1.0.0")
    manager.register_version(Given("m", other), "1.1.0")
    group.hub.rename(tmp_path / "gone")
    for _ in range(3):
        assert [v.version for v in manager.list_versions("m")] == ["1.0.0", "1.1.0"]
        assert manager.get_version("m", "1.0.0").checkpoint.model_digest == tiny.model_digest
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "out of date" in r.message] == [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING
    ]
    assert len(caplog.records) == 1
    refs = git(manager.root, "for-each-ref")
    for change in (
        lambda: manager.register_version(Given("m", other), "2.0.0"),
        lambda: manager.rollback("m", "1.0.0"),
        lambda: manager.delete_version("m", "1.0.0"),
        lambda: manager.restore_version("m", "1.0.0"),
        lambda: manager.prune("m", 1),
    ):
        with pytest.raises(StorageError, match=r"the git remote .* can't be reached"):
            change()
    assert git(manager.root, "for-each-ref") == refs


def test_what_was_registered_without_the_group_is_given_to_it(
    group: Group, tmp_path: Path, tiny: Checkpoint, other: Checkpoint
):
    group.clone(tmp_path / "clone")  # a home is made
    alone = ModelVersionManager(tmp_path / "clone")
    alone.register_version(Given("m", tiny), "1.0.0")
    alone.register_version(Given("n", tiny), "1.0.0")
    manager, second = group.clone(tmp_path / "clone"), group.clone(tmp_path / "second")
    assert group.published() == {}
    manager.register_version(Given("m", tiny), "1.0.0")  # the same again
    assert second.get_version("m", "1.0.0").checkpoint.model_digest == tiny.model_digest
    second.register_version(Given("n", other), "1.0.0")
    with pytest.raises(VersionConflictError, match=r"n@v1.0.0 on .* is another one"):
        manager.register_version(Given("n", tiny), "1.0.0")
    assert git(second.root, "rev-parse", "n@v1.0.0") == group.published()["n@v1.0.0"]


def test_a_tag_of_the_remote_that_is_no_version_is_left_there(group: Group, tmp_path: Path, tiny: Checkpoint):
    first = group.clone(tmp_path / "first")
    first.register_version(Given("m", tiny), "1.0.0")
    for name in ("release", "m@v1", "x@v1.0.0!!", "-u@v1.0.0"):
        git(group.hub, "update-ref", f"refs/tags/{name}", git(group.hub, "rev-parse", "m@v1.0.0^{commit}"))
    second = group.clone(tmp_path / "second")
    assert list(second.list_models()) == ["m"]
    assert git(second.root, "tag").split() == ["m@v1.0.0"]


def test_a_clone_that_was_damaged_is_mended_from_s3(group: Group, tmp_path: Path, tiny: Checkpoint):
    manager = group.clone(tmp_path / "clone")
    version = manager.register_version(Given("m", tiny), "1.0.0")
    flip(next(iter(version.files.values())))
    assert manager.verify(repair=True)[0].repaired
    assert manager.get_version("m", "1.0.0").fresh().model_digest == tiny.model_digest


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"storage_backend": "gcs"}, ConfigError, "storage_backend 'gcs' is none"),
        ({"cache_backend": "memcached"}, ConfigError, "cache_backend 'memcached' is none"),
        ({"s3_url": "s3://key:secret@bucket/x"}, ConfigError, "is not s3://BUCKET/PREFIX"),
        ({"s3_url": "https://secret.example.org/x"}, ConfigError, "is not s3://BUCKET/PREFIX"),
        ({"git_remote": "--upload-pack=secret"}, ConfigError, "neither one of .* nor an address"),
        ({"git_remote": "ext::sh -c secret"}, ConfigError, "neither one of .* nor an address"),
        ({"git_remote": "nowhere"}, ConfigError, "neither one of .* nor an address"),
        ({"redis_url": "http://secret"}, ConfigError, "."),
        ({"s3_url": None}, StorageError, "no S3 bucket is named"),
        ({"git_remote": None}, StorageError, "no git remote is named"),
    ],
)
def test_what_is_named_badly_is_one_line_and_makes_no_home(
    tmp_path: Path, options: dict[str, str | None], error: type[Exception], words: str
):
    (tmp_path / "hub").mkdir()
    given = {"s3_url": "s3://bucket/x", "git_remote": str(tmp_path / "hub"), "redis_url": "redis://localhost"} | options
    with pytest.raises(error, match=words) as caught:
        DistributedVersionManager(storage_path=tmp_path / "home", **given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "home").exists()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_password_in_the_remotes_address_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny: Checkpoint
):
    manager = DistributedVersionManager(
        cache_backend=None,
        storage_path=tmp_path / "home",
        s3_url="s3://bucket/x",
        git_remote="http://user:hunter2@127.0.0.1:9/x.git",
    )
    assert manager.list_models() == {}
    with pytest.raises(StorageError, match="can't be reached") as caught:
        manager.register_version(Given("m", tiny), "1.0.0")
    assert "hunter2" not in caplog.text + str(caught.value)


def test_the_buckets_remote_is_configured_once_and_verifies(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    git(repository, "remote", "add", "origin", str(tmp_path / "hub"))
    (repository / ".dvc" / "config").write_text(
        "[core]\n    remote = lab\n['remote \"lab\"']\n    url = s3://lab/models\n"
    )
    local = repository / ".dvc" / "config.local"
    local.write_text("# mine\n['remote \"lab\"']\n    secret_access_key = hidden\n")
    local.chmod(0o600)
    first = DistributedVersionManager(cache_backend=None, storage_path=repository)
    assert first.bucket.name == "lab"
    assert local.read_text().splitlines()[0] == "# mine"
    assert {"secret_access_key = hidden", "verify = true"} <= {line.strip() for line in local.read_text().splitlines()}
    assert local.stat().st_mode & 0o777 == 0o600
    written = local.read_bytes()
    DistributedVersionManager(cache_backend=None, storage_path=repository, s3_url="s3://lab/models/")
    assert local.read_bytes() == written
    monkeypatch.setenv("PROTEUS_S3_URL", "s3://another/place")
    another = DistributedVersionManager(cache_backend=None, storage_path=repository)
    assert another.bucket.url == "s3://another/place"
    assert DistributedVersionManager(cache_backend=None, storage_path=repository).bucket.name == another.bucket.name


def test_a_remote_that_refuses_is_quoted_and_nothing_is_made(group: Group, tmp_path: Path, tiny: Checkpoint):
    hook = group.hub / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    manager = group.clone(tmp_path / "clone")
    with pytest.raises(StorageError, match="pre-receive hook declined") as caught:
        manager.register_version(Given("m", tiny), "1.0.0")
    assert "\n" not in str(caught.value)
    assert git(manager.root, "for-each-ref", "refs/tags", "refs/proteus") == ""
    hook.unlink()
    assert manager.register_version(Given("m", tiny), "1.0.0").current


def test_a_remote_that_hangs_ends_in_an_error(
    tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(shared, "ASK_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        manager = DistributedVersionManager(
            cache_backend=None,
            storage_path=tmp_path / "home",
            s3_url="s3://bucket/x",
            git_remote=f"git://127.0.0.1:{silent.getsockname()[1]}/x",
        )
        assert manager.list_models() == {}
        assert "which may be out of date" in caplog.text
        with pytest.raises(StorageError, match=r"can't be reached \(git ls-remote took over 1 s\)"):
            manager.register_version(Given("m", tiny), "1.0.0")
