"""How benchmarks say their figures, and how run.py collects them: with programs of our own, in real processes."""

from __future__ import annotations

import importlib
import json
import os
import random
import time
from pathlib import Path

import pytest
import run
from _figures import FILE, Figure, Spread, Taken, in_turn, one_round, parsed, parser, read, said, shown
from _quoted import quoted
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

SECONDS = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=9)


def test_a_figure_is_printed_and_added_to_the_file(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "figures"))
    monkeypatch.setattr("sys.argv", ["benchmarks/some_program.py"])
    assert said("write, our speed", Spread(2.0, 1.5, 2.5), 1.5)
    assert not said("bytes", 0.9, 0.87, least=False)
    assert said("no promise", 7)
    assert capsys.readouterr().out.splitlines() == [
        "  write, our speed: 2 (1.5 to 2.5) (bar: at least 1.5) holds",
        "  bytes: 0.9 (bar: at most 0.87) MISSED",
        "  no promise: 7",
    ]
    first, second, third = read(tmp_path / "figures")
    assert first == Figure("some_program", "write, our speed", 2.0, 1.5, 2.5, 1.5, least=True)
    assert (first.holds, second.holds, third.holds) == (True, False, None)


@pytest.mark.parametrize(
    ("value", "text"), [(0.870312, "0.8703"), (0.99998, "0.999980"), (1.0, "1"), (12345.6, "1.235e+04")]
)
def test_a_number_is_shown_so_that_it_can_be_told_from_its_bar(value: float, text: str) -> None:
    assert shown(value) == text


def test_a_bar_that_is_not_a_number_can_not_hold() -> None:
    assert Figure("p", "n", float("nan"), None, None, 1.0, least=True).holds is False
    assert Figure("p", "n", float("nan"), None, None, 1.0, least=False).holds is False


@given(SECONDS)
def test_the_ratio_is_of_the_rounds_and_within_its_spread(rounds: list[tuple[float, float]]) -> None:
    taken = Taken()
    for ours, theirs in rounds:
        taken.add({"ours": ours, "theirs": theirs})
    ratio, other = taken.ratio("ours", "theirs"), taken.ratio("theirs", "ours")
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.low == pytest.approx(1 / other.high)
    slower = Taken()  # a machine that is slower in one round by any factor
    for number, (ours, theirs) in enumerate(rounds):
        slower.add({"ours": ours * (number + 1), "theirs": theirs * (number + 1)})
    assert slower.ratio("ours", "theirs").value == pytest.approx(ratio.value)


