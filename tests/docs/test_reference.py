"""The reference is whole: no verb, argument, setting, variable or public name without its words."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cached_property
from pathlib import Path

import commands
import pages
import pytest
import settings
import yaml
from conftest import ROOT

import proteus_pipeline
from proteus_pipeline.config.composition import PARAMS


@pytest.mark.parametrize(("this", "says"), [pytest.param(*found, id=found[0].prog) for found in commands.verbs()])
def test_a_verb_and_each_of_its_arguments_say_what_they_are(this, says) -> None:
    assert says.strip()
    assert [commands.called(a) for a in commands.arguments(this) if not (a.help or "").strip()] == []


@pytest.mark.parametrize("setting", settings.settings(ROOT), ids=lambda s: s.key)
def test_a_setting_has_its_default_and_its_words_in_conf(setting: settings.Setting) -> None:
    assert setting.file, f"{setting.key} is in the schema, and not in conf/"
    assert setting.default
    assert len(setting.says) > 10, f"{setting.file}: say above {setting.key} what it does"


def test_conf_and_params_have_the_settings_of_the_schema_and_no_others() -> None:
    keys = {s.key for s in settings.settings(ROOT)}
    mirrored = {key for key in _leaves(yaml.safe_load((ROOT / PARAMS).read_text())) if not key.startswith("groups.")}
    assert mirrored == keys
    groups = {key.partition(".")[0] for key in keys if "." in key} - {"stages"}
    written = {
        f"{g}.{key}"
        for g in groups
        for f in (ROOT / "conf" / g).glob("*.yaml")
        for key in settings.comments(f.read_text())
    }
    assert written <= keys


def _leaves(values: dict) -> set[str]:
    found = set()
    for key, value in values.items():
        found |= {f"{key}.{below}" for below in _leaves(value)} if isinstance(value, dict) else {key}
    return found


def test_a_comment_belongs_to_the_key_below_it() -> None:
    text = "# The file's.\n\n# One\n# thing.\na: 1\nb:\n  # Two.\n  c: 2\n  d: 3\n# Of e\ne:\n  f: x # g: 1\n"
    expected = {"a": "One thing.", "b": "", "b.c": "Two.", "b.d": "", "e": "Of e", "e.f": "Of e"}
    assert settings.comments(text) == expected


def test_a_setting_that_conf_does_not_explain_is_found(tmp_path: Path) -> None:
    """The tests above would see it: the same project, without one comment and without one default."""
    for file in (ROOT / "conf").rglob("*.yaml"):
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(file.read_text())
    probe = tmp_path / "conf" / "probe" / "default.yaml"
    probe.write_text(re.sub(r"#.*\nseed", "seed", re.sub(r"#.*\nfolds: 5\n", "", probe.read_text())))
    found = {s.key: s for s in settings.settings(tmp_path)}
    assert (found["probe.folds"].file, found["probe.seed"].says) == ("", "")
    assert found["probe.task"] == next(s for s in settings.settings(ROOT) if s.key == "probe.task")


def test_each_environment_variable_is_documented() -> None:
    files = [*(ROOT / "proteus_pipeline").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    used = {name for file in files for name in re.findall(r"\bPROTEUS_[A-Z0-9_]+[A-Z0-9]\b", file.read_text())}
    told = (ROOT / "docs" / "reference" / "environment.md").read_text()
    assert {name for name in used if f"`{name}`" not in told} == set()


def test_the_pages_hold_each_verb_and_setting_and_public_name() -> None:
    command_line = commands.page().splitlines()
    assert [
        p
        for this, _ in commands.verbs()
        if (p := this.prog) != "proteus" and not any(re.fullmatch(f"#+ {p}", line) for line in command_line)
    ] == []
    told = pages.configuration(ROOT)
    assert [s.key for s in settings.settings(ROOT) if f"| `{s.key}` |" not in told] == []
    listed = re.findall(r"^::: proteus_pipeline\.(\S+)$", pages.api(), re.MULTILINE)
    assert {name.rpartition(".")[2] for name in listed} >= set(proteus_pipeline.__all__)
    assert [name for name in listed if pages.resolved(name) is None] == []


@pytest.mark.parametrize("name", [*proteus_pipeline.__all__, *pages.VALUES])
def test_a_public_name_and_its_methods_have_docstrings(name: str) -> None:
    thing = getattr(proteus_pipeline, name) if "." not in name else pages.resolved(name)
    bare = [] if inspect.getdoc(thing) else [name]
    members = vars(thing).items() if inspect.isclass(thing) else ()
    fields = {f.name for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    for member, value in members:
        if member.startswith("_") or member in fields:
            continue
        if callable(value) or isinstance(value, property | cached_property | classmethod | staticmethod):
            bare += [] if inspect.getdoc(getattr(thing, member)) else [f"{name}.{member}"]
    assert bare == []
