"""Each thing that can be wrong, made so for real; the finding names it and the remedy, and nothing is a traceback."""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, git
from layouts import write_official
from redis_server import redis_server

from proteus_pipeline import ModelInterface, ModelVersionManager
from proteus_pipeline.cli.main import main
from proteus_pipeline.registry.lock import Locked, write_lock
from proteus_pipeline.stages import cache_checks, machine_checks, project_checks, service_checks
from proteus_pipeline.stages.diagnosis import guarded
from proteus_pipeline.stages.looking import Check, Here
from proteus_pipeline.stages.new_project import create

PARTS = (machine_checks, project_checks, cache_checks, service_checks)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = create(tmp_path / "mine").root
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def registered(project: Path, tiny, tmp_path: Path) -> Path:
    """A project with a version of a small model."""
    manager = ModelVersionManager(project)
    path = write_official(tiny, tmp_path / "tiny.pt")
    manager.register_version(ModelInterface("tiny", manager, weights=path), "1.0.0")
    return project


@pytest.fixture
def cached(project: Path) -> Path:
    """A project with some embeddings; the cache's folder."""
    return shutil.copytree(ROOT / "tests/embeddings/golden_cache", project / ".proteus/cache")


def looked(name: str) -> list[Check]:
    """What one check finds, in the folder where one stands."""
    (look,) = [part.LOOKS[name] for part in PARTS if name in part.LOOKS]
    return list(guarded(name, look, Here.find()))


def wrong(name: str) -> str:
    """The findings of a check that are not ok, as lines."""
    return "\n".join(f"{c.status} {c.what}; {c.remedy}" for c in looked(name) if c.status != "ok")


def test_a_new_project_lacks_a_remote_and_a_name_only(project: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {c["name"] for c in told["checks"] if c["status"] != "ok"} == {"identity", "remotes"}
    assert all(c["remedy"] for c in told["checks"] if c["status"] != "ok")
    names = {
        "python",
        "packages",
        "cpu",
        "gpu",
        "memory",
        "sizes",
        "project",
        "settings",
        "pipeline",
        "versions",
        "cache",
    }
    assert names <= {c["name"] for c in told["checks"]}
    assert main(["doctor", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["warn", "identity"], ["warn", "remotes"]]


def test_sizes_are_settings_that_a_run_takes(project: Path):
    from proteus_pipeline.config.composition import compose
    from proteus_pipeline.config.overrides import parse

    overrides = [c.what.partition(":")[0] for c in looked("sizes")]
    assert [text.partition("=")[0] for text in overrides] == [
        "runtime.max_memory_gb", "cache.max_bytes", "runtime.tokens_per_batch"
    ]  # fmt: skip
    settings = compose(project, {}, changes=parse(overrides)).settings
    assert settings.runtime.max_memory_gb and settings.cache.max_bytes and settings.runtime.tokens_per_batch


@pytest.mark.parametrize(("gigabytes", "tokens"), [(80, 65536), (24, 32768), (4, 4096), (1, 4096)])
def test_a_gpus_batches_are_whole_tiles(monkeypatch: pytest.MonkeyPatch, gigabytes: int, tokens: int):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=gigabytes * 10**9))
    assert machine_checks._batches(1536).what.startswith(f"runtime.tokens_per_batch={tokens}: ")


def test_a_cgroup_is_what_counts(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("proteus_pipeline.serving.settings.cgroup_limit", lambda: 4 * 10**9)
    (memory,) = looked("memory")
    assert memory.what.endswith("4.0 GB by its cgroup")
    assert looked("sizes")[0].what.startswith("runtime.max_memory_gb=3.0: three quarters of 4.0 GB")


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_checks, "installed", {"torch": "1.13", "dvc": "3.67"}.get)
    found = wrong("packages")
    assert "fail torch 1.13, and torch>=2.4 is needed; pip install 'torch>=2.4'" in found
    assert "fail zarr is missing" in found and "dvc 3" not in found


