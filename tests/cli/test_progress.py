"""What people see while embeddings are computed, where no terminal is."""

from __future__ import annotations

import pytest

from proteus_pipeline.cli import progress
from proteus_pipeline.cli.progress import EmbeddingProgress


def test_lines_say_the_pace_its_share_of_the_machine_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with EmbeddingProgress("embed") as told:
        told.start(total=12, hits=2, tokens=5000, peak=4e9)
        for _ in range(8):
            now += 5
            told.advance(1, 500, 5e9)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "embed: 12 distinct sequences, 2 known, 10 to compute",
        "embed: 1 of 10 computed, 100 tokens/s, 25% of this machine's matrix products, 45 s left",
        "embed: 2 of 10 computed, 100 tokens/s, 25% of this machine's matrix products, 40 s left",
        "embed: 4 of 10 computed, 100 tokens/s, 25% of this machine's matrix products, 30 s left",
        "embed: 6 of 10 computed, 100 tokens/s, 25% of this machine's matrix products, 20 s left",
        "embed: 8 of 10 computed, 100 tokens/s, 25% of this machine's matrix products, 10 s left",
    ]


def test_where_the_machine_was_not_measured_no_share_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with EmbeddingProgress("embed") as told:
        told.start(total=2, hits=0, tokens=100, peak=0.0)
        now = 20.0
        told.advance(1, 50, 1e9)
    assert capsys.readouterr().err.splitlines()[1] == "embed: 1 of 2 computed, 2 tokens/s, 20 s left"


def test_where_all_is_known_nothing_is_said(capsys: pytest.CaptureFixture[str]):
    with EmbeddingProgress("embed") as told:
        told.start(total=2, hits=2, tokens=0, peak=0.0)
    assert capsys.readouterr().err == ""
