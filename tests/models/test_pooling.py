"""Pooling, against the definition written out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from proteus_pipeline.errors import ModelError
from proteus_pipeline.models.pooling import POOLINGS, finite, pool, pool_residues

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
HIDDEN = st.tuples(st.integers(3, 12), st.integers(1, 6)).flatmap(lambda s: arrays(np.float32, s, elements=FLOATS))


def bits(array: np.ndarray) -> bytes:
    assert array.dtype == np.float32
    return array.tobytes()


@given(HIDDEN)
def test_the_mean_is_the_exact_mean_of_residues_rounded(hidden: np.ndarray):
    for column, got in enumerate(pool(hidden, "mean")):
        values = [Fraction(float(x)) for x in hidden[1:-1, column]]
        exact, largest = sum(values) / len(values), max(abs(v) for v in values)
        # Half a unit in the last place of fp32, and what a dozen fp64 additions can lose.
        assert abs(Fraction(float(got)) - exact) <= abs(exact) * Fraction(1, 1 << 24) + largest / (1 << 48) + Fraction(
            1, 1 << 148
        )


@given(HIDDEN)
def test_the_other_poolings_are_rows_and_maxima(hidden: np.ndarray):
    assert bits(pool(hidden, "cls")) == bits(hidden[0])
    assert bits(pool(hidden, "per_residue")) == bits(hidden[1:-1])
    assert pool(hidden, "max").tolist() == [max(hidden[1:-1, c].tolist()) for c in range(hidden.shape[1])]


@given(HIDDEN)
def test_stored_residues_pool_to_the_same_bits(hidden: np.ndarray):
    residues = pool(hidden, "per_residue")
    for pooling in ("mean", "max"):
        direct = bits(pool(hidden, pooling))
        assert bits(pool_residues(residues, pooling)) == direct
        assert bits(pool_residues(np.asfortranarray(residues), pooling)) == direct
        assert bits(pool_residues(np.repeat(residues, 2, axis=1)[:, ::2], pooling)) == direct


def test_the_mean_is_summed_in_fp64_one_row_after_the_other():
    rng = np.random.default_rng(0)
    residues = rng.normal(0, 1, (3000, 5)).astype(np.float32) * np.float32(1e4)
    total = np.zeros(5)
    for row in residues:
        total = total + row
    assert bits(pool_residues(residues, "mean")) == bits((total / 3000).astype(np.float32))
    assert bits(pool_residues(np.asfortranarray(residues), "mean")) == bits(pool_residues(residues, "mean"))
    big = np.array([[1e8], [1.0], [-1e8], [1.0]], dtype=np.float32)
    assert pool_residues(big, "mean").tolist() == [0.5]  # fp32 sums would lose the first 1


def test_a_result_owns_its_memory():
    hidden = np.ones((4, 3), dtype=np.float32)
    weights = np.array([1, 3], dtype=np.float32)
    results = {pooling: pool(hidden, pooling, weights) for pooling in POOLINGS}
    hidden[:] = 2
    assert all((result == 1).all() for result in results.values())
    pooled = dict.fromkeys(("mean", "cls", "max", "attention"), (3,))
    assert {p: r.shape for p, r in results.items()} == pooled | {"per_residue": (2, 3)}


def test_attention_is_the_weighted_mean():
    hidden = np.array([[9, 9], [1, 2], [3, 6], [9, 9]], dtype=np.float32)
    weights = np.array([0.25, 0.75], dtype=np.float32)
    assert pool(hidden, "attention", weights).tolist() == [2.5, 5.0]
    assert pool(np.asfortranarray(hidden), "attention", weights * 8).tolist() == [2.5, 5.0]


def test_what_is_no_number_is_refused():
    array = np.ones((2, 2), dtype=np.float32)
    assert finite(array, "fp32") is array
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ModelError, match="in bf16, these weights give what is no number"):
            finite(np.full(3, value, dtype=np.float32), "bf16")


def test_an_unknown_pooling_is_an_error():
    with pytest.raises(ValueError, match="'median'"):
        pool(np.ones((3, 1), dtype=np.float32), "median")
