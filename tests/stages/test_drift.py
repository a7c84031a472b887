from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from proteus_pipeline.errors import ModelError
from proteus_pipeline.stages.drift import Drift, drift, mismatch, summarise

values = st.floats(-1e3, 1e3, width=32)
pairs = st.integers(1, 4).flatmap(
    lambda residues: st.tuples(*[arrays(np.float32, (residues, 5), elements=values)] * 2),
)


@given(arrays(np.float32, (3, 5), elements=values))
def test_no_change_is_no_drift(array):
    assert drift(["p"], [array], [array.copy()]) == [Drift("p", 1.0, 0.0, 0.0)]


@given(pairs)
def test_per_residue_drift_is_that_of_the_residue_that_turned_most(pair):
    first, second = pair
    whole = drift(["p"], [first], [second])[0]
    rows = drift([str(i) for i in range(len(first))], list(first), list(second))
    assert whole.cosine == min(row.cosine for row in rows)
    assert whole.max_abs == max(row.max_abs for row in rows)
    assert -1 <= whole.cosine <= 1
    assert np.isfinite(whole.relative_l2)


def test_by_hand():
    first, second = np.asarray([3.0, 4.0]), np.asarray([4.0, 3.0])
    assert drift(["p"], [first], [second]) == [Drift("p", 0.96, round(2**0.5 / 5, 9), 1.0)]
    assert drift(["p"], [first], [-first]) == [Drift("p", -1.0, 2.0, 8.0)]


def test_zeros_have_no_direction():
    zeros, ones = np.zeros(4), np.ones(4)
    assert drift(["a", "b", "c"], [zeros, zeros, ones], [zeros, ones, zeros]) == [
        Drift("a", 1.0, 0.0, 0.0),
        Drift("b", 0.0, 1.0, 1.0),
        Drift("c", 0.0, 1.0, 1.0),
    ]


def test_half_precision_is_compared_in_double():
    first = np.full(1000, 60000, np.float16)  # squares overflow fp16
    assert drift(["p"], [first], [first.astype(np.float32) + 16]) == [Drift("p", 1.0, round(16 / 60000, 9), 16.0)]


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (np.zeros(320), np.zeros(480), "width: 320 and 480"),
        (np.zeros((7, 320)), np.zeros((7, 480)), "width: 320 and 480"),
        (np.zeros(320), np.zeros((7, 320)), "'p' has one embedding that is pooled"),
        (np.zeros((7, 320)), np.zeros((5, 320)), "'p' has 7 residues under one version and 5"),
    ],
)
def test_shapes_that_differ_are_no_drift(first, second, why):
    found = mismatch(["p"], [first], [second])
    assert found is not None
    assert why in found
    with pytest.raises(ModelError, match="can't be compared"):
        drift(["p"], [first], [second])
    assert summarise([], found) == {"comparable": False, "why": found}


def test_equal_shapes_match():
    assert mismatch(["p", "q"], [np.zeros(3), np.zeros((2, 3))], [np.ones(3), np.ones((2, 3))]) is None


def test_what_is_not_finite_is_named():
    with pytest.raises(ModelError, match="'q' is not finite"):
        drift(["p", "q"], [np.ones(3), np.ones(3)], [np.ones(3), np.asarray([1, np.nan, 1])])


def test_the_summary_is_json_of_the_extremes():
    drifts = [Drift("a", 1.0, 0.0, 0.0), Drift("b", 0.5, 1.5, 3.0), Drift("c", 0.9, 0.1, 4.0)]
    summary = summarise(drifts)
    assert json.loads(json.dumps(summary, allow_nan=False)) == {
        "comparable": True,
        "n": 3,
        "median_cosine": 0.9,
        "min_cosine": 0.5,
        "max_relative_l2": 1.5,
        "max_abs": 4.0,
    }
    assert summarise(drifts[::-1]) == summary


def test_nothing_to_compare_says_so():
    assert summarise([]) == {"comparable": False, "why": "there are no sequences"}
    assert drift([], [], []) == []
