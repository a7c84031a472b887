"""A real Prometheus scrapes the monitor, shows every metric, and answers every query of the dashboard and the alerts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from monitored import Monitored, serving
from prometheus_server import EVERY, PrometheusServer, installed, prometheus_server

from proteus_pipeline.cli.main import main
from proteus_pipeline.metrics.catalogue import CATALOGUE, MONITOR

DASHBOARD, RULES = ROOT / "docs/grafana-dashboard.json", ROOT / "docs/alert-rules.yml"
# What the work comes to.
VALUES = {
    "proteus_version_registrations_total": 2,
    "proteus_version_conflicts_total": 1,
    "proteus_version_rollbacks_total": 1,
    'proteus_cache_requests_total{cache="embeddings",result="hit"}': 3,
    'proteus_cache_requests_total{cache="embeddings",result="miss"}': 3,
    'proteus_cache_requests_total{cache="shared",result="miss"}': 3,
    'proteus_cache_limit_bytes{cache="embeddings"}': 1000,
    'proteus_cache_load_seconds_count{cache="models"}': 3,
    "up": 1,
}
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield f"{panel['title']} {target['refId']}", expression


def eventually(found: Callable[[], Any], expected: Any) -> None:
    """Wait until something is what it should be: a scrape on a busy machine may come late, or be the next one."""
    deadline = time.monotonic() + 90
    while (last := found()) != expected and time.monotonic() < deadline:
        time.sleep(EVERY / 5)
    assert last == expected


def is_at_least(server: PrometheusServer, expression: str, least: float) -> bool:
    found = server.query(expression)
    return bool(found) and found[0][1] >= least


@installed
def test_it_shows_every_metric_and_answers_every_query(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(repository)
    project = Monitored.make(repository)
    with (
        serving(repository, "cache.max_bytes=1000") as address,
        prometheus_server(tmp_path / "prometheus", address.removeprefix("http://"), RULES) as server,
    ):
        eventually(lambda: server.query("proteus_versions")[:1] != [], True)
        project.work()
        eventually(lambda: is_at_least(server, 'sum(proteus_cache_evictions_total{cause="cleared"})', 2), True)
        eventually(lambda: shown(server), {name for name, metric in CATALOGUE.items() if MONITOR in metric.shown})
        eventually(lambda: {expression: first(server, expression) for expression in VALUES}, VALUES)
        eventually(lambda: unanswered(server), {})
        eventually(lambda: {rule["health"] for rule in evaluated(server)}, {"ok"})
        assert {rule["name"] for rule in evaluated(server)} >= {"ProteusDamageFound", "ProteusCacheOverBudget"}


def shown(server: PrometheusServer) -> set[str]:
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in server.api("label/__name__/values")}
    return {name for name in names if name.startswith("proteus_")}


def first(server: PrometheusServer, expression: str) -> float | None:
    found = server.query(expression)
    return found[0][1] if found else None


def unanswered(server: PrometheusServer) -> dict[tuple[str, str], list[float]]:
    """The dashboard's queries that bring nothing, or what is no number."""
    numbers = {(title, expression): [value for _, value in server.query(expression)] for title, expression in queries()}
    return {query: found for query, found in numbers.items() if not found or not all(map(math.isfinite, found))}


def evaluated(server: PrometheusServer) -> list[dict[str, Any]]:
    return [rule for group in server.api("rules")["groups"] for rule in group["rules"]]


def promtool(*words: str, text: str = "") -> str:
    done = subprocess.run(["promtool", *words], input=text, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@installed
def test_promtool_finds_nothing_to_say_of_the_metrics(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(repository)
    assert main(["monitor"]) == 0
    assert promtool("check", "metrics", text=capsys.readouterr().out) == ""


@installed
def test_each_alert_comes_when_it_should_and_else_does_not():
    assert "SUCCESS" in promtool("check", "rules", str(RULES))
    assert "SUCCESS" in promtool("test", "rules", str(ROOT / "tests/metrics/alert-tests.yml"))
    rules = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    assert rules == set(re.findall(r"alertname: (\w+)", (ROOT / "tests/metrics/alert-tests.yml").read_text()))


def test_the_dashboard_asks_for_every_metric_and_for_no_other():
    asked = {re.sub(r"_(bucket|count|sum)$", "", name) for _, e in queries() for name in re.findall(r"proteus_\w+", e)}
    assert asked == {name for name, metric in CATALOGUE.items() if MONITOR in metric.shown}
    alerts = set(re.findall(r"proteus_\w+", RULES.read_text()))
    assert alerts <= CATALOGUE.keys()


def test_the_dashboard_is_one_that_grafana_can_draw():
    board = json.loads(DASHBOARD.read_text())
    everything = board["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells and max(x for x, _ in own) < 24, panel["title"]
        cells |= own
    assert all(panel["description"] and panel["datasource"]["uid"] == "${datasource}" for panel in panels())
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
