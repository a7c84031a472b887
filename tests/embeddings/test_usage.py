from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path

import pytest
from entries import make, publish

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.usage import last_used, record_use, uses


def test_uses_come_back_in_order_with_what_they_read(tmp_path: Path):
    before = int(time.time())
    record_use(tmp_path / "cache", 1, 2, 3, {"a.zip": 4})
    record_use(tmp_path / "cache", 5, 0, 0, {"b.zip": 1, "a.zip": 1})
    first, second = uses(tmp_path / "cache")
    assert (first.hits, first.derived, first.misses, first.segments) == (1, 2, 3, {"a.zip": 4})
    assert (second.hits, second.derived, second.misses, second.segments) == (5, 0, 0, {"b.zip": 1, "a.zip": 1})
    assert before <= first.time <= second.time <= time.time()


def test_a_line_is_json_with_a_time_that_people_read(tmp_path: Path):
    record_use(tmp_path, 1, 2, 3, {"a.zip": 4})
    (line,) = filter(None, (tmp_path / "uses.jsonl").read_text().splitlines())
    value = json.loads(line)
    assert dt.datetime.fromisoformat(value.pop("time")).tzinfo == dt.UTC
    assert value == {"hits": 1, "derived": 2, "misses": 3, "segments": {"a.zip": 4}}


def test_an_account_that_was_never_written_is_empty(tmp_path: Path):
    assert list(uses(tmp_path)) == []
    assert last_used(tmp_path) == {}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\0\0\0\0",
        b'{"time": "2026-01-01T00:00:00+00:00", "hits": 1',
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"time": "yesterday", "hits": 1, "derived": 1, "misses": 1}',
        b'{"time": 5, "hits": 1, "derived": 1, "misses": 1}',
        b'{"time": "2026-01-01T00:00:00+00:00", "hits": null, "derived": 1, "misses": 1}',
        b'{"time": "2026-01-01T00:00:00+00:00", "hits": 1, "derived": 1, "misses": 1, "segments": 3}',
        b'{"time": "2026-01-01T00:00:00+00:00", "hits": 1, "derived": 1, "misses": 1, "segments": {"a": "x"}}',
        b"\xff\xfe not text",
    ],
)
def test_a_line_that_is_none_is_passed_over(tmp_path: Path, line: bytes):
    record_use(tmp_path, 1, 0, 0, {})
    with (tmp_path / "uses.jsonl").open("ab") as file:
        file.write(line + b"\n")
    record_use(tmp_path, 2, 0, 0, {})
    assert [use.hits for use in uses(tmp_path)] == [1, 2]


def test_a_line_that_a_crash_cut_short_costs_no_other(tmp_path: Path):
    record_use(tmp_path, 1, 0, 0, {})
    with (tmp_path / "uses.jsonl").open("ab") as file:
        file.write(b'{"time": "2026-01-01T00:00:')
    record_use(tmp_path, 2, 0, 0, {})
    record_use(tmp_path, 3, 0, 0, {})
    assert [use.hits for use in uses(tmp_path)] == [1, 2, 3]


def test_a_line_without_segments_is_of_an_earlier_writer_and_counts(tmp_path: Path):
    (tmp_path / "uses.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00+00:00", "hits": 1, "derived": 0, "misses": 7}\n'
    )
    (use,) = uses(tmp_path)
    assert (use.hits, use.misses, use.segments) == (1, 7, {})


def test_a_segment_was_last_used_at_its_latest_read(tmp_path: Path):
    lines = [("2026-01-02", ["a", "b"]), ("2026-01-03", ["b"]), ("2026-01-01", ["a", "c"])]  # clocks differ
    (tmp_path / "uses.jsonl").write_text(
        "".join(
            json.dumps({"time": f"{day}T00:00:00+00:00", "hits": 0, "derived": 0, "misses": 0, "segments": dict.fromkeys(read, 1)})
            + "\n"
            for day, read in lines
        )
    )  # fmt: skip
    days = {s: dt.datetime.fromtimestamp(t, dt.UTC).day for s, t in last_used(tmp_path).items()}
    assert days == {"a": 2, "b": 3, "c": 1}


def test_what_a_run_read_is_counted_by_segment(tmp_path: Path):
    cache = EmbeddingCache(tmp_path)
    first, second = make(5, prefix="a"), make(3, prefix="b")
    publish(cache, first)
    publish(cache, second)
    read = [e for e, _ in cache.find([*list(first.arrays)[:4], *second.arrays])]
    cache.record_use(7, 0, 0, read)
    (use,) = uses(tmp_path)
    assert sorted(use.segments.values()) == [3, 4]
    assert set(last_used(tmp_path)) == {e.segment for e in read}


def test_an_account_that_cant_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "uses.jsonl").mkdir()
    record_use(tmp_path, 1, 0, 0, {})
    assert "cannot write" in caplog.text
    assert "is a directory" in caplog.text
    assert list(uses(tmp_path)) == []
