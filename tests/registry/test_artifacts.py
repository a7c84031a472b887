from __future__ import annotations

import pytest
import yaml

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.artifacts import declare_artifact, declares_artifact

DVC_YAML = """\
# the pipeline
stages:
  embed:   # one model
    cmd: proteus stage embed
    params:
      - composed.yaml:
          - embedding.layer

artifacts:
  other:
    path: models/other   # theirs
    type: model
"""


def test_comments_and_order_stay_and_the_model_is_added():
    text = declare_artifact(DVC_YAML, "esm2")
    for line in DVC_YAML.splitlines():
        assert line.split("#")[0].strip() in text
        if "#" in line:
            assert "#" + line.split("#")[1] in text
    value = yaml.safe_load(text)
    assert list(value) == ["stages", "artifacts"]
    assert value["artifacts"] == {
        "other": {"path": "models/other", "type": "model"},
        "esm2": {"path": "models/esm2", "type": "model"},
    }


def test_declaring_again_changes_nothing():
    once = declare_artifact(DVC_YAML, "esm2")
    assert declare_artifact(once, "esm2") == once
    assert declares_artifact(once, "esm2")
    assert not declares_artifact(DVC_YAML, "esm2")


@pytest.mark.parametrize("name", ["esm2", "group/esm2", "123", "2024-01-01", "null", "1e5", "true"])
@pytest.mark.parametrize("text", ["", "artifacts:\n", "stages: {}\n", DVC_YAML])
def test_any_name_can_be_declared_in_any_file(text: str, name: str):
    declared = declare_artifact(text, name)
    assert declares_artifact(declared, name)
    assert yaml.safe_load(declared)["artifacts"][name]["path"] == f"models/{name}"


def test_an_artifact_elsewhere_gets_its_path_and_keeps_the_rest():
    text = "artifacts:\n  esm2:\n    path: elsewhere/esm2\n    desc: ours  # really\n"
    assert not declares_artifact(text, "esm2")
    declared = declare_artifact(text, "esm2")
    assert declares_artifact(declared, "esm2")
    assert "desc: ours  # really" in declared


@pytest.mark.parametrize("text", ["stages: [", "- a list\n", "just words\n"])
def test_a_file_that_is_no_dvc_yaml_is_refused(text: str):
    with pytest.raises(StorageError, match=r"dvc\.yaml at HEAD"):
        declare_artifact(text, "esm2")


@pytest.mark.parametrize("text", ["artifacts: [a]\n", "artifacts: words\n"])
def test_artifacts_that_are_no_mapping_are_refused(text: str):
    with pytest.raises(StorageError, match="artifacts"):
        declare_artifact(text, "esm2")
