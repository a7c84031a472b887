"""What is said of an embed stage's outcome."""

from __future__ import annotations

from dataclasses import replace

from proteus_pipeline.cli.run import _table
from proteus_pipeline.cli.stage import told
from proteus_pipeline.embeddings.embedder import Outcome
from proteus_pipeline.stages.embed import summary
from proteus_pipeline.stages.pipeline import RunSummary
from proteus_pipeline.stages.wording import by_class

OUTCOME = Outcome((), sequences=9, unique=8, hits=5, derived=1, computed=2, tokens=9, seconds=1.0, saved_seconds=0.0)


def test_an_outcome_is_a_sentence():
    plain = "9 sequences: 5 hits, 1 derived, 2 computed in 1.0 s (1 of them equal to another)"
    assert told(OUTCOME) == plain
    elsewhere = replace(OUTCOME, other_classes={"cuda/sm_90": 4, "unattested": 1})
    assert told(elsewhere) == f"{plain}; from other device classes: 4 of cuda/sm_90, 1 of unattested"


def test_what_others_call_their_device_is_not_obeyed():
    hostile = replace(OUTCOME, other_classes={"\x1b[2Jcuda\n": 1})
    assert told(hostile).endswith("; from other device classes: 1 of \\x1b[2Jcuda\\n")
    table = _table(RunSummary({"embed": summary(hostile) | {"status": "run"}}, 1.0), "project")
    assert "from other device classes: 1 of \\x1b[2Jcuda\\n" in table and "\x1b" not in table


def test_many_or_long_names_do_not_fill_the_screen():
    assert by_class({f"{n}": n for n in range(9)}).endswith("4 of 4, and 4 classes more")
    assert len(by_class({"x" * 1000: 1})) < 100


def test_the_table_names_other_device_classes():
    facts = summary(replace(OUTCOME, other_classes={"cuda/sm_90": 4})) | {"status": "run"}
    line = "  embed used hits from other device classes: 4 of cuda/sm_90"
    assert line in _table(RunSummary({"embed": facts}, 1.0), "project").splitlines()
    without = summary(OUTCOME) | {"status": "run"}
    assert "device class" not in _table(RunSummary({"embed": without}, 1.0), "project")