def test_sides_take_turns_in_changing_order_and_the_first_round_is_not_counted() -> None:
    called: list[str] = []
    taken = in_turn({name: lambda name=name: called.append(name) for name in "abc"}, 6)
    assert len(taken.rounds) == 6
    rounds = ["".join(called[i : i + 3]) for i in range(0, 21, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert list(one_round({"b": int, "a": int}, random.Random(0))) == ["b", "a"]
    calls: list[int] = []
    one_round({"a": lambda: calls.append(1)}, random.Random(0), warm_up=True)
    assert len(calls) == 2


def test_quick_gives_other_defaults_and_what_is_written_holds(monkeypatch) -> None:
    def count(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["program", *words])
        of = parser("A question?")
        of.add_argument("--count", type=int, default=1000)
        return parsed(of, count=10).count

    assert (count(), count("--quick"), count("--quick", "--count", "5")) == (1000, 10, 5)


def test_quick_takes_what_may_be_chosen() -> None:
    of = parser("A question?")
    of.add_argument("--shape", default="650M", choices=["650M", "8M"])
    with pytest.raises(ValueError, match=r"--quick is to take 35M for shape, which is none of \['650M', '8M'\]"):
        parsed(of, shape="35M")
    with pytest.raises(ValueError, match="--quick is to take 1 for shapes"):
        parsed(parser("A question?"), shapes=1)


@pytest.mark.parametrize("name", run.programs())
def test_each_programs_quick_mode_can_be_had(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", [name, "--quick", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize("name", run.programs())
def test_each_program_has_a_quick_mode_and_says_its_figures_in_the_one_way(name: str) -> None:
    source = (ROOT / "benchmarks" / f"{name}.py").read_text()
    assert "parsed(" in source
    assert "said(" in source
    assert "MISSED" not in source
    assert source.removeprefix('"""').partition("\n")[0].endswith("?"), "a question first: RESULTS.md shows it"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch) -> Path:
    """A folder of three programs: one that works, one that fails, one that hangs with a child of its own."""
    begin = (
        f'"""Is it so?"""\nimport sys\nsys.path.insert(0, {str(ROOT / "benchmarks")!r})\nfrom _figures import said\n'
    )
    (tmp_path / "good.py").write_text(
        begin + 'print("at", __file__)\nsaid("a|b", 2, 3)\nassert sys.argv[1:] == ["--quick"]\n'
    )
    (tmp_path / "bad.py").write_text(begin + 'said("early", 1)\nsys.exit("no disk")\n')
    hang = 'import subprocess\nchild = subprocess.Popen(["sleep", "60"])\nprint(child.pid, flush=True)\nchild.wait()\n'
    (tmp_path / "hangs.py").write_text(begin + hang)
    (tmp_path / "mute.py").write_text(begin)
    (tmp_path / "README.md").write_text("| it is so | 4 (3 to 5) | `good`: b, our speed |\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


def test_what_a_program_said_and_how_it_ended(programs: Path) -> None:
    good, bad, mute = (run.run(name, "--quick", limit=60) for name in ("good", "bad", "mute"))
    assert [(f.program, f.name, f.holds) for f in good.figures] == [("good", "a|b", False)]
    assert (good.question, good.failure, good.missed) == ("Is it so?", "", good.figures)
    assert bad.failure == "exit code 1" and [f.name for f in bad.figures] == ["early"] and "no disk" in bad.printed
    assert mute.failure == "it said no figure"
    text = run.report([good, bad], "quick", [("CPU", "a | b")])
    assert "0 of 1 bars hold. Missed:\n\n- good: a|b: 2 (bar: at least 3) MISSED" in text
    assert "- bad did not run to its end: exit code 1" in text
    assert "| a\\|b | 2 |  | at least 3 | **missed** |" in text
    assert "| CPU | a \\| b |" in text
    assert str(programs) not in text and "at ./good.py" in text


def test_a_program_that_hangs_ends_with_what_it_started(programs: Path) -> None:
    hung = run.run("hangs", limit=3)
    assert hung.failure == "stopped after 3 s" and hung.seconds < 30
    child = int(hung.printed)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_report_is_written_and_the_exit_code_tells(programs: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "good", "--output", str(programs / "R.md")])
    assert run.main() == 3
    assert (programs / "R.md").read_text().startswith("# What the benchmarks said")
    (programs / "good.py").write_text((programs / "good.py").read_text().replace("2, 3", "4, 3"))
    assert run.main() == 0
    monkeypatch.setattr("sys.argv", ["run.py", "bad"])
    assert run.main() == 1
    assert "FAILED: exit code 1" in capsys.readouterr().out
    assert not (programs / "RESULTS.md").exists()
    monkeypatch.setattr("sys.argv", ["run.py", "ugly"])
    with pytest.raises(SystemExit):
        run.main()
    assert "ugly is no benchmark; there are bad, good, hangs, mute" in capsys.readouterr().err


def test_what_readme_quotes_is_held_against_what_is_seen(programs: Path, monkeypatch, capsys) -> None:
    (programs / "good.py").write_text(
        (programs / "good.py").read_text().replace('"a|b", 2, 3', '"b, our speed", 4.5, 3')
    )
    monkeypatch.setattr("sys.argv", ["run.py", "good", "--output", str(programs / "R.md")])
    assert run.main() == 0
    assert "| good: b, our speed | 4 (3 to 5) | 4.5 | within |" in (programs / "R.md").read_text()
    (programs / "good.py").write_text((programs / "good.py").read_text().replace("4.5", "5.5"))
    capsys.readouterr()
    assert run.main() == 3
    assert "README says of good, b, our speed: 4 (3 to 5); seen: 5.5" in capsys.readouterr().out
    assert "| 5.5 | **outside** |" in (programs / "R.md").read_text()


def test_readme_quotes_figures_that_programs_say() -> None:
    quotes = quoted((ROOT / "README.md").read_text())
    assert len(quotes) >= 5
    for quote in quotes:
        assert quote.low <= quote.value <= quote.high
        assert f'"{quote.name}"' in (ROOT / "benchmarks" / f"{quote.program}.py").read_text(), quote


def test_proteins_go_to_the_programs_that_take_any(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    fasta = ROOT / "data" / "demo100.fasta"
    taking = {name for name in run.programs() if run.taking(name, fasta) == ["--fasta", str(fasta)]}
    assert {"cache_store", "cache_again", "encoder_vs_peers", "encoder_memory"} <= taking
    assert not taking & {"registry_listing", "registry_vs_peers", "cache_lookup"}
    assert run.taking("cache_store", None) == []
    monkeypatch.setattr("sys.argv", ["run.py", "--fasta", "nowhere.fasta"])
    with pytest.raises(SystemExit):
        run.main()
    assert "nowhere.fasta is no file" in capsys.readouterr().err


def test_the_machine_says_what_figures_depend_on() -> None:
    facts = dict(run.machine())
    assert {"CPU", "cores", "memory", "Python", "torch", "zarr", "dvc", "gto", "commit"} <= set(facts)
    assert all(facts.values())
    assert int(facts["cores"]) == len(os.sched_getaffinity(0))
    assert json.dumps(facts).find(str(Path.home())) == -1
