from __future__ import annotations

import itertools

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from proteus_pipeline.metrics.catalogue import CATALOGUE, MONITOR, SERVICE
from proteus_pipeline.metrics.lines import increments, observed, series, to_line, totals
from proteus_pipeline.metrics.readings import Observed, Readings

HITS, LOADS = "proteus_cache_requests_total", "proteus_cache_load_seconds"


def sampled(readings: Readings) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(readings.text())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_names_are_as_prometheus_asks():
    for name, metric in CATALOGUE.items():
        assert name.startswith("proteus_") and name.endswith("_total") == (metric.kind == "counter")
        assert (metric.kind == "histogram") == bool(metric.buckets) and list(metric.buckets) == sorted(metric.buckets)
        assert all(len(values) == len(metric.labels) for values in metric.known)
        assert set(metric.shown) <= {MONITOR, SERVICE} and metric.text.endswith(".")
        assert metric.unit or not any(word in name for word in ("bytes", "seconds")), name


def test_what_was_counted_is_shown_and_what_was_not_is_0():
    readings = Readings(MONITOR)
    assert sampled(readings) == {}, "what could not be read is absent: a 0 would be a counter that fell"
    readings.zero()
    readings.add_counts(increments(HITS, 4, {"cache": "models", "result": "hit"}))
    found = sampled(readings)
    assert found[series(HITS, {"cache": "models", "result": "hit"})] == 4
    assert found[series(HITS, {"cache": "models", "result": "miss"})] == 0


def test_a_histogram_is_cumulative_and_its_sum_is_the_sum():
    readings, seconds = Readings(MONITOR), [0.003, 0.2, 0.2, 7, 1000]
    lines = b"".join(to_line(increments(LOADS, s, {"cache": "models"})) for s in seconds)
    readings.add_counts(totals(lines))
    found = sampled(readings)
    for bound in CATALOGUE[LOADS].buckets:
        at_most = found[series(f"{LOADS}_bucket", {"cache": "models", "le": repr(bound)})]
        assert at_most == sum(s <= bound for s in seconds)
    assert found[series(f"{LOADS}_count", {"cache": "models"})] == 5
    assert found[series(f"{LOADS}_sum", {"cache": "models"})] == pytest.approx(sum(seconds))


def test_counts_of_another_version_are_passed_over_and_its_bounds_are_kept():
    readings = Readings(MONITOR)
    found = {
        series("proteus_of_tomorrow_total", {}): 5.0,
        series(HITS, {"cache": "models", "result": "hit", "more": "x"}): 5.0,
        series(HITS, {"cache": "models"}): 5.0,
        series("proteus_models", {}): 5.0,
        series(f"{LOADS}_bucket", {"cache": "models", "le": "0.07"}): 2.0,
        series(f"{LOADS}_bucket", {"cache": "models", "le": "nan"}): 2.0,
        series(f"{LOADS}_bucket", {"cache": "models", "le": "x"}): 2.0,
        series(LOADS, {"cache": "models"}): 2.0,
    }
    readings.add_counts(found)
    shown = sampled(readings)
    bounds = [
        labels["le"]
        for name, pairs in shown
        if name == f"{LOADS}_bucket" and (labels := dict(pairs))["cache"] == "models"
    ]
    assert {"0.07"} == set(bounds) - set(observed(CATALOGUE[LOADS].buckets, ()))
    assert shown[series(f"{LOADS}_bucket", {"cache": "models", "le": "0.1"})] == 2
    assert sum(value for (name, _), value in shown.items() if name == HITS) == 0


@pytest.mark.parametrize("shown", [MONITOR, SERVICE])
def test_both_texts_are_read_by_their_parsers_and_agree(shown: str):
    readings, registry = Readings(shown), CollectorRegistry()
    readings.zero()
    readings.set("proteus_build_info", 1, version="1.2.3")
    registry.register(readings)
    strict = {
        (s.name, *sorted(s.labels.items()))
        for f in openmetrics_families(openmetrics(registry).decode())
        for s in f.samples
    }
    loose = {(name, *labels) for name, labels in sampled(readings)}
    assert strict == loose
    types = {f.name: f.type for f in text_string_to_metric_families(readings.text())}
    assert types == {m.name.removesuffix("_total"): m.kind for n, m in readings.metrics.items() if readings.values[n]}


def test_json_says_the_same():
    readings = Readings(MONITOR)
    readings.set("proteus_versions", 3)
    readings.set(LOADS, Observed(observed(CATALOGUE[LOADS].buckets, [0.2, 400]), 400.2), cache="models")
    by_name = {metric["name"]: metric for metric in readings.to_json()}
    assert by_name["proteus_versions"]["samples"] == [{"labels": {}, "value": 3}]
    models = next(s for s in by_name[LOADS]["samples"] if s["labels"] == {"cache": "models"})
    assert (models["count"], models["sum"], models["buckets"]["0.25"], models["buckets"]["+Inf"]) == (2, 400.2, 1, 2)
    assert all(a <= b for a, b in itertools.pairwise(models["buckets"].values()))
    assert by_name[LOADS]["unit"] == "seconds"
