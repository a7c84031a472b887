"""Counts as lines of text that are added up: what one process appends, and what many come to.

A line is the CRC-32 of its text, in hexadecimal, a space, and the text, a JSON list of increments::

    4f2a90c1 [["proteus_cache_requests_total",{"cache":"models","result":"hit"},1]]

An observation of a histogram is two: one of its ``NAME_bucket``, with the smallest bound ``le`` that holds it and not the
larger ones, and one of its ``NAME_sum``. So everything is a sum, and lines can be replaced by their sum at any time.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from proteus_pipeline.metrics.catalogue import CATALOGUE

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A name, and its labels, sorted."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,127}", re.ASCII)


def series(name: str, labels: Mapping[str, str]) -> Series:
    """Return what a number is counted under."""
    return name, tuple(sorted(labels.items()))


def increments(name: str, value: float, labels: Mapping[str, str]) -> dict[Series, float]:
    """Return what counting `value` adds: to a counter, or as one observation of a histogram.

    Parameters
    ----------
    name
        In the catalogue.
    value
        0 or more; a histogram's is of its unit.
    labels
        All that the metric has.

    """
    metric = CATALOGUE[name]
    if metric.kind == "gauge" or set(labels) != set(metric.labels) or not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{value} is no count of {name} with {', '.join(labels) or 'no labels'}")
    if metric.kind == "counter":
        return {series(name, labels): value}
    place = bisect_left(metric.buckets, value)
    bound = "+Inf" if place == len(metric.buckets) else repr(metric.buckets[place])
    return {series(f"{name}_bucket", {**labels, "le": bound}): 1, series(f"{name}_sum", labels): value}


def to_line(added: Mapping[Series, float]) -> bytes:
    """Return a line, with its end."""
    text = json.dumps([[name, dict(labels), value] for (name, labels), value in added.items()], separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def of_line(line: bytes) -> list[tuple[Series, float]]:
    """Return a line's increments; none of one that is damaged, or was cut short."""
    checksum, _, text = line.partition(b" ")
    if f"{zlib.crc32(text):08x}".encode() != checksum:
        return []
    try:
        return [_increment(*item) for item in json.loads(text)]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []


def _increment(name: str, labels: dict[str, str], value: float) -> tuple[Series, float]:
    texts = all(isinstance(text, str) for pair in labels.items() for text in pair)
    if not _NAME.fullmatch(name) or not texts or not (math.isfinite(value) and value >= 0):
        raise ValueError(name)
    return series(name, labels), value


def totals(data: bytes) -> dict[Series, float]:
    """Add up lines, in their order: the sum of sums is the same to the last bit, so that no counter ever falls."""
    found: dict[Series, float] = {}
    for line in data.split(b"\n"):
        for which, value in of_line(line) if line else ():
            found[which] = found.get(which, 0) + value
    return found


def to_lines(found: Mapping[Series, float]) -> bytes:
    """Return totals as lines, one of each series: damage to one takes no other along."""
    return b"".join(to_line({which: value}) for which, value in sorted(found.items()))


def by_name(found: Mapping[Series, float]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield totals with the labels as a mapping."""
    for (name, labels), value in found.items():
        yield name, dict(labels), value


def observed(bounds: Iterable[float], values: Iterable[float]) -> dict[str, float]:
    """Return how many values fall into which bucket alone, by its bound."""
    edges = [*bounds, math.inf]
    counted = [0] * len(edges)
    for value in values:
        counted[bisect_left(edges, value)] += 1
    return {("+Inf" if math.isinf(edge) else repr(edge)): n for edge, n in zip(edges, counted, strict=True)}
