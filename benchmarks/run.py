"""Runs all benchmarks, one after another, each in a process of its own, and writes what they say to benchmarks/RESULTS.md.

Quick by default: each program's ``--quick``, made to take under ten minutes in all on two quiet cores. ``--full`` takes what
each program's own documentation says, up to 12 GB of a temporary folder. ``python benchmarks/run.py cache_store`` runs only
these, and writes a report only where ``--output`` says. ``--fasta DB.fasta.gz`` takes the proteins from a file, where a program
takes any. The machine should have nothing else to do: its load is written down beside each program.

Exit code: 0 where every program ran, every bar holds and README's figures were seen within the bounds that it states; 3 where
a bar is missed or a figure of README's is outside; 1 where a program failed.
"""

from __future__ import annotations

import ast
import datetime
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from _figures import FILE, Figure, parser, read, shown
from _quoted import Quoted, compared, quoted, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "RESULTS.md"
PACKAGES = (
    "torch", "numpy", "zarr", "numcodecs", "tensorstore", "h5py", "lmdb", "fair-esm", "transformers", "dvc", "gto", "obstore",
    "boto3", "redis", "distributed",
)  # fmt: skip
QUICK_SECONDS, FULL_SECONDS = 240, 4 * 3600
MISSED = 3


@dataclass(frozen=True)
class Ran:
    """One program: what it said, and how it ended. `load` is what else the machine had to do when it began."""

    name: str
    question: str
    figures: list[Figure]
    printed: str
    seconds: float
    load: float
    failure: str

    @property
    def missed(self) -> list[Figure]:
        return [f for f in self.figures if f.holds is False]


def programs() -> list[str]:
    """Return the names of all benchmark programs."""
    return sorted(p.stem for p in HERE.glob("[a-z]*.py") if p.stem != Path(__file__).stem)


def taking(name: str, fasta: Path | None) -> list[str]:
    """Return what tells a program which proteins to take, if it takes any."""
    if fasta is None or "arguments(__doc__)" not in (HERE / f"{name}.py").read_text(encoding="utf-8"):
        return []
    return ["--fasta", str(fasta.resolve())]


def run(name: str, *arguments: str, limit: float) -> Ran:
    """Run a program; what it has started ends with it."""
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    question = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    load, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder, "figures.jsonl")
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
        with subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {FILE: str(place)}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            try:
                printed, late = process.communicate(timeout=limit)[0], ""
            except subprocess.TimeoutExpired:
                late = f"stopped after {limit:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                printed = process.communicate()[0]
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        failure = late or (f"exit code {process.returncode}" if process.returncode else "")
        if not failure and not read(place):
            failure = "it said no figure"
        return Ran(name, question, read(place), printed, time.perf_counter() - began, load, failure)


