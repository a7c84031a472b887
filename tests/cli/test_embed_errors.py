"""What ``proteus embed`` says of what it can't use: one line, and a remedy that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
from monitored import Monitored

from proteus_pipeline.cli.main import main


@pytest.fixture
def project(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Monitored:
    monkeypatch.chdir(repository)
    return Monitored.make(repository)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file other.fasta; name one that exists"),
        ("", "other.fasta is empty; name one with records"),
        ("hello\n", "other.fasta, line 1: text before the first header; start each record with a line '>ID', or name a FASTA file"),
        (">a\nMK1\n", "record 'a' has '1' at position 3, which is no residue; correct the sequence"),
    ],
)  # fmt: skip
def test_a_file_that_is_none(project: Monitored, capsys: pytest.CaptureFixture[str], text: str | None, said: str):
    """It is given by itself: the setting of another one is no remedy."""
    if text is not None:
        (project.root / "other.fasta").write_text(text)
    assert main(["embed", "other.fasta", "model=m@v1.0.0", "embedding.layer=-1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"proteus: {said}"


@pytest.mark.parametrize("name", ["m", "m@latest", "nobody"])
def test_a_floating_reference_for_this_once_is_not_sent_to_a_lock_that_would_not_see_it(
    project: Monitored, capsys: pytest.CaptureFixture[str], name: str
):
    assert main(["embed", str(project.fasta), f"model={name}"]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "floating" in line]
    wanted = name if "@" in name else f"{name}@current"
    bare = name.partition("@")[0]
    assert line == (
        f"proteus: the command line: model: {wanted} is a floating reference that models.lock does not hold; "
        f"give an exact one, {bare}@vX.Y.Z, as proteus model list has it, or: proteus run model={wanted} --update"
    )


def test_a_key_is_named_once(project: Monitored, capsys: pytest.CaptureFixture[str]):
    assert main(["embed", str(project.fasta), "model=m@v1.0.0", "embedding.layer=99"]) == 2
    assert "proteus: the command line: embedding.layer is 99, and the model has" in capsys.readouterr().err
