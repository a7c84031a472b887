"""From one hidden state per token to what is stored. In numpy, so that a stored per-residue entry pools to the same bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from proteus_pipeline.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POOLINGS = ("mean", "cls", "max", "attention", "per_residue")


def finite(array: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    """Return an output as it is; ModelError where it holds what is no number."""
    import numpy as np

    if not np.isfinite(array).all():
        raise ModelError(
            f"in {precision}, these weights give what is no number",
            "look at the weights: proteus model verify; or use embedding.precision=fp32",
        )
    return array


def pool(hidden: NDArray[np.float32], pooling: str, received: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Pool one sequence's hidden states.

    Parameters
    ----------
    hidden
        (L + 2, D): the start token, the residues, the end token.
    pooling
        ``mean`` or ``max`` over residues (start and end excluded, as in fair-esm's extract), ``cls`` for the start
        token, ``attention`` for the mean of the residues weighted by `received`, ``per_residue`` for all residues.
    received
        (L,), the attention that each residue receives; only ``attention`` needs it.

    Returns
    -------
    NDArray
        (D,), or (L, D) for ``per_residue``.

    """
    residues = hidden[1:-1]
    if pooling == "per_residue":
        return residues.copy()
    if pooling == "cls":
        start: NDArray[np.float32] = hidden[0].copy()
        return start
    return pool_residues(residues, pooling, received)


def pool_residues(
    residues: NDArray[np.float32], pooling: str, received: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Pool (L, D) residues to (D,) by ``mean``, ``max`` or ``attention``.

    Means are summed in fp64, one row after the other, and rounded once: no thread count or vector width enters.
    """
    import numpy as np

    if pooling == "attention":
        assert received is not None  # noqa: S101 - whoever asks for it has it computed
        weights = received.astype(np.float64)
        weighted = np.add.reduce(np.multiply(residues, weights[:, None], order="C"), axis=0) / math.fsum(weights)
        return np.asarray(weighted, dtype=np.float32)

    if pooling == "max":
        return np.ascontiguousarray(residues.max(axis=0))
    if pooling == "mean":
        total = np.add.reduce(residues, axis=0, dtype=np.float64)
        mean: NDArray[np.float32] = (total / residues.shape[0]).astype(np.float32)
        return mean
    raise ValueError(f"no pooling called {pooling!r}")