def machine() -> list[tuple[str, str]]:
    """Return what the figures depend on, as pairs to show."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) / 1e6 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0.0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("CPU", cpu or platform.machine()), ("cores", str(cores)), ("memory", f"{memory:.1f} GB")]
    found += [("system", platform.system()), ("Python", platform.python_version())]
    found += [("git", _said_by("git", "--version").removeprefix("git version "))]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    commit = _said_by("git", "rev-parse", "--short=12", "HEAD")
    changed = _said_by(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "proteus_pipeline", "benchmarks/*.py"
    )
    return [*found, ("commit", commit + (", with changes" if changed else ""))]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _said_by(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def report(
    ran: list[Ran], mode: str, facts: list[tuple[str, str]], quotes: list[tuple[Quoted, Figure]] | None = None
) -> str:
    """Return RESULTS.md."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    bars = [f for r in ran for f in r.figures if f.bar is not None]
    missed = [f for r in ran for f in r.missed]
    head = (
        f"Written by `make bench` ({mode}) on {today}; don't edit it. A figure is a ratio but where its name has a unit. The spread is"
        " the least and the greatest of the rounds' ratios: each round has all sides in it. Bars are the project's own aims."
    )
    held = f"{len(bars) - len(missed)} of {len(bars)} bars hold." + (" Missed:" if missed else "")
    parts = ["# What the benchmarks said", "", head, "", held, ""]
    parts += [f"- {f.program}: {f}" for f in missed]
    parts += [f"- {r.name} did not run to its end: {r.failure}" for r in ran if r.failure]
    parts += [
        *([""] if missed or any(r.failure for r in ran) else []),
        "| machine | |",
        "|---|---|",
        *(f"| {name} | {_cell(what)} |" for name, what in facts),
        "",
        *table(quotes or []),
    ]
    for r in ran:
        parts += [f"## {r.name}", "", r.question, ""]
        parts += [
            f"{r.seconds:.0f} s; the machine's load was {r.load:.1f} when it began."
            + (f" **{r.failure}**" if r.failure else ""),
            "",
        ]
        if r.figures:
            parts += ["| figure | value | spread | bar | |", "|---|---|---|---|---|"]
            parts += [
                f"| {_cell(f.name)} | {shown(f.value)} | {f.spread} | {f.promised} | {_held(f)} |" for f in r.figures
            ]
            parts += [""]
        parts += [
            "<details><summary>all that it printed</summary>",
            "",
            "```text",
            _printed(r.printed),
            "```",
            "",
            "</details>",
            "",
        ]
    return "\n".join(parts)


def _held(figure: Figure) -> str:
    return {True: "holds", False: "**missed**", None: ""}[figure.holds]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _printed(text: str) -> str:
    """Return what a program printed, without this machine's folders."""
    for folder, name in ((str(ROOT), "."), (tempfile.gettempdir(), "TMP"), (str(Path.home()), "~")):
        text = text.replace(folder, name)
    return text.replace("```", "'''").strip()


def main() -> int:
    of = parser(__doc__)
    of.add_argument("names", nargs="*", metavar="PROGRAM", help="only these; all without it")
    of.add_argument("--fasta", type=Path, help="proteins, for the programs that take any")
    of.add_argument("--full", action="store_true", help="each program as its own documentation has it")
    of.add_argument(
        "--output", type=Path, help="where to write the report; RESULTS.md beside this program where all are run"
    )
    args = of.parse_args()
    if unknown := sorted(set(args.names) - set(programs())):
        of.error(f"{unknown[0]} is no benchmark; there are {', '.join(programs())}")
    output = args.output or (None if args.names else RESULTS)
    if args.fasta and not args.fasta.is_file():
        of.error(f"{args.fasta} is no file; give proteins as FASTA, plain or .gz")
    limit, mode = (FULL_SECONDS, []) if args.full else (QUICK_SECONDS, ["--quick"])
    facts, ran = machine(), []
    for name in args.names or programs():
        print(f"{name}:", flush=True)
        ran.append(run(name, *mode, *taking(name, args.fasta), limit=limit))
        told = [f"  {figure}" for figure in ran[-1].figures]
        told += [f"  FAILED: {ran[-1].failure}", ran[-1].printed] if ran[-1].failure else []
        print("\n".join([*told, f"  {ran[-1].seconds:.0f} s"]), flush=True)
    quotes = compared(quoted((ROOT / "README.md").read_text(encoding="utf-8")), (f for r in ran for f in r.figures))
    outside = [(q, f) for q, f in quotes if not q.within(f)]
    for q, f in outside:
        print(f"README says of {q.program}, {q.name}: {q.spread}; seen: {shown(f.value)}")
    if output:
        output.write_text(report(ran, "full" if args.full else "quick", facts, quotes), encoding="utf-8")
        print(f"{sum(r.seconds for r in ran):.0f} s in all; written to {output}")
    if any(r.failure for r in ran):
        return 1
    return MISSED if outside or any(r.missed for r in ran) else 0


if __name__ == "__main__":
    sys.exit(main())
