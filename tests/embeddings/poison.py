"""Loaded by a test's workers (Dask's own preload): some sequences kill the process that computes them, or fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proteus_pipeline.embeddings import job


def dask_setup(_worker: object) -> None:
    """Put what kills before what computes."""
    sound = job.compute
    kills, fails = os.environ["TEST_KILLS"].split(), os.environ["TEST_FAILS"].split()

    def compute(encoder: Any, recipe: Any, sequences: Mapping[str, str], *more: Any) -> Iterator[Any]:
        for bad in (*kills, *fails):
            if bad in sequences.values():
                with Path(os.environ["TEST_ATTEMPTS"]).open("a") as file:
                    file.write(f"{bad}\n")
                if bad in kills:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise MemoryError("no room for this one")
        return sound(encoder, recipe, sequences, *more)

    job.compute = compute
