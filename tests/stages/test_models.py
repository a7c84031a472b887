"""The stages' models: loaded once through the project's cache, within what the settings allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_checkpoint

from proteus_pipeline import CacheMemoryError, IntegrityError, ModelInterface
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.stages.embed import stage_encoder
from proteus_pipeline.stages.project import Project


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Project:
    (repository / "conf/model").mkdir(parents=True)
    made = Project(repository, repository)
    for version, seed in (("1.0.0", 0), ("1.0.1", 1)):
        write_folder(make_checkpoint(seed=seed), tmp_path / f"{seed}")
        made.manager.register_version(ModelInterface("m", weights=tmp_path / f"{seed}"), version)
    return made


def composed(project: Project, *, precision: str = "fp32", max_memory_gb: float | None = None) -> dict[str, Any]:
    def model(reference: str) -> dict[str, Any]:
        return {"reference": reference, "trunk_digest": project.manager.resolve(reference).checkpoint.trunk_digest}

    return {
        "runtime": {"device": "cpu", "threads": None, "tokens_per_batch": 64, "max_memory_gb": max_memory_gb},
        "embedding": {"precision": precision, "numerics": "strict"},
        "stages": {"embed": {"model": model("m@v1.0.0")}, "compare": {"model": model("m@v1.0.1")}},
    }


def test_two_stages_models_are_in_one_cache_and_a_third_stage_loads_none(project: Project):
    settings = composed(project)
    first, second = (stage_encoder(project, settings, stage) for stage in ("embed", "compare"))
    assert stage_encoder(project, settings, "embed") is first is not second
    stats = project.models(settings).get_cache_stats()
    assert (stats["loads"], len(stats["models"])) == (2, 2)


def test_other_settings_are_other_models(project: Project):
    one, two = composed(project), composed(project, precision="bf16")
    assert stage_encoder(project, one, "embed") is not stage_encoder(project, two, "embed")
    assert project.models(two).get_cache_stats()["loads"] == 1


def test_without_a_limit_all_of_the_machine_is_there(project: Project):
    stats = project.models(composed(project)).get_cache_stats()
    assert stats["limited_by"] in {"this machine's memory", "cgroup"}
    assert stats["limit_bytes"] > 1e9


def test_a_model_without_room_is_refused_with_the_numbers(project: Project):
    with pytest.raises(CacheMemoryError, match=r"m@v1.0.0 takes .* and the limit is 0.1 MB \(max_memory_gb\)"):
        stage_encoder(project, composed(project, max_memory_gb=1e-4), "embed")


def test_other_weights_than_were_composed_are_refused_and_not_loaded(project: Project):
    settings = composed(project)
    settings["stages"]["embed"]["model"]["trunk_digest"] = "0" * 32
    with pytest.raises(IntegrityError, match="run: dvc repro compose"):
        stage_encoder(project, settings, "embed")
    assert project.models(settings).get_cache_stats()["loads"] == 0
