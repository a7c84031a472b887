from __future__ import annotations

import numpy as np
import pytest

from proteus_pipeline.errors import ModelError
from proteus_pipeline.stages.projection import project, variance_shares


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (5, 5), (3, 2)])
def test_the_map_is_the_principal_components(shape):
    data = np.random.default_rng(0).normal(size=shape)
    left, strengths, _ = np.linalg.svd(data - data.mean(axis=0), full_matrices=False)
    assert np.abs(project(data)) == pytest.approx(np.abs(left * strengths)[:, :2], abs=1e-5)


def test_the_map_follows_the_order_of_the_records():
    data = np.random.default_rng(0).normal(size=(20, 64))
    order = np.random.default_rng(1).permutation(20)
    assert project(data[order]) == pytest.approx(project(data)[order], abs=2e-6)


@pytest.mark.parametrize("data", [np.zeros((0, 4)), np.ones((2, 4)), np.ones((6, 4)), np.ones((4, 9))])
def test_the_map_of_nothing_to_tell_apart_is_zeros(data):
    assert np.array_equal(project(data), np.zeros((len(data), 2)))


def test_the_map_of_one_dimension_has_an_empty_second_axis():
    points = project(np.asarray([[1.0], [2.0], [6.0]]))
    assert points[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert points[:, 0].tolist() == [-2.0, -1.0, 3.0]


def test_the_map_refuses_what_is_not_finite():
    with pytest.raises(ModelError, match="not finite"):
        project(np.asarray([[1.0], [np.inf], [2.0]]))


def test_the_shares_of_the_variance_are_those_of_pca():
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(3).normal(size=(40, 9)) * np.arange(1, 10)
    ours = variance_shares(vectors, project(vectors))
    assert ours == pytest.approx(PCA(2).fit(vectors).explained_variance_ratio_, abs=1e-4)
    assert variance_shares(np.ones((5, 3)), project(np.ones((5, 3)))) == [0.0, 0.0]
