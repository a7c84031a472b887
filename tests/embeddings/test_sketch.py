from __future__ import annotations

import numpy as np
import pytest

from proteus_pipeline.embeddings.sketch import distance, sketch
from proteus_pipeline.embeddings.stored import to_fp32, to_stored


def made(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


def test_sketches_are_what_they_were():
    """A stored format: on every machine, and with every numpy."""
    wave = np.sin(np.arange(150 * 7, dtype=np.float64)).astype("<f4").reshape(150, 7)
    assert sketch(wave, "fp32") == GOLDEN["residues"]
    assert sketch(wave[3], "fp32") == GOLDEN["pooled"]
    assert sketch(to_stored(wave, "bf16"), "bf16") == GOLDEN["bf16"]


GOLDEN = {
    "residues": ("22.9048011", "17.3383522", "17.1613298", "72.3428899", "-1.56283288"),
    "pooled": ("1.93646574", "-1.09461562", "2.73844842", "-0.58012263", "-0.946421306"),
    "bf16": ("22.9054129", "17.3395091", "17.1946706", "72.3433536", "-1.51400793"),
}


@pytest.mark.parametrize("shape", [(320,), (1, 320), (64, 20), (65, 20), (200, 33)])
def test_one_changed_element_shows_in_full(shape: tuple[int, ...]):
    array = made(*shape)
    for place in (0, array.size // 2, array.size - 1):
        other = array.copy()
        other.flat[place] += 0.25
        expected = 0.25 / np.linalg.norm(other.astype(np.float64))
        assert distance(sketch(array, "fp32"), sketch(other, "fp32")) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["noise", "every row alike"])
def test_the_distance_is_that_of_the_arrays(stored: str, kind: str):
    ratios = []
    for seed in range(200):
        array = made(90, 40, seed=seed)
        change = made(90, 40, seed=1000 + seed) if kind == "noise" else np.tile(made(40, seed=1000 + seed), (90, 1))
        one, other = to_stored(array, stored), to_stored(array + np.float32(0.01) * change, stored)
        first, second = (to_fp32(a, stored).astype(np.float64) for a in (one, other))
        true = np.linalg.norm(first - second) / np.linalg.norm(second)
        ratios.append(distance(sketch(one, stored), sketch(other, stored)) / true)
    assert 0.8 < np.sqrt(np.mean(np.square(ratios))) < 1.2
    assert max(ratios) < 3
    assert np.mean(np.array(ratios) < 0.25) < 0.05


def test_exchanged_rows_and_columns_show():
    array = made(70, 16)
    for other in (array[::-1], array[:, ::-1], np.roll(array, 64, axis=0)):
        assert distance(sketch(array, "fp32"), sketch(np.ascontiguousarray(other), "fp32")) > 0.1


def test_zeros_and_signs():
    zeros = np.zeros((3, 4), "<f4")
    assert sketch(zeros, "fp32") == sketch(-zeros, "fp32") == ("0",) * 5
    assert distance(sketch(zeros, "fp32"), sketch(zeros, "fp32")) == 0
    assert distance(sketch(made(3, 4), "fp32"), sketch(zeros, "fp32")) == float("inf")


def test_a_distance_has_no_largest_number():
    sizes = ("1e308", "-1e308", "1e308", "1e308", "1")
    assert distance(sizes, ("5", "-7", "7", "-1", "-1")) > 1e300
    assert distance(("0", *sizes[:4]), ("1", *(s.removeprefix("-") for s in sizes[:4]))) > 1e300


def test_the_last_bit_of_one_number_is_seen_or_far_below_every_tolerance():
    array = made(320)
    other = array.copy()
    other[7] = np.nextafter(other[7], np.float32(9))
    assert distance(sketch(array, "fp32"), sketch(other, "fp32")) < 1e-7
