from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_pipeline.metrics.catalogue import CATALOGUE
from proteus_pipeline.metrics.lines import increments, of_line, series, to_line, to_lines, totals

HITS = "proteus_cache_requests_total"
LOADS = "proteus_cache_load_seconds"
COUNTED = sorted(name for name, metric in CATALOGUE.items() if metric.kind != "gauge" and metric.known)
fewer = settings(max_examples=50)
# Written by the first release of the format: what it says is what every later one reads.
GOLDEN = b'6936f37c [["proteus_cache_requests_total",{"cache":"models","result":"hit"},3]]\n'


@st.composite
def counted(draw: st.DrawFn) -> dict:
    metric = CATALOGUE[draw(st.sampled_from(COUNTED))]
    labels = dict(zip(metric.labels, draw(st.sampled_from(metric.known)), strict=True))
    return increments(metric.name, draw(st.floats(0, 1e9)), labels)


def test_a_line_is_what_it_was_in_the_first_release():
    added = increments(HITS, 3, {"cache": "models", "result": "hit"})
    assert to_line(added) == GOLDEN
    assert dict(of_line(GOLDEN.rstrip())) == {series(HITS, {"result": "hit", "cache": "models"}): 3}


@fewer
@given(st.lists(counted(), max_size=30), st.integers(0, 30))
def test_a_file_and_its_sums_say_the_same_wherever_it_is_compacted(parts: list[dict], at: int):
    lines = [to_line(part) for part in parts]
    whole = totals(b"\n".join(lines))
    compacted = to_lines(totals(b"".join(lines[:at]))) + b"".join(lines[at:])
    assert totals(compacted) == whole, "to the last bit: else a counter could fall"


@fewer
@given(st.lists(counted(), min_size=1, max_size=5), st.data())
def test_a_flipped_bit_loses_one_line_and_makes_no_number(parts: list[dict], data: st.DataObject):
    lines = [to_line(part) for part in parts]
    which = data.draw(st.integers(0, len(lines) - 1))
    damaged = bytearray(lines[which])
    damaged[data.draw(st.integers(0, len(damaged) - 2))] ^= 1 << data.draw(st.integers(0, 7))
    expected: dict = {}
    for part in parts[:which] + parts[which + 1 :]:
        for key, value in part.items():
            expected[key] = expected.get(key, 0) + value
    assert totals(b"".join([*lines[:which], bytes(damaged), *lines[which + 1 :]])) == expected


@fewer
@given(st.lists(counted(), min_size=1, max_size=4), st.data())
def test_a_line_that_was_cut_short_takes_no_other_along(parts: list[dict], data: st.DataObject):
    last = to_line(parts[-1])
    cut = last[: data.draw(st.integers(0, len(last) - 2))]
    before = b"".join(map(to_line, parts[:-1]))
    assert totals(before + cut + b"\n" + to_line(parts[0])) == totals(before + to_line(parts[0]))


@pytest.mark.parametrize(
    "text",
    [
        "{}", "3", '"text"', "[3]", "[[]]", '[["a",{},1,2]]', '[["a",[],1]]', '[["a",{},"x"]]', '[["a",{},null]]',
        '[["a",{},-1]]', '[["a",{},NaN]]', '[["a",{},Infinity]]', '[["a",{},1e999]]', '[["A b",{},1]]', '[["a",{"x":1},1]]',
        '[["a",{"x":["y"]},1]]', "[" * 100_000, '[["a",{},' + "9" * 400 + "]]",
    ],
)  # fmt: skip
def test_a_sound_line_that_says_what_no_count_says_is_passed_over(text: str):
    import zlib

    assert totals(f"{zlib.crc32(text.encode()):08x} {text}\n".encode()) == {}


@fewer
@given(st.binary(max_size=200))
def test_bytes_that_are_no_lines_are_no_counts(data: bytes):
    assert totals(data) == {}


@pytest.mark.parametrize(
    ("name", "value", "labels"),
    [
        ("proteus_cache_bytes", 1, {"cache": "models", "device": "cpu", "kind": "models"}),
        (HITS, 1, {"cache": "models"}),
        (HITS, 1, {"cache": "models", "result": "hit", "more": "x"}),
        (HITS, -1, {"cache": "models", "result": "hit"}),
        (HITS, math.nan, {"cache": "models", "result": "hit"}),
        (LOADS, math.inf, {"cache": "models"}),
    ],
)
def test_what_is_no_count_is_refused(name: str, value: float, labels: dict[str, str]):
    with pytest.raises(ValueError, match="is no count"):
        increments(name, value, labels)


@pytest.mark.parametrize(("value", "bound"), [(0.0, "0.01"), (0.01, "0.01"), (0.010001, "0.025"), (301, "+Inf")])
def test_an_observation_is_in_the_smallest_bucket_that_holds_it(value: float, bound: str):
    (bucket, total) = increments(LOADS, value, {"cache": "models"}).items()
    assert bucket == (series(f"{LOADS}_bucket", {"cache": "models", "le": bound}), 1)
    assert total == (series(f"{LOADS}_sum", {"cache": "models"}), value)
