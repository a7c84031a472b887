"""A map of embeddings in two dimensions: their first two principal components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.errors import ModelError
from proteus_pipeline.stages.probing import FINITE

if TYPE_CHECKING:
    from numpy.typing import NDArray


def project(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return embeddings' first two principal components, (N, D) to (N, 2), to 6 digits.

    Each axis points so that its largest loading is positive. With fewer than 3 embeddings all are zeros.

    Raises
    ------
    ModelError
        When an embedding is not finite.

    """
    data, points = np.asarray(vectors, np.float64), np.zeros((len(vectors), 2))
    if not np.isfinite(data).all():
        raise ModelError("an embedding is not finite", FINITE)
    if len(data) < 3:
        return points
    data = data - data.mean(axis=0)
    # The smaller of the two Gram matrices has the same leading directions, at a fraction of an SVD's time and memory.
    if data.shape[0] >= data.shape[1]:
        loadings = np.linalg.eigh(data.T @ data)[1][:, ::-1][:, :2]
        scores = data @ loadings
    else:
        squares, scores = (part[..., ::-1][..., :2] for part in np.linalg.eigh(data @ data.T))
        loadings, scores = data.T @ scores, scores * np.sqrt(np.maximum(squares, 0.0))
    largest = np.take_along_axis(loadings, np.abs(loadings).argmax(axis=0)[None], axis=0)
    points[:, : scores.shape[1]] = np.where(largest < 0, -scores, scores)
    return np.asarray(points.round(6) + 0.0)


def variance_shares(vectors: NDArray[np.floating[Any]], axes: NDArray[np.float64]) -> list[float]:
    """Return which share of the (N, D) embeddings' variance lies along each of the map's axes, to 4 digits."""
    data = np.asarray(vectors, np.float64)
    whole = float(np.square(data - data.mean(axis=0)).sum())
    along = np.square(axes - axes.mean(axis=0)).sum(axis=0)
    return [round(float(one) / whole, 4) if whole else 0.0 for one in along]
