"""``proteus monitor``: what it shows, in which ways, and what it says of what is wrong."""

from __future__ import annotations

import json
import re
import socket
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from monitored import Monitored, serving
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from test_imports import HEAVY, imported

from proteus_pipeline import ModelCacheManager, ModelVersionManager
from proteus_pipeline.cli.main import main
from proteus_pipeline.metrics.catalogue import CATALOGUE, MONITOR, SERVICE
from proteus_pipeline.stages.monitoring import Monitor
from proteus_pipeline.stores.counts import counting

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Monitored:
    monkeypatch.chdir(repository)
    return Monitored.make(repository)


@pytest.fixture
def monitor(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["monitor", *words])
        return (code, *capsys.readouterr())

    return run


def samples(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, *(s.labels[k] for k in sorted(s.labels))): s.value for f in families for s in f.samples}


def get(address: str, **headers: str) -> tuple[str, str]:
    request = urllib.request.Request(f"{address}/metrics", headers=headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_everything_that_happened_is_counted_across_processes(
    project: Monitored, monitor: Said, capsys: pytest.CaptureFixture[str]
):
    project.work()
    code, out, err = monitor("cache.max_bytes=1000")
    assert (code, err) == (0, "")
    found = samples(out)
    expected = {
        ("proteus_version_registrations_total",): 2,
        ("proteus_version_conflicts_total",): 1,
        ("proteus_version_rollbacks_total",): 1,
        ("proteus_versions",): 2,
        ("proteus_cache_requests_total", "embeddings", "hit"): 3,
        ("proteus_cache_requests_total", "embeddings", "derived"): 6,
        ("proteus_cache_requests_total", "embeddings", "miss"): 3,
        ("proteus_cache_limit_bytes", "embeddings", "disk"): 1000,
        ("proteus_embedding_tokens_total",): 43 + 6,
        ("proteus_embedding_compute_seconds_count",): 1,
        ("proteus_cache_load_seconds_count", "embeddings"): 1,
        ("proteus_cache_loads_total", "models", "weights"): 3,
        ("proteus_cache_load_seconds_count", "models"): 3,
        ("proteus_cache_evictions_total", "models", "cleared"): 2,
        ("proteus_cache_eviction_age_seconds_count", "models"): 2,
        ("proteus_command_errors_total", "5"): 1,
        ("proteus_command_errors_total", "4"): 1,
        ("proteus_monitor_success", "embeddings"): 1,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["proteus_cache_evictions_total", "embeddings", "room"] >= 1
    assert found["proteus_integrity_findings_total", "embeddings"] >= 1
    assert found["proteus_embedding_saved_seconds_total",] > 0
    project.proteus("cache", "stats", "--json")
    stats = json.loads(capsys.readouterr().out)
    assert [stats[k] for k in ("hits", "derived", "misses", "entries")] == [
        3,
        6,
        3,
        found["proteus_cache_entries", "embeddings"],
    ]
    on_disk = sum(
        p.stat().st_size
        for folder in ("seg", "index", "runs")
        for p in (project.root / ".proteus/cache" / folder).glob("*")
    )
    assert sum(v for k, v in found.items() if k[:2] == ("proteus_cache_bytes", "embeddings")) == on_disk


def test_a_process_that_lives_is_seen_with_the_bytes_that_it_holds(project: Monitored):
    def held() -> dict[tuple[str, ...], float]:
        return samples(Monitor(project.root).measure()[0].text())

    key = ("proteus_cache_bytes", "models", "cpu", "models")
    with counting(lambda: project.root / ".proteus/metrics"):
        models = ModelCacheManager(max_memory_gb=0.5, version_manager=ModelVersionManager(project.root))
        assert held()[key] == 0
        models.get_or_load("m")
        stats = models.get_cache_stats()
        assert held()[key] == stats["devices"]["cpu"]["models_bytes"] > 0
        assert held()["proteus_cache_limit_bytes", "models", "cpu"] == 0.5e9
        models.clear_cache()
        assert held()[key] == 0
        del models


def test_json_and_a_textfile_say_what_stdout_says(project: Monitored, monitor: Said, tmp_path: Path):
    project.embed()
    text = monitor()[1]
    said = json.loads(monitor("--json")[1])
    assert said["home"] == str(project.root)
    names = {re.sub(r"_(bucket|sum|count)$", "", key[0]) for key in samples(text)}
    assert {metric["name"] for metric in said["metrics"]} == names
    target = tmp_path / "some folder" / "proteus.prom"
    assert monitor("--textfile", str(target)) == (0, "", "")
    assert samples(target.read_text()) == samples(text)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [p.name for p in target.parent.iterdir()] == ["proteus.prom"]


def test_every_metric_is_documented_and_every_documented_one_is_there(project: Monitored, monitor: Said):
    lines = (ROOT / "docs/monitoring.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `proteus_")]
    documented = {
        name.strip("`"): (kind, tuple(re.findall(r"`(\w+)`", labels)), unit, tuple(shown.split(", ")))
        for name, kind, labels, unit, shown, _ in rows
    }
    assert documented == {name: (m.kind, m.labels, m.unit, m.shown) for name, m in CATALOGUE.items()}
    cache = ModelCacheManager(version_manager=ModelVersionManager(project.root))
    for where, text in ((MONITOR, monitor("cache.max_bytes=1000")[1]), (SERVICE, cache.prometheus())):
        types = {f.name + "_total" * (f.type == "counter"): f.type for f in text_string_to_metric_families(text)}
        assert types == {name: m.kind for name, m in CATALOGUE.items() if where in m.shown}, where


def test_a_scrape_is_of_the_moment_and_in_the_format_that_is_asked_for(project: Monitored):
    with serving(project.root) as address:
        kind, text = get(address)
        assert kind.startswith("text/plain")
        kind, strict = get(address, Accept="application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text") and strict.endswith("# EOF\n")
        assert {f.name for f in openmetrics_families(strict)} == {f.name for f in text_string_to_metric_families(text)}
        before = samples(text)
        project.register("1.1.0", 1)
        project.embed()
        with ThreadPoolExecutor(8) as pool:
            after = [samples(text) for _, text in pool.map(get, [address] * 16)]
        for name, labels, more in (
            ("version_registrations_total", (), 1),
            ("cache_requests_total", ("embeddings", "miss"), 3),
        ):
            key = (f"proteus_{name}", *labels)
            assert {found[key] for found in after} == {before[key] + more}


def test_other_settings_are_seen_without_a_restart(project: Monitored):
    monitor = Monitor(project.root)
    assert ("proteus_cache_limit_bytes", "embeddings", "disk") not in samples(monitor.measure()[0].text())
    (project.root / "params.yaml").write_text("cache:\n  max_bytes: 12345\n")
    assert samples(monitor.measure()[0].text())["proteus_cache_limit_bytes", "embeddings", "disk"] == 12345


def test_what_can_not_be_read_is_said_and_the_rest_is_told(project: Monitored, monitor: Said, tmp_path: Path):
    project.embed()
    events = project.root / ".proteus/cache/events"
    events.mkdir(exist_ok=True)
    (events / "1-damaged.json").write_text("{")
    code, out, err = monitor()
    found = samples(out)
    assert (code, err.count("\n")) == (4, 1) and "1-damaged.json is damaged" in err
    assert found["proteus_monitor_success", "embeddings"] == 0
    assert not [key for key in found if key[:2] == ("proteus_cache_requests_total", "embeddings")], "absent, and not 0"
    assert found["proteus_monitor_success", "versions"] == found["proteus_versions",] == 1
    target = tmp_path / "p.prom"
    assert monitor("--textfile", str(target))[0] == 4
    assert samples(target.read_text())["proteus_monitor_success", "embeddings"] == 0
    (project.root / "params.yaml").write_text("cache:\n  max_bytes: -1\n")
    code, _, err = monitor()
    assert (code, err.count("\n")) == (2, 1) and "max_bytes" in err


def test_tags_are_read_again_when_one_came(project: Monitored):
    monitor = Monitor(project.root)
    for version in ("1.1.0", "1.2.0"):
        before = samples(monitor.measure()[0].text())
        assert samples(monitor.measure()[0].text()) == before
        project.register(version, 1)
        after = samples(monitor.measure()[0].text())
        for name in ("proteus_version_registrations_total", "proteus_versions"):
            assert after[name,] == before[name,] + 1


def test_outside_of_a_project_there_are_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Said):
    monkeypatch.chdir(tmp_path)
    code, out, _ = monitor()
    assert (code, samples(out)["proteus_versions",]) == (0, 0)
    home = ModelVersionManager(tmp_path / "home")
    home.ensure_home()
    assert samples(monitor("--home", str(tmp_path / "home"))[1])["proteus_versions",] == 0
    code, out, err = monitor("--home", str(tmp_path / "nowhere"))
    assert (code, out, err.count("\n")) == (1, "", 1) and "nowhere does not exist" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--serve", "65536"], 2, "'65536' is no port"),
        (["--serve", "x"], 2, "'x' is no port"),
        (["--serve", "٣"], 2, "is no port"),
        (["--serve", "9" * 5000], 2, "is no port"),
        (["--serve", "00000099999"], 2, "'00000099999' is no port"),
        (["--serve="], 2, "'' is no port"),
        (["9750"], 2, "'9750' is no KEY=VALUE"),
        (["--textfile", "proteus.txt"], 2, "does not end in .prom"),
        (["--textfile", "folder.prom"], 1, "cannot write folder.prom"),
        (["--textfile", "/proc/none/proteus.prom"], 1, "cannot write /proc/none/proteus.prom"),
        (["cache.nothing=1"], 2, "cache.nothing"),
        (["cache.path=params.yaml"], 1, "params.yaml is no folder"),
    ],
)
def test_what_is_wrong_is_one_line(project: Monitored, monitor: Said, words: list[str], code: int, said: str):
    (project.root / "folder.prom").mkdir()
    found, _, err = monitor(*words)
    assert (found, err.count("\n")) == (code, 1), err
    assert said in err and err.startswith("proteus: ") and "; " in err


