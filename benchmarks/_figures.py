"""How the benchmarks take their times, and how they say a figure: its name, value, spread, bar, and whether it holds.

A figure is printed, and, where PROTEUS_BENCH_FIGURES names a file, added to it as a line of JSON; run.py collects those.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "PROTEUS_BENCH_FIGURES"


@dataclass(frozen=True)
class Spread:
    """A ratio of two sides that were timed in the same rounds: the median of the rounds' ratios, the least, the greatest."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """What a program found: `bar` is None where nothing was promised."""

    program: str
    name: str
    value: float
    low: float | None
    high: float | None
    bar: float | None
    least: bool

    @property
    def holds(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.least else self.value <= self.bar

    def __str__(self) -> str:
        spread = f" ({self.spread})" if self.spread else ""
        bar = f" (bar: {self.promised}) {'holds' if self.holds else 'MISSED'}" if self.bar is not None else ""
        return f"{self.name}: {shown(self.value)}{spread}{bar}"

    @property
    def spread(self) -> str:
        return "" if self.low is None or self.high is None else f"{shown(self.low)} to {shown(self.high)}"

    @property
    def promised(self) -> str:
        return "" if self.bar is None else f"at {'least' if self.least else 'most'} {self.bar:g}"


def shown(value: float) -> str:
    """Return a number in as many digits as tell it from its bar: four, and more where it is next to 1."""
    return f"{value:.6f}" if 0.999 < value < 1 else f"{value:.4g}"


def said(name: str, value: float | Spread, bar: float | None = None, *, least: bool = True) -> bool:
    """Say a figure; return whether its bar holds, and True where there is none."""
    ends = (value.low, value.high) if isinstance(value, Spread) else (None, None)
    number = value.value if isinstance(value, Spread) else value
    figure = Figure(Path(sys.argv[0]).stem, name, float(number), *ends, bar, least)
    print(f"  {figure}", flush=True)
    if place := os.environ.get(FILE):
        with Path(place).open("a") as file:
            file.write(json.dumps(asdict(figure)) + "\n")
    return figure.holds is not False


def read(place: Path) -> list[Figure]:
    """Return the figures that programs have added to a file."""
    return [Figure(**json.loads(line)) for line in place.read_text().splitlines()] if place.exists() else []


class Taken:
    """Seconds of several sides, each in every round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def add(self, seconds: Mapping[str, float]) -> None:
        self.rounds.append(dict(seconds))

    def median(self, side: str) -> float:
        return statistics.median(seconds[side] for seconds in self.rounds)

    def ratio(self, side: str, other: str) -> Spread:
        """Return how many times the other's seconds a side took; of each round, so that a slow minute slows both."""
        ratios = [seconds[side] / seconds[other] for seconds in self.rounds]
        return Spread(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return ", ".join(f"{side} {1e3 * self.median(side):.0f} ms" for side in self.rounds[0])


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_round(
    sides: Mapping[str, Callable[[], Any]], order: random.Random, *, warm_up: bool = False
) -> dict[str, float]:
    """Return each side's seconds, taken once, one after another in an order by chance; to warm up, all work once before."""
    names = order.sample(list(sides), len(sides))
    if warm_up:
        for name in names:
            sides[name]()
    seconds = {name: timed(sides[name]) for name in names}
    return {name: seconds[name] for name in sides}


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int) -> Taken:
    """Time all sides in every round; a first round warms up and is not counted."""
    taken, order = Taken(), random.Random(0)
    for number in range(rounds + 1):
        seconds = one_round(sides, order)
        if number:
            taken.add(seconds)
    return taken


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parsed(of: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Return the arguments, with other defaults for `--quick`: what is written on the command line holds in any case."""
    of.add_argument("--quick", action="store_true", help=f"less of everything: {quick}")
    # argparse asks of what is typed whether there is such an argument and whether it may be chosen, and not of defaults.
    actions = {action.dest: action for action in of._actions}  # noqa: SLF001
    for name, value in quick.items():
        choices = actions[name].choices if name in actions else ()
        if wrong := [
            v for v in (value if isinstance(value, list) else [value]) if choices is not None and v not in choices
        ]:
            raise ValueError(f"--quick is to take {wrong[0]} for {name}, which is none of {list(choices or ())}")
    if of.parse_known_args()[0].quick:
        of.set_defaults(**quick)
    return of.parse_args()
