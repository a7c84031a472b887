"""How far the same sequences' embeddings lie apart under two versions of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ModelError
from proteus_pipeline.sequences.fasta import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Embedding = NDArray[np.floating[Any]]

DIGITS = 9


@dataclass(frozen=True)
class Drift:
    """One sequence's drift, to 9 digits.

    Attributes
    ----------
    id
        The sequence's.
    cosine
        Cosine similarity, 1 for the same direction; of per-residue embeddings the smallest over the residues.
    relative_l2
        The distance over the first embedding's length, both over all residues.
    max_abs
        The largest difference of one number.

    """

    id: str
    cosine: float
    relative_l2: float
    max_abs: float


def mismatch(ids: Sequence[str], first: Sequence[Embedding], second: Sequence[Embedding]) -> str | None:
    """Return why two versions' embeddings can't be compared number by number, or None where they can.

    Equal shapes don't make two models' spaces the same: whether the models are versions of one is the caller's to know.
    """
    for name, one, other in zip(ids, first, second, strict=True):
        if one.ndim != other.ndim:
            return f"{shown(name)} has one embedding that is pooled and one that is per residue"
        if one.shape[-1] != other.shape[-1]:
            return f"the versions' embeddings differ in width: {one.shape[-1]} and {other.shape[-1]}"
        if one.shape != other.shape:
            return f"{shown(name)} has {one.shape[0]} residues under one version and {other.shape[0]} under the other"
    return None


def drift(ids: Sequence[str], first: Sequence[Embedding], second: Sequence[Embedding]) -> list[Drift]:
    """Return each sequence's drift from the first version's embedding to the second's, in the order given.

    Parameters
    ----------
    ids
        The sequences' ids.
    first, second
        Their embeddings under the two versions: (D,) pooled or (L, D) per residue, of any float type.

    Raises
    ------
    ModelError
        When shapes differ (ask `mismatch` first), or an embedding is not finite.

    """
    why = mismatch(ids, first, second)
    if why:
        raise ModelError(f"these embeddings can't be compared: {why}", "choose a candidate that is the same model")
    return [_drift(name, one, other) for name, one, other in zip(ids, first, second, strict=True)]


def _drift(name: str, first: Embedding, second: Embedding) -> Drift:
    import numpy as np

    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ModelError(f"the embedding of {shown(name)} is not finite", "embed with embedding.precision=fp32")
    if not one.size:
        return Drift(name, 1.0, 0.0, 0.0)
    difference = other - one
    # An all-zero first embedding has no length to measure by; the second's gives 1, or 0 where both are zero.
    length = float(np.linalg.norm(one) or np.linalg.norm(other) or 1.0)
    return Drift(
        name,
        _rounded(_cosines(np.atleast_2d(one), np.atleast_2d(other)).min()),
        _rounded(float(np.linalg.norm(difference)) / length),
        _rounded(np.abs(difference).max()),
    )


def _cosines(first: Embedding, second: Embedding) -> Embedding:
    """Return each row's cosine similarity: 1 where both rows are zero, 0 where one is."""
    import numpy as np

    lengths, others = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    scale = np.where((lengths > 0) & (others > 0), lengths * others, 1.0)
    cosines = np.clip((first * second).sum(axis=1) / scale, -1.0, 1.0)
    return np.where((lengths == 0) & (others == 0), 1.0, cosines)


def summarise(drifts: Sequence[Drift], why: str | None = None) -> dict[str, object]:
    """Return the drift of all sequences together, ready for JSON.

    >>> summarise([], why="the versions' embeddings differ in width: 320 and 480")
    {'comparable': False, 'why': "the versions' embeddings differ in width: 320 and 480"}

    Parameters
    ----------
    drifts
        What `drift` returned.
    why
        What `mismatch` returned, where nothing could be compared.

    """
    import numpy as np

    if why or not drifts:
        return {"comparable": False, "why": why or "there are no sequences"}
    columns = {key: np.asarray([asdict(one)[key] for one in drifts]) for key in ("cosine", "relative_l2", "max_abs")}
    return {
        "comparable": True,
        "n": len(drifts),
        "median_cosine": _rounded(np.median(columns["cosine"])),
        "min_cosine": _rounded(columns["cosine"].min()),
        "max_relative_l2": _rounded(columns["relative_l2"].max()),
        "max_abs": _rounded(columns["max_abs"].max()),
    }


def _rounded(value: float) -> float:
    return round(float(value), DIGITS) + 0.0
