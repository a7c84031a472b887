from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, git, make_checkpoint

from proteus_pipeline.cli.main import main
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> dict[str, str]:
    base = tmp_path_factory.mktemp("weights")
    write_folder(tiny, base / "tiny")
    write_folder(make_checkpoint(seed=1), base / "other")
    return {"tiny": str(base / "tiny"), "other": str(base / "other")}


@pytest.fixture
def run(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run proteus in a repository; an error is one line on stderr, whatever it is."""
    monkeypatch.chdir(repository)

    def proteus(*args: str) -> tuple[int, str, str]:
        code = main(["model", *args])
        out, err = capsys.readouterr()
        if code not in {0, 2} or err:
            assert err.count("\n") == 1, err
            assert err.startswith(("proteus: ", "note: "))
        return code, out, err

    return proteus


def test_register_tags_a_version_and_says_so(run: Run, folders: dict[str, str], tiny: Checkpoint, repository: Path):
    code, out, err = run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    assert code == 0
    assert out == f"registered m@v1.0.0: digest {tiny.model_digest}, tag m@v1.0.0\n"
    assert err == "note: git has no user.name here, so the tag is by proteus@localhost\n"
    assert git(repository, "tag") == "m@v1.0.0"


def test_register_keeps_everything_it_is_told(run: Run, folders: dict[str, str], repository: Path):
    git(repository, "config", "user.name", "A")
    git(repository, "config", "user.email", "a@example.org")
    assert run("register", "base", "--version", "1.0.0", "--weights", folders["other"])[0] == 0
    told = [
        "--meta",
        "data=UR50D, v=2",
        "--meta",
        "by=Öberg",
        "--depends",
        "base@1.0.0",
        "--reason",
        "why",
        "--breaking",
        "b",
    ]
    code, out, err = run("register", "m", "--version", "v1.0.0", "--weights", folders["tiny"], *told, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["metadata"] == {"data": "UR50D, v=2", "by": "Öberg"}
    assert (facts["dependencies"], facts["reason"], facts["breaking"]) == (["base@v1.0.0"], "why", "b")
    assert facts["source"] == {"origin": "tiny"}, "no folder of this machine in a tag that is shared"


def test_register_again_is_nothing_new_and_other_weights_are_a_conflict(run: Run, folders: dict[str, str]):
    first = ("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    assert run(*first)[0] == 0
    assert run(*first)[0] == 0
    code, out, err = run("register", "m", "--version", "1.0.0", "--weights", folders["other"])
    assert (code, out) == (5, "")
    assert "m@v1.0.0 exists with other weights" in err
    assert run(*first, "--meta", "a=b")[0] == 5


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["m", "--version", "1.0", "--weights", "."], 2, "the nearest is 1.0.0"),
        (["a b", "--version", "1.0.0", "--weights", "."], 2, "'a b' is no model name"),
        (["m", "--version", "1.0.0", "--weights", "nowhere"], 1, "nowhere does not exist"),
        (["m", "--version", "1.0.0", "--weights", ".dvc"], 1, ".dvc has no config.json"),
        (["m", "--version", "1.0.0", "--weights", ".", "--meta", "words"], 2, "--meta 'words' is no KEY=VALUE"),
        (["m", "--version", "1.0.0", "--weights", ".", "--depends", "^1"], 2, "'^1' is no model name"),
        (["m", "--version", "1.0.0", "--weights", ".", "--home", "."], 1, "config.json"),
    ],
)
def test_what_is_wrong_with_a_registration_is_one_line(
    run: Run, repository: Path, args: list[str], code: int, said: str
):
    found, out, err = run("register", *args)
    assert (found, out) == (code, "")
    assert said in err
    assert git(repository, "tag") == ""


@pytest.mark.parametrize("args", [["register", "m"], ["list", "a", "b"], ["nothing"], ["show"], ["list", "--nothing"]])
def test_usage_is_an_exit_of_2(args: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["model", *args])
    assert caught.value.code == 2
    assert "usage: proteus" in capsys.readouterr().err


def test_no_verb_shows_the_verbs(capsys: pytest.CaptureFixture[str]):
    assert main(["model"]) == 2
    assert "register" in capsys.readouterr().out


def test_list_names_its_home_and_what_there_is(run: Run, folders: dict[str, str], repository: Path, tiny: Checkpoint):
    code, out, _ = run("list")
    assert code == 0
    assert out.startswith(f"models in {repository}\n  none; ")
    assert json.loads(run("list", "--json")[1]) == {"home": str(repository), "versions": []}
    for version, which in (("1.0.0", "tiny"), ("1.1.0", "other")):
        run("register", "m", "--version", version, "--weights", folders[which])
    run("register", "lab/n", "--version", "1.0.0", "--weights", folders["tiny"])
    git(repository, "tag", "m@v2.0.0-rc.1", "m@v1.0.0^{commit}")
    lines = run("list")[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["lab/n@v1.0.0", "m@v1.0.0", "m@v1.1.0", "m@v2.0.0-rc.1"]
    assert [line.split()[0] for line in lines if line.endswith("current")] == ["lab/n@v1.0.0", "m@v1.1.0"]
    assert f"trunk {tiny.trunk_digest[:12]}" in lines[2]
    assert lines[4].endswith("no record; proteus model adopt m@v2.0.0-rc.1")
    value = json.loads(run("list", "m", "--json")[1])
    assert [(v["reference"], v["current"]) for v in value["versions"]] == [
        ("m@v1.0.0", False), ("m@v1.1.0", True), ("m@v2.0.0-rc.1", False)
    ]  # fmt: skip
    assert value["versions"][0]["components"] == tiny.digests


def test_list_of_an_unknown_model_names_those_that_are_known(run: Run, folders: dict[str, str], repository: Path):
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    code, out, err = run("list", "nobody")
    assert (code, out) == (1, "")
    assert (
        err == f"proteus: no model nobody is registered in {repository}; registered there: m; see proteus model list\n"
    )


def test_show_tells_all_of_one_version(run: Run, folders: dict[str, str], tiny: Checkpoint):
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"], "--meta", "data=UR50D")
    code, out, _ = run("show", "m")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert code == 0
    assert (facts["reference"], facts["model_digest"]) == ("m@v1.0.0", tiny.model_digest)
    assert json.loads(facts["metadata"]) == {"data": "UR50D"}
    value = json.loads(run("show", "m@1.x", "--json")[1])
    assert (value["reference"], value["components"]) == ("m@v1.0.0", tiny.digests)


@pytest.mark.parametrize(("reference", "code"), [("m@v9.0.0", 1), ("m@9.x", 1), ("nobody", 1), ("m@^1", 2), ("m@1", 2)])
def test_show_of_what_is_not_there_is_one_line(run: Run, folders: dict[str, str], reference: str, code: int):
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    found, out, err = run("show", reference)
    assert (found, out) == (code, "")
    assert err.startswith("proteus: ")


def test_pull_finds_damage_and_force_mends_it_from_the_source(
    run: Run, folders: dict[str, str], repository: Path, tiny: Checkpoint
):
    catalogue = repository / "conf" / "model"
    catalogue.mkdir(parents=True)
    source = f"{{kind: file, path: {folders['tiny']}}}"
    (catalogue / "m.yaml").write_text(
        f"name: m\ndescription: tiny\nlicence: MIT\nversions:\n  '1.0.0':\n    source: {source}\n"
    )
    assert run("pull", "m@v1.0.0")[:2] == (0, "m@v1.0.0 is here\n")
    manager = ModelVersionManager(repository)
    files = DvcCache(repository).files(manager.resolve("m").pointer)
    assert files is not None
    path = files["model-layer-0.safetensors"]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    path.chmod(0o444)
    shutil.move(str(catalogue / "m.yaml"), str(repository / "aside"))
    code, _, err = run("pull", "m@v1.0.0", "--force")
    assert code == 4
    assert "m@v1.0.0 in the DVC cache are damaged, and no sound copy was found" in err
    shutil.move(str(repository / "aside"), str(catalogue / "m.yaml"))
    code, out, _ = run("pull", "m@v1.0.0", "--force", "--json")
    assert (code, json.loads(out)["reference"]) == (0, "m@v1.0.0")
    assert manager.resolve("m").checkpoint.model_digest == tiny.model_digest
    assert run("pull", "m@v2.0.0")[0] == 1


def test_home_is_another_registry(run: Run, folders: dict[str, str], tmp_path: Path, repository: Path):
    home = str(tmp_path / "another home")
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"], "--home", home)
    assert json.loads(run("list", "--json", "--home", home)[1])["home"] == home
    assert git(repository, "tag") == ""


def test_outside_any_repository_a_folder_of_other_things_is_one_line(run: Run, tmp_path: Path):
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "file").touch()
    code, _, err = run("list", "--home", str(tmp_path / "things"))
    assert code == 1
    assert "is not in a git repository" in err


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_a_listing_outside_a_project_makes_no_home(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    home = Path.home() / ".proteus" / "versions"
    code, out, _ = run("list", *args)
    assert (code, str(home) in out) == (0, True)
    assert json.loads(out)["versions"] == [] if args else "none" in out
    assert run("show", "m")[0] == 1
    assert run("list", "m")[0] == 1
    assert run("pull", "m@v1.0.0")[0] == 1
    assert not (Path.home() / ".proteus").exists()
    code, _, err = run("list", "--home", str(tmp_path / "mistyped"))
    assert (code, "mistyped does not exist" in err) == (1, True)


def test_list_says_which_record_is_damaged(run: Run, folders: dict[str, str], repository: Path):
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    git(repository, *who, "tag", "-a", "-m", "T\n\nproteus-record: 1\n{", "other@v1.0.0")
    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "damaged record" in line] == ["other@v1.0.0"]
    [good, bad] = json.loads(run("list", "--json")[1])["versions"]
    assert ("damage" in good, "tag other@v1.0.0 was edited or damaged" in bad["damage"]) == (False, True)
    assert run("show", "m@v1.0.0")[0] == 0
    assert run("show", "other")[0] == 4


@pytest.fixture
def project(repository: Path, folders: dict[str, str]) -> Path:
    """A repository with the project's conf/, whose model floats."""
    shutil.copytree(ROOT / "conf", repository / "conf")
    shutil.copy(ROOT / "params.yaml", repository / "params.yaml")
    text = (repository / "params.yaml").read_text().replace("\nmodel:", "\nmodel: m@1.x #")
    (repository / "params.yaml").write_text(text)
    return repository


def test_lock_writes_what_floating_references_mean_and_update_moves_them(
    run: Run, project: Path, folders: dict[str, str], tiny: Checkpoint
):
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    assert run("lock", "--dry-run")[:2] == (0, "m@1.x would be v1.0.0\nmodels.lock is as it was\n")
    assert run("lock")[:2] == (0, "m@1.x is v1.0.0\nmodels.lock is written; commit it\n")
    text = (project / "models.lock").read_text()
    assert tiny.trunk_digest in text
    assert run("lock")[:2] == (0, "models.lock is up to date\n")
    run("register", "m", "--version", "1.1.0", "--weights", folders["other"])
    assert run("lock")[:2] == (0, "models.lock is up to date\n")
    assert (project / "models.lock").read_text() == text
    code, out, _ = run("lock", "--update", "--json")
    assert code == 0
    assert json.loads(out)["m@1.x"]["version"] == "1.1.0"
    assert "version: 1.1.0" in (project / "models.lock").read_text()


def test_lock_of_what_is_not_there_is_one_line(run: Run, project: Path):
    assert run("lock")[0] == 1
    (project / "models.lock").write_text("schema: 9\n")
    code, _, err = run("lock")
    assert code == 2
    assert "schema 9" in err


def test_a_reference_that_is_not_locked_is_an_exit_of_3(
    run: Run, project: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    run("register", "m", "--version", "1.0.0", "--weights", folders["tiny"])
    assert main(["stage", "compose"]) == 3
    err = capsys.readouterr().err
    assert err.endswith("models.lock does not hold; run: proteus model lock\n")
    assert err.count("\n") == 1
    assert not (project / "composed.yaml").exists()


def test_debug_shows_where(repository: Path, monkeypatch: pytest.MonkeyPatch):
    from proteus_pipeline.errors import VersionNotFoundError

    monkeypatch.chdir(repository)
    with pytest.raises(VersionNotFoundError):
        main(["--debug", "model", "show", "nobody"])
