"""A project's files are this repository's: nothing drifts apart, in a checkout or in a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, git

from proteus_pipeline.config.composition import compose
from proteus_pipeline.stages import template
from proteus_pipeline.stages.template import MINE, VERSION_KEY, pipeline, project_files


def test_the_pipeline_is_this_repositorys_with_the_version_in_place_of_the_source_files():
    own, theirs = yaml.safe_load((ROOT / "dvc.yaml").read_text()), yaml.safe_load(project_files("m@v1.0.0")["dvc.yaml"])
    assert set(own) - set(theirs) == {"artifacts"}
    assert own["plots"] == theirs["plots"] and list(own["stages"]) == list(theirs["stages"])
    for name, stage in own["stages"].items():
        watched = [dep for dep in stage.get("deps", []) if dep.startswith("proteus_pipeline/")]
        expected = dict(stage)
        expected["deps"] = [dep for dep in stage["deps"] if dep not in watched]
        if not expected["deps"]:
            del expected["deps"]
        if watched:
            expected["params"] = [{"composed.yaml": [VERSION_KEY, *stage["params"][0]["composed.yaml"]]}]
        assert theirs["stages"][name] == expected
        assert not watched or "params" in stage  # else nothing would stand for them
    assert "persist: DVC restores no such output" in pipeline((ROOT / "dvc.yaml").read_text())


def test_conf_and_params_are_this_repositorys():
    files = project_files("esm2_t6_8M_UR50D@v1.0.0")
    committed = git(ROOT, "ls-files", "conf", "params.yaml", "data/demo100.fasta").splitlines()
    same = {name for name in committed if files[name] == (ROOT / name).read_bytes()}
    assert set(committed) - same == {"conf/config.yaml"}
    old, new = (ROOT / "conf/config.yaml").read_text(), files["conf/config.yaml"].decode()
    assert set(new.splitlines()) - set(old.splitlines()) == {"model: esm2_t6_8M_UR50D@v1.0.0"}


def test_a_users_own_files_are_what_is_composed(tmp_path: Path):
    for name, data in project_files("a@v1.0.0", "data/x: 'y'.fasta", "data/labels.csv").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    settings = compose(tmp_path, {}).settings
    assert settings.data.fasta == "data/x: 'y'.fasta" and settings.data.labels == "data/labels.csv"
    assert settings.stages.embed.model == "a@v1.0.0"
    assert (tmp_path / MINE).exists() and not (tmp_path / "data").exists()
    assert (
        yaml.safe_load((tmp_path / MINE).read_text()).keys()
        == yaml.safe_load((ROOT / "conf/data/demo.yaml").read_text()).keys()
    )


def test_every_output_that_git_should_not_have_is_ignored(tmp_path: Path):
    files = project_files("a@v1.0.0")
    git(tmp_path, "init", "--quiet")
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    stages = yaml.safe_load(files["dvc.yaml"])["stages"].values()
    for out in [o for stage in stages for key in ("outs", "metrics") for o in stage.get(key, [])]:
        path, cached = (out, True) if isinstance(out, str) else (next(iter(out)), False)
        done = subprocess.run(["git", "-C", str(tmp_path), "check-ignore", "-q", path], check=False)
        assert (done.returncode == 0) == cached, path


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template, "_PACKAGE", tmp_path / "site" / "proteus_pipeline")
    with pytest.raises(template.StorageError, match="has no template of a project; install proteus_pipeline again"):
        project_files("a@v1.0.0")


def test_a_wheel_makes_the_same_project(tmp_path: Path):
    source = tmp_path / "source"
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
        if name.startswith(("proteus_pipeline/", "conf/", "data/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = "import json, proteus_pipeline.stages.template as t; "
    program += "print(t.__file__); print(json.dumps({n: d.decode() for n, d in t.project_files('a@v1.0.0').items()}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    where, files = done.stdout.splitlines()
    assert where.startswith(str(tmp_path / "site"))
    assert {n: d.encode() for n, d in yaml.safe_load(files).items()} == project_files("a@v1.0.0")
