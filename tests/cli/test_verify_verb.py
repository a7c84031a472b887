"""What `proteus verify` prints, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from proteus_pipeline.cli.main import main
from proteus_pipeline.cli.verify import _told
from proteus_pipeline.stages.differences import Difference
from proteus_pipeline.stages.verifying import Verification

HERE, THERE = "cpu/x86_64/AVX2/Here", "cuda/sm_90"
METRICS = "as metrics.json says"
DONE = Verification("results/embeddings.json", "m@v1.0.0", HERE, (HERE,), 100, 100, 7, 100, 0, 2e-5, 0.0, METRICS, ())


def test_all_that_was_looked_at_is_said():
    assert _told(DONE).splitlines() == [
        "results/embeddings.json: 100 sequences, m@v1.0.0",
        f"  made on       {HERE}",
        f"  checked on    {HERE}: 100 sequences computed again",
        "  embeddings    100 equal bit for bit",
        "  metrics       as metrics.json says",
        "everything agrees",
    ]


def test_the_tolerance_and_the_seed_are_said_where_they_matter():
    done = replace(DONE, made_on=(THERE, HERE), recomputed=20, equal=5, near=15, farthest=3.1e-7)
    text = _told(done)
    assert "20 sequences computed again, seed 7" in text
    assert (
        "5 equal bit for bit, 15 within 2.0e-05 (relative L2, for another device class), the farthest at 3.1e-07"
        in text
    )
    last = text.splitlines()[-1]
    assert last.startswith("all that was looked at agrees, within the tolerance")
    assert _told(replace(done, recomputed=100)).splitlines()[-1].startswith("everything agrees, within the tolerance")


def test_many_differences_are_counted_and_their_remedy_is_said_once():
    differences = tuple(Difference("numbers", f"p{n}: content", "a", "b") for n in range(50))
    lines = _told(replace(DONE, differences=differences)).splitlines()
    assert next(line for line in lines if line.startswith("differs: ")) == "differs: p0: content: expected a, found b"
    assert lines[-2] == "and 30 more; --json lists them all"
    assert lines[-1].startswith("do: ")


def test_ids_can_not_write_to_the_terminal():
    text = _told(replace(DONE, differences=(Difference("numbers", "\x1b[2Jp\nq", "a", "b"),)))
    assert "\x1b" not in text and r"\x1b[2Jp\nq" in text


@pytest.mark.parametrize("words", [["--sample", "0"], ["--sample", "many"], ["--seed", "x"], ["a", "b"], ["--repair"]])
def test_wrong_words_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *words])
    assert stopped.value.code == 2
    assert "usage: proteus" in capsys.readouterr().err


def test_outside_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["verify"]) == 1
    assert "not in a git repository" in capsys.readouterr().err
