"""What a shell and a terminal see: completion, colours, quiet and verbose, Ctrl-C."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from layouts import write_official

from proteus_pipeline import ModelInterface, ModelVersionManager
from proteus_pipeline.cli.main import main
from proteus_pipeline.stages.new_project import create


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    """A project with a version of a small model; nobody changes it."""
    tmp_path = tmp_path_factory.mktemp("shell")
    root = create(tmp_path / "mine").root
    manager = ModelVersionManager(root)
    manager.register_version(
        ModelInterface("tiny", manager, weights=write_official(tiny, tmp_path / "tiny.pt")), "1.0.0"
    )
    return root


def offered(root: Path, line: str) -> list[str]:
    """What a shell is offered, by argcomplete's own protocol, as its bash function speaks it."""
    answer = root.parent / "answer"
    env = os.environ | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    env |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "PYTHONPATH": str(ROOT)}
    env |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n"}
    command = [sys.executable, "-m", "proteus_pipeline"]
    subprocess.run(command, cwd=root, env=env, check=True, capture_output=True)
    return answer.read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("proteus ", {"init", "run", "model", "doctor"}, set()),
        ("proteus model re", {"register", "restore"}, {"list"}),
        ("proteus model register --b", {"--bump", "--breaking"}, {"--version"}),
        ("proteus model register x --bump ", {"major", "auto"}, set()),
        ("proteus model show ti", {"tiny@v1.0.0", "tiny@latest", "tiny"}, set()),
        ("proteus model history t", {"tiny"}, {"tiny@latest"}),
        ("proteus run emb", {"embedding.layer=", "embedding.pooling="}, {"probe.folds="}),
        ("proteus run model=", {"model=tiny@v1.0.0", "model=tiny@current"}, set()),
        ("proteus run da", {"data=", "data.fasta="}, {"groups.data="}),
        ("proteus embed data/demo", {"data/demo100.fasta"}, set()),
        ("proteus cache invalidate ti", {"tiny@v1.0.0"}, set()),
        ("proteus cache plan data/d", {"data/demo100.fasta"}, set()),
        ("proteus cache gc ca", {"cache.path="}, set()),
    ],
)
def test_completion(project: Path, line: str, some: set[str], none: set[str]):
    found = {word.strip() for word in offered(project, line)}
    assert some <= found and not none & found


def test_completion_in_no_project_or_a_broken_one(tmp_path: Path, project: Path):
    (tmp_path / "elsewhere").mkdir()
    assert "embedding.layer=" in offered(tmp_path / "elsewhere", "proteus run embedding.l")[0]
    broken = create(tmp_path / "broken").root
    (broken / "params.yaml").write_text("a: ]")
    assert offered(broken, "proteus run emb") == [""]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_code(shell: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "proteus" in code and "_ARGCOMPLETE" in code
    if shutil.which(shell):
        checked = {"bash": ["-n"], "zsh": ["-n"], "fish": ["--no-execute"]}[shell]
        subprocess.run([shell, *checked], input=code, text=True, check=True)
    if shell == "bash":
        done = subprocess.run(
            ["bash", "-c", f"{code}\ncomplete -p proteus"], check=True, capture_output=True, text=True
        )
        assert "-F _python_argcomplete proteus" in done.stdout


def on_a_terminal(folder: Path, *words: str, **variables: str) -> str:
    """What a command prints where its stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "TERM"}} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "proteus_pipeline", *words]
    child = subprocess.Popen(command, cwd=folder, env=env | variables, stdout=follower, stderr=follower)
    os.close(follower)
    printed = b""
    try:
        while block := os.read(leader, 1 << 16):
            printed += block
    except OSError:
        pass  # the child's end is closed
    child.wait()
    os.close(leader)
    return printed.decode()


def test_colours_are_for_terminals_that_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = ("verify", "--seed", "1")
    assert on_a_terminal(tmp_path, *wrong, TERM="xterm").startswith("\x1b[31mproteus:\x1b[0m ")
    for variables in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_a_terminal(tmp_path, *wrong, **variables).startswith("proteus: ")
    assert main(["model", "show", "nobody", "--home", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("proteus: ")


def test_quiet_and_verbose_stand_before_a_verb_or_after_it(project: Path, tmp_path: Path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(project)
    for name in ("PROTEUS_QUIET", "PROTEUS_VERBOSE"):
        monkeypatch.setenv(name, "")  # so that what main sets is undone
    for words in (["-v", "model", "history", "tiny"], ["model", "history", "tiny", "--verbose"]):
        caplog.clear()
        assert main(words) == 0
        assert any(record.getMessage().startswith("git -C") for record in caplog.records)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    Path("long.fa").write_text(f">x\n{'M' * 2000}\n")
    for words, said in ((["init", "a"], True), (["-q", "init", "b"], False), (["init", "c", "--quiet"], False)):
        monkeypatch.setenv("PROTEUS_QUIET", "")
        assert main([*words, "--fasta", "long.fa"]) == 0
        assert ("note: the first run would refuse it" in capsys.readouterr().err) == said


def test_ctrl_c_before_anything_has_begun(tmp_path: Path):
    """While modules are being imported, too: one line and 130."""
    program = "import signal, os, sys; from proteus_pipeline.cli import main as m\n"
    program += "m.parser = lambda *_: os.kill(os.getpid(), signal.SIGINT)\nsys.exit(m.main(['run']))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr.startswith("proteus: interrupted") and done.stderr.count("\n") == 1