@pytest.mark.parametrize(
    ("spoil", "name", "said"),
    [
        (lambda p: (p / "conf/config.yaml").write_text("a: [1"), "settings", "fail conf/config.yaml, line"),
        (lambda p: (p / "conf/data/demo.yaml").write_text("fast: x"), "settings", "fast is no setting; did you mean"),
        (lambda p: (p / "params.yaml").write_text("nonsense: 1"), "settings", "fail params.yaml: nonsense is no setting"),
        (lambda p: (p / "params.yaml").write_bytes(b"\xff\xfe"), "settings", "fail params.yaml is no YAML"),
        (lambda p: shutil.rmtree(p / "conf"), "settings", "config.yaml does not exist"),
        (lambda p: (p / "data/demo100.fasta").unlink(), "settings", "demo100.fasta does not exist; set data.fasta=PATH"),
        (lambda p: (p / "conf/model/x.yaml").write_text("name: y"), "settings", "x.yaml"),
        (lambda p: shutil.rmtree(p / ".dvc"), "project", "has no .dvc; git restore .dvc"),
        (lambda p: shutil.rmtree(p / ".git"), "project", "is no git repository"),
        (lambda p: shutil.rmtree(p / ".git/objects"), "project", "fail"),
        (lambda p: git(p, "update-ref", "-d", "HEAD"), "project", "has no commit; git add --all"),
        (lambda p: (p / "dvc.yaml").unlink(), "pipeline", "fail dvc.yaml does not exist; git restore dvc.yaml"),
        (lambda p: (p / "dvc.yaml").write_text("a: ]"), "pipeline", "fail dvc.yaml is no YAML"),
        (lambda p: (p / "dvc.yaml").write_text("stages: 3"), "pipeline", "does not have the stages"),
        (
            lambda p: (p / "dvc.yaml").write_text((p / "dvc.yaml").read_text().replace("- embedding.pooling", "", 1)),
            "pipeline",
            "warn dvc.yaml differs from what this version makes: embed",
        ),
        (lambda p: (p / ".dvc/config").write_text("[core\n"), "remotes", "fail"),
        (
            lambda p: (p / ".dvc/config").write_text("['remote \"s\"']\nurl = s3://b/p\npassword = hunter2\n"),
            "remotes",
            "warn .dvc/config, which git has, holds password of remote s; dvc remote modify --local s password",
        ),
        (
            lambda p: (p / ".dvc/config").write_text("['remote \"s\"']\nurl = s3://b/p\n"),
            "remotes",
            "remote s is on S3 without verify: DVC would take damaged bytes for weights; dvc remote modify s verify true",
        ),
        (lambda p: (p / "models.lock").write_text("[]"), "lock", "fail"),
        (lambda p: (p / "params.yaml").write_text("model: tiny@latest"), "lock", "tiny@latest is used and not in models.lock"),
    ],
)  # fmt: skip
def test_a_broken_project(project: Path, capsys: pytest.CaptureFixture[str], spoil, name: str, said: str):
    spoil(project)
    code = main(["doctor"])
    out, err = capsys.readouterr()
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert any(
        f"{status} {what}".find(said) >= 0 for status, found, what in lines if found == name and status != "ok"
    ), out
    assert code == int("fail" in {status for status, *_ in lines})
    assert "Traceback" not in out + err and "hunter2" not in out + err and len(lines) > 8
    assert {status for status, *_ in lines} <= {"ok", "warn", "fail"}


def test_versions(registered: Path):
    assert [c.status for c in looked("versions")] == ["ok"] and looked("pointers")[0].status == "ok"
    cache = registered / ".dvc/cache/files/md5"
    for path in cache.rglob("*"):
        if path.is_file() and not path.name.endswith(".dir"):
            path.unlink()
    expected = (
        "warn 1 of 1 versions have no weights here: tiny@v1.0.0; proteus model pull tiny@v1.0.0, where they are needed"
    )
    assert wrong("versions") == expected
    git(registered, "tag", "--force", "tiny@v1.0.0", "HEAD")
    assert "fail tag tiny@v1.0.0 was moved or edited" in wrong("versions") or "fail commit" in wrong("versions")


def test_a_lock_that_is_behind_or_of_other_weights(registered: Path):
    (version,) = ModelVersionManager(registered).list_versions("tiny")
    write_lock(registered / "models.lock", {"tiny@latest": Locked.of(version)})
    assert wrong("lock") == ""
    write_lock(registered / "models.lock", {"tiny@latest": Locked("1.0.0", "0" * 32, "0" * 32)})
    assert "tiny@latest is v1.0.0 with other weights than that version has; find out which is right" in wrong("lock")
    write_lock(registered / "models.lock", {"tiny@latest": Locked("0.9.0", "0" * 32, "0" * 32)})
    assert "is v0.9.0, which is not registered here; proteus model pull tiny@v0.9.0" in wrong("lock")


def test_pointers_that_were_edited(registered: Path):
    pointer = git(registered, "show", "tiny@v1.0.0:models/tiny.dvc") + "\n"
    (registered / "models").mkdir(exist_ok=True)
    (registered / "models/tiny.dvc").write_text(pointer)
    assert "warn models/tiny.dvc is not as HEAD has it; git restore models/tiny.dvc, or commit it" in wrong("pointers")
    git(registered, "add", "models")
    git(registered, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "pointer")
    assert wrong("pointers") == ""
    (registered / "models/tiny.dvc").write_text(pointer.replace("md5: ", "md5: 0", 1)[:-1])
    assert "models/tiny.dvc" in wrong("pointers")
    (registered / "models/tiny.dvc").write_text("outs: ]")
    assert "fail models/tiny.dvc is no DVC pointer" in wrong("pointers")


def test_the_caches_files(cached: Path):
    assert [c.status for c in looked("entries")] == ["ok", "ok"] and "in 3 segments" in looked("entries")[0].what
    segment = min((cached / "seg").iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data[:-1])
    assert f"seg/{segment.name} has {len(data) - 1} bytes, not {len(data)}; proteus cache verify --repair" in wrong(
        "entries"
    )
    segment.unlink()
    assert f"fail 1 files are damaged; seg/{segment.name} is gone" in wrong("entries") or "is gone" in wrong("entries")
    segment.write_bytes(data)
    index = min((cached / "index").iterdir())
    index.write_bytes(b"nonsense")
    assert "can't be read" in wrong("entries")


