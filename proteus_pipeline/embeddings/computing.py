"""Sequences through the encoder, window by window: one embedding each, which no cache is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.embeddings.stored import to_stored
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH, Outputs
from proteus_pipeline.models.pooling import finite, pool, pool_residues

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.models.encoder import Encoder

    _Window = tuple[NDArray[np.float32], NDArray[np.float32] | None]


class Progress(Protocol):
    """Told how far the work is."""

    def start(self, total: int, hits: int, tokens: int, peak: float) -> None:
        """Work begins.

        Parameters
        ----------
        total, hits
            Distinct sequences in all, and how many of them the cache had.
        tokens
            To compute.
        peak
            The matrix products this machine was just measured to do, FLOP/s; 0 where that was not worth it.

        """

    def advance(self, sequences: int, tokens: int, flops: float) -> None:
        """Some more sequences were computed, of so many tokens and floating-point operations."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a manifest says of one embedding."""

    key: str
    shape: tuple[int, ...]
    stored: str
    content: str


class Computed(NamedTuple):
    """One embedding in its stored dtype, with the start token's vector, and the residues and tokens of its sequence."""

    key: str
    array: NDArray[np.generic]
    start: NDArray[np.generic] | None
    length: int
    tokens: int


def compute(
    encoder: Encoder, recipe: Recipe, sequences: Mapping[str, str], token_budget: int = TOKENS_PER_BATCH
) -> Iterator[Computed]:
    """Yield each sequence's embedding, in its stored dtype, as soon as its last window is done; no cache is asked.

    Parameters
    ----------
    encoder
        Over the weights.
    recipe
        What to compute.
    sequences
        By key.
    token_budget
        Tokens in one pass.

    Raises
    ------
    ModelError
        When the weights give what is no number.

    """
    layer = recipe.layer
    parts, owners = [], []
    spans = {key: spans_of(s, recipe) for key, s in sequences.items()}
    for key, sequence in sequences.items():
        for number, (start, end) in enumerate(spans[key]):
            parts.append(sequence[start:end])
            owners.append((key, number))
    waiting: dict[str, dict[int, _Window]] = {}
    for index, encoded in encoder.compute(parts, Outputs.to_pool(layer, recipe.pooling), token_budget):
        key, number = owners[index]
        windowed = waiting.setdefault(key, {})
        windowed[number] = encoded.hidden[layer], encoded.received.get(layer)
        if len(windowed) == len(spans[key]):
            del waiting[key]
            yield _rounded(key, spans[key], [windowed[n] for n in range(len(windowed))], recipe)


def _rounded(key: str, spans: list[tuple[int, int]], windowed: list[_Window], recipe: Recipe) -> Computed:
    """Return a sequence's embedding from its windows' outputs."""

    def merged(pooling: str) -> NDArray[np.generic]:
        return to_stored(finite(_merge(windowed, spans, pooling), recipe.precision), recipe.stored)

    start = merged("cls") if recipe.pooling == "per_residue" else None
    return Computed(key, merged(recipe.pooling), start, spans[-1][1], tokens_of(spans))


def spans_of(sequence: str, recipe: Recipe) -> list[tuple[int, int]]:
    """Return the (start, end) of each window over a sequence."""
    return windows(len(sequence), recipe.window, recipe.overlap)


def tokens_of(spans: list[tuple[int, int]]) -> int:
    """Return the tokens of a sequence's windows: each has a start and an end token."""
    return sum(end - start + 2 for start, end in spans)


def _merge(windowed: list[_Window], spans: list[tuple[int, int]], pooling: str) -> NDArray[np.float32]:
    """Return a sequence's embedding: residues averaged over the windows they lie in, then pooled.

    ``cls`` is the mean of the windows' start tokens; the attention that a residue receives is averaged as it is.
    """
    if len(windowed) == 1:
        hidden, received = windowed[0]
        return pool(hidden, pooling, received)
    if pooling == "cls":
        return pool_residues(np.stack([hidden[0] for hidden, _ in windowed]), "mean")
    residues = _averaged([hidden[1:-1] for hidden, _ in windowed], spans)
    if pooling == "per_residue":
        return residues
    weights = [received[:, None] for _, received in windowed if received is not None]
    return pool_residues(residues, pooling, _averaged(weights, spans)[:, 0] if weights else None)


def _averaged(windowed: list[NDArray[np.float32]], spans: list[tuple[int, int]]) -> NDArray[np.float32]:
    """Return (L, n) rows, each the mean of those of the windows that it lies in."""
    length = spans[-1][1]
    total, count = np.zeros((length, windowed[0].shape[1]), dtype=np.float64), np.zeros((length, 1))
    for (start, end), rows in zip(spans, windowed, strict=True):
        total[start:end] += rows
        count[start:end] += 1
    return (total / count).astype(np.float32)
