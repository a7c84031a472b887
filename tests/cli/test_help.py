"""Every verb's help, walked: a description, an example that the parser takes, a text for each word and option."""

from __future__ import annotations

import argparse
import shlex

import pytest

from proteus_pipeline.cli.examples import EXAMPLES, epilog
from proteus_pipeline.cli.main import leaves, main, parser

VERBS = dict(leaves(parser()))
COMMANDS = [command for commands in EXAMPLES.values() for command, _ in commands]


def test_every_verb_has_examples_in_cli_examples_py():
    assert set(EXAMPLES) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    leaf = VERBS[verb]
    assert leaf.description and leaf.epilog and "examples:\n  proteus " in leaf.epilog.replace('eval "$(', "")
    unexplained = [a.metavar or a.dest for a in leaf._actions if not a.help or a.help is argparse.SUPPRESS]
    assert unexplained == []
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert str(epilog(verb)) in shown
    assert max(map(len, shown.splitlines())) <= 132


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_is_what_the_parser_takes(command: str):
    words = shlex.split(command.removeprefix('eval "$(').removesuffix(')"').partition(" | ")[0])
    assert words[0] == "proteus"
    args, rest = parser().parse_known_args(words[1:])
    assert hasattr(args, "run") and (not rest or hasattr(args, "overrides"))
    assert not any(word.startswith("-") for word in rest)


def test_listings_and_summaries_print_json():
    without = {verb for verb, leaf in VERBS.items() if "--json" not in leaf._option_string_actions}
    assert without == {"completion", "stage"}


def test_what_removes_can_be_asked_first():
    able = {verb for verb, leaf in VERBS.items() if "--dry-run" in leaf._option_string_actions}
    removing = {"model delete", "model prune", "model rollback", "cache gc", "cache invalidate"}
    assert removing <= able and {"model restore", "model lock", "cache push", "cache pull"} <= able
