"""The figures that README quotes, each with bounds: run.py says whether it saw them within those."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from _figures import Figure, shown

# A row of README's table: what it means, median (bounds), program: the figure's name.
_ROW = re.compile(r"^\|[^|]+\| *([\d.]+) \(([\d.]+) to ([\d.]+)\) *\| *`(\w+)`: ([^|]+?) *\|$", re.MULTILINE)


@dataclass(frozen=True)
class Quoted:
    """A figure as README has it."""

    value: float
    low: float
    high: float
    program: str
    name: str

    def within(self, figure: Figure) -> bool:
        return self.low <= figure.value <= self.high

    @property
    def spread(self) -> str:
        return f"{shown(self.value)} ({shown(self.low)} to {shown(self.high)})"


def quoted(readme: str) -> list[Quoted]:
    """Return what a README quotes, in its order."""
    return [
        Quoted(float(value), float(low), float(high), program, name)
        for value, low, high, program, name in _ROW.findall(readme)
    ]


def compared(quotes: Iterable[Quoted], figures: Iterable[Figure]) -> list[tuple[Quoted, Figure]]:
    """Return each quoted figure beside the one that was seen, for those that were."""
    seen = {(f.program, f.name): f for f in figures}
    return [(q, seen[q.program, q.name]) for q in quotes if (q.program, q.name) in seen]


def table(pairs: list[tuple[Quoted, Figure]]) -> list[str]:
    """Return lines of Markdown: what README says, and what was seen."""
    if not pairs:
        return []
    head = ["## What README quotes", "", "| figure | README | seen | |", "|---|---|---|---|"]
    rows = [
        f"| {q.program}: {q.name} | {q.spread} | {shown(f.value)} | {'within' if q.within(f) else '**outside**'} |"
        for q, f in pairs
    ]
    return [*head, *rows, ""]