def test_one_way_at_a_time(project: Monitored, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["monitor", "--serve", "--json"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(project: Monitored, monitor: Said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = monitor("--serve", str(port))
    assert (code, out) == (1, "")
    assert err == f"proteus: cannot listen at 127.0.0.1:{port}: address already in use; choose another: --serve PORT\n"


def test_reading_metrics_imports_no_torch(project: Monitored):
    project.embed()
    code, names = imported(project.root, "monitor", "--json")
    assert code == 0
    assert HEAVY & names <= {"numpy", "hydra", "omegaconf"}


def test_a_count_of_the_project_is_made_in_dvcs_root(
    project: Monitored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in the workspace of dvc exp run --temp, which is thrown away."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(project.root))
    project.register("1.0.0", 1, code=5)
    assert not (workspace / ".proteus").exists()
    assert samples(Monitor(project.root).measure()[0].text())["proteus_command_errors_total", "5"] == 1


def test_scrapes_do_not_disturb_who_works(project: Monitored):
    over, failed = threading.Event(), []
    monitor = Monitor(project.root)
    assert monitor.measure()[1] == []  # settings are read once: Hydra composes in one thread of a process at a time

    def scrape() -> None:
        while not over.is_set():
            failed.extend(monitor.measure()[1])

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        for pooling in ("per_residue", "mean", "cls", "max"):
            project.embed(f"embedding.pooling={pooling}", "cache.max_bytes=3000")
    finally:
        over.set()
        scraper.join()
    assert failed == []
