from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from proteus_pipeline.config.composition import compose, read_params
from proteus_pipeline.config.overrides import parse, write_params
from proteus_pipeline.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("  layer:", "  # which one\n  layer:"))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("embedding.layer=6", {"embedding": {"layer": 6}}),
        ("embedding.layer=-1", {"embedding": {"layer": -1}}),
        ("model=esm2_t6@v1.0.0", {"model": "esm2_t6@v1.0.0"}),
        ("model=lab/esm2@1.x", {"model": "lab/esm2@1.x"}),
        ("candidate=null", {"candidate": None}),
        ("data.fasta='my proteins, v=2.fa'", {"data": {"fasta": "my proteins, v=2.fa"}}),
        ('data.fasta="it\'s here.fa"', {"data": {"fasta": "it's here.fa"}}),
        ("data.fasta=/a/b-c_d.fa.gz", {"data": {"fasta": "/a/b-c_d.fa.gz"}}),
        ('data.fasta="a\\=b.fa"', {"data": {"fasta": "a\\=b.fa"}}),
        ("probe.regularisation_c=1e-3", {"probe": {"regularisation_c": 0.001}}),
        ("data=mine", {"groups": {"data": "mine"}}),
        ("data.fasta='???'", {"data": {"fasta": "???"}}),
    ],
)
def test_an_override_is_read_as_hydra_reads_it(override: str, value: dict[str, Any]):
    assert parse([override]) == value


def test_overrides_nest_and_the_last_one_counts():
    many = ["embedding.layer=1", "embedding.pooling=max", "embedding.layer=2"]
    assert parse(many) == {"embedding": {"layer": 2, "pooling": "max"}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["embedding.layer"], "is no Hydra override"),
        (["data.fasta=my proteins=2.fa"], "is no Hydra override"),
        (["embedding.layer=1,2"], "is a sweep; quote the value, or queue the grid"),
        (["embedding.layer=range(1,3)"], "is a sweep"),
        (["+embedding.more=1"], "adds or deletes a key"),
        (["++embedding.layer=1"], "adds or deletes a key"),
        (["~embedding.layer"], "adds or deletes a key"),
        (["data=3", "data.fasta=a.fa"], "sets a key of a value set before"),
        (["data.fasta=a.fa", "data=3"], "replaces keys set before it"),
        (["=1"], "is no Hydra override"),
        ([""], "is no Hydra override"),
    ],
)
def test_what_is_no_plain_choice_is_one_line(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["embedding.layer=6"],
        ["embedding.layer=6", "model=m@v1.0.0", "probe.regularisation_c=0.5"],
        ["data.fasta='my proteins, v=2.fa'", "data.labels=null"],
        ["stages.embed.model=m@1.x"],
    ],
)
def test_the_bytes_are_those_that_dvc_writes(project: Path, overrides: list[str]):
    from dvc.utils.hydra import apply_overrides

    expected = project / "expected.yaml"
    shutil.copy(project / "params.yaml", expected)
    if overrides:
        apply_overrides(str(expected), overrides)
    write_params(project, overrides)
    assert (project / "params.yaml").read_bytes() == expected.read_bytes()
    assert b"# which one" in expected.read_bytes()


def test_what_is_written_is_what_was_checked(project: Path):
    overrides = ["data.fasta='my proteins, v=2.fa'", "embedding.layer=-2", "probe.regularisation_c=1e-3"]
    typed = compose(project, read_params(project / "params.yaml"), changes=parse(overrides)).settings
    write_params(project, overrides)
    assert compose(project, read_params(project / "params.yaml")).settings == typed
    assert typed.data.fasta == "my proteins, v=2.fa"


@pytest.mark.parametrize(
    "overrides",
    [
        ["embedding.poling=max"],
        ["embedding.layer=last"],
        ["embedding.layer=6", "nothing=1"],
        ["data.fasta='???'"],
        ["data=mine"],
        ["embedding.layer=1,2"],
        ["embedding=5"],
        ["engine=${nowhere}"],
        ["model.name=a"],
        ["data@other=demo"],
        ["hydra.run.dir=/x"],
    ],
)
def test_params_stay_to_the_byte_when_an_override_is_wrong(project: Path, overrides: list[str]):
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        write_params(project, overrides)
    assert "\n" not in str(caught.value)
    assert (project / "params.yaml").read_bytes() == before


def test_a_key_that_params_lacks_is_named_and_nothing_is_written(project: Path):
    """DVC writes only keys that the file has."""
    (project / "params.yaml").write_text("embedding:\n  layer: 3\n")
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"does not take embedding\.pooling=max .*'embedding\.pooling'"):
        write_params(project, ["embedding.pooling=max"])
    assert (project / "params.yaml").read_bytes() == before


def test_a_project_without_params_says_so(project: Path):
    (project / "params.yaml").unlink()
    with pytest.raises(ConfigError, match=r"params\.yaml does not exist"):
        write_params(project, ["embedding.layer=6"])
    assert not (project / "params.yaml").exists()


def test_a_group_and_its_keys_can_be_chosen_together_in_any_order():
    wanted = {"data": {"fasta": "a.fa"}, "groups": {"data": "mine"}}
    assert parse(["data.fasta=a.fa", "data=mine"]) == wanted == parse(["data=mine", "data.fasta=a.fa"])


def test_a_choice_of_a_group_is_written_beside_its_keys(project: Path):
    from dvc.utils.hydra import apply_overrides

    shutil.copy(project / "params.yaml", project / "expected.yaml")
    apply_overrides(str(project / "expected.yaml"), ["groups.data=demo"])
    write_params(project, ["data=demo"])
    assert (project / "params.yaml").read_bytes() == (project / "expected.yaml").read_bytes()
