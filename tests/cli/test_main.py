from __future__ import annotations

import pytest

from proteus_pipeline.cli.main import main, parser


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Outside a project the verb itself fails: the command line was understood.
    for command in (
        ["embed", "a.fasta", "-o", "a.npz", "data.long=window"],
        ["cache", "audit", "a.fasta", "--sample", "3", "embedding.layer=5"],
    ):
        assert main(command) == 1
        assert "not in a git repository" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["run", "--nonsense"], ["model", "list", "a", "b=c"], ["fly"], ["stage", "dance"]])
def test_unknown_words_are_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: proteus" in capsys.readouterr().err


def test_what_is_missing_is_named_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["embed"])
    assert capsys.readouterr().err.endswith("the following arguments are required: FASTA\n")


def test_without_a_verb_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "exit codes" in capsys.readouterr().out


def test_every_verb_has_help() -> None:
    (verbs,) = [a for a in parser()._actions if a.dest == "verb"]
    listed = {choice.dest for choice in verbs._choices_actions if choice.help}
    assert listed == set(verbs.choices)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("proteus 0.")
