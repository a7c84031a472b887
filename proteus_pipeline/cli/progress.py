"""Progress: a bar on a terminal, a plain line now and then elsewhere. On stderr, so that output can be piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from proteus_pipeline.stages.notes import quiet

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

# The first line soon, each later one after twice the time, and then one every so many seconds.
_FIRST_LINE_S, _LINE_EVERY_S = 1.0, 10.0


class EmbeddingProgress:
    """Sequences done, tokens a second, of what the machine can do, and time left; use as a context manager."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._todo = self._done = self._all_tokens = self._tokens = 0
        self._flops = self._peak = 0.0
        self._began = time.perf_counter()
        self._due = _FIRST_LINE_S

    def start(self, total: int, hits: int, tokens: int, peak: float) -> None:
        self._todo, self._all_tokens, self._peak = total - hits, tokens, peak
        self._began, self._due = time.perf_counter(), _FIRST_LINE_S
        if not self._todo or quiet():
            return
        if sys.stderr.isatty():
            self._start_bar(hits)
        else:
            self._say(f"{self._label}: {total} distinct sequences, {hits} known, {self._todo} to compute")

    def advance(self, sequences: int, tokens: int, flops: float) -> None:
        self._done += sequences
        self._tokens += tokens
        self._flops += flops
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rate = self._tokens / seconds
        share = f", {self._flops / seconds / self._peak:.0%} of this machine's matrix products" if self._peak else ""
        if quiet():
            return
        if self._bar is not None and self._task is not None:
            told = f"{self._done}/{self._todo} sequences, {rate:,.0f} tokens/s{share}"
            self._bar.update(self._task, advance=tokens, told=told)
        elif seconds >= self._due:
            self._due = seconds + min(seconds, _LINE_EVERY_S)
            # By tokens: the longest sequences come first, so a count of sequences would promise too long a wait.
            left = (self._all_tokens - self._tokens) / rate
            self._say(
                f"{self._label}: {self._done} of {self._todo} computed, {rate:,.0f} tokens/s{share}, {left:.0f} s left"
            )

    def _start_bar(self, hits: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(f"{self._label} ({hits} known)", total=self._all_tokens, told="")

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class DownloadProgress:
    """Bytes fetched, as a line at the start and at every tenth."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._tenth = -1

    def __call__(self, done: int, total: int | None) -> None:
        tenth = int(10 * done / total) if total else done // (64 << 20)
        if tenth != self._tenth and not quiet():
            self._tenth = tenth
            of = f" of {total / 1e6:,.0f}" if total else ""
            print(f"{self._label}: {done / 1e6:,.0f}{of} MB", file=sys.stderr, flush=True)
