"""From one hidden state per token to what is stored. In numpy, so that a stored per-residue entry pools to the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POOLINGS = ("mean", "cls", "max", "per_residue")


def pool(hidden: NDArray[np.float32], pooling: str) -> NDArray[np.float32]:
    """Pool one sequence's hidden states.

    Parameters
    ----------
    hidden
        (L + 2, D): the start token, the residues, the end token.
    pooling
        ``mean`` or ``max`` over residues (start and end excluded, as in fair-esm's extract), ``cls`` for the start
        token, ``per_residue`` for all residues.

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
    return pool_residues(residues, pooling)


def pool_residues(residues: NDArray[np.float32], pooling: str) -> NDArray[np.float32]:
    """Pool (L, D) residues to (D,) by ``mean`` or ``max``.

    The mean is summed in fp64, one row after the other, and rounded once: no thread count or vector width enters.
    """
    import numpy as np

    if pooling == "max":
        return np.ascontiguousarray(residues.max(axis=0))
    if pooling == "mean":
        total = np.add.reduce(residues, axis=0, dtype=np.float64)
        mean: NDArray[np.float32] = (total / residues.shape[0]).astype(np.float32)
        return mean
    raise ValueError(f"no pooling called {pooling!r}")