def test_bits_that_flipped_in_the_newest_segment(cached: Path):
    for segment in (cached / "seg").iterdir():
        data = bytearray(segment.read_bytes())
        for place in range(len(data) // 8, len(data) // 2, 64):
            data[place] ^= 255
        segment.write_bytes(data)
    assert wrong("entries").startswith("fail")


def test_a_cache_over_its_budget(cached: Path, project: Path):
    (project / "params.yaml").write_text("cache:\n  max_bytes: 10\n")
    assert "over cache.max_bytes=10" in wrong("entries")


def test_leases_of_the_living_and_the_dead(cached: Path):
    (cached / "leases").mkdir()
    for name in ("1-aa.json", "2-bb.json"):
        (cached / "leases" / name).write_text("{}")
    with (cached / "leases/1-aa.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert wrong("leases").startswith("warn 1 leases are of runs that were killed, 2-bb.json first; ")
        assert len(list((cached / "leases").iterdir())) == 2  # nothing is changed
        (cached / "leases/2-bb.json").unlink()
        assert looked("leases")[0].what == "1 runs use the cache now"


def test_a_cache_where_there_are_no_locks_or_no_room(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        assert "has no file locks" in wrong("cache") and "cache.shared" in wrong("cache")
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(cache_checks, "_MOUNTS", mounts)
    assert "is on a network file system (nfs4)" in wrong("cache")
    monkeypatch.setattr(cache_checks, "_LITTLE", 10**18)
    assert "GB are free for" in wrong("cache")


def test_a_shared_cache_that_is_none(project: Path, tmp_path: Path):
    (project / "params.yaml").write_text(f"cache:\n  shared: {tmp_path}/nowhere\n")
    assert "nowhere does not exist; name the folder of an embedding cache" in wrong("settings")


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("name", "variable", "form", "public"),
    [
        ("mirror", "PROTEUS_FAIR_ESM_URL", "http://me:{secret}@127.0.0.1:{port}/a/{secret}", "http://127.0.0.1:{port}"),
        ("s3", "AWS_ENDPOINT_URL", "http://me:{secret}@127.0.0.1:{port}", "http://127.0.0.1:{port}"),
    ],
)
def test_services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, variable: str, form: str, public: str):
    monkeypatch.chdir(tmp_path)
    assert looked(name) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv(variable, form.format(secret=SECRET, port=port))
        (check,) = looked(name)
        assert check == Check(name, "ok", f"{variable}: {public.format(port=port)} answers")
    (check,) = looked(name)
    assert check.status == "warn" and "does not answer (Connection refused)" in check.what and variable in check.remedy
    for bad in (f"{SECRET}", f"ftp://{SECRET}@x", f"redis://{SECRET}:{SECRET}", "http://", "http://[::1"):
        monkeypatch.setenv(variable, bad)
        (check,) = looked(name)
        assert check.status == "fail" and SECRET not in check.what + check.remedy


def test_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A server with a password: only who has it is answered, and nobody is shown it."""
    monkeypatch.chdir(tmp_path)
    with redis_server(tmp_path / "redis", ["--requirepass", SECRET]) as server:
        url = f"redis://:{SECRET}@127.0.0.1:{server.port}/0"
        monkeypatch.setenv("PROTEUS_REDIS_URL", url)
        (check,) = looked("redis")
        assert check == Check("redis", "ok", f"PROTEUS_REDIS_URL: redis://127.0.0.1:{server.port}/0 answers")
        monkeypatch.setenv("PROTEUS_REDIS_URL", url.replace(SECRET, f"not{SECRET}"))
        assert "does not answer, or refuses us" in wrong("redis") and SECRET not in wrong("redis")
    monkeypatch.setenv("PROTEUS_REDIS_URL", url)
    assert "does not answer, or refuses us" in wrong("redis") and SECRET not in wrong("redis")
    monkeypatch.setenv("PROTEUS_REDIS_URL", f"http://:{SECRET}@127.0.0.1")
    assert wrong("redis").startswith("fail PROTEUS_REDIS_URL: the URL of Redis") and SECRET not in wrong("redis")


def test_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROTEUS_S3_URL", f"s3://me:{SECRET}@bucket/prefix")
    assert looked("s3")[0].what == "PROTEUS_S3_URL: s3://bucket/prefix"
    monkeypatch.setenv("PROTEUS_S3_URL", "https://bucket")
    assert wrong("s3") == "fail PROTEUS_S3_URL is no URL of a bucket; write it as s3://BUCKET/PREFIX"


def test_outside_of_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    assert "is in no project; cd to one, or make one: proteus init DIR" in capsys.readouterr().out


def test_what_breaks_a_check_is_its_finding():
    def breaking(_: Here):
        yield Check("x", "ok", "began")
        raise RuntimeError("two\nlines")

    began, broke = guarded("x", breaking, Here(Path()))
    assert began.what == "began"
    assert broke == Check("x", "fail", "could not be looked at: RuntimeError: two lines", "mend this first")
