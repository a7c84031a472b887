from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import semver
import torch
from conftest import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError, InvalidVersionError, ModelError
from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.models.checkpoint import EMBEDDING, Checkpoint, canonical, component_of
from proteus_pipeline.models.esm2 import Esm2Encoder
from proteus_pipeline.registry import compatibility
from proteus_pipeline.registry.compatibility import (
    DEFAULT_TOLERANCE,
    LEVELS,
    Compatibility,
    PanelDrift,
    allows,
    measure,
    next_version,
    panel,
    panel_digest,
)

HEAD = "classifier.dense.weight"
FINAL_NORM = "esm.encoder.emb_layer_norm_after.weight"


def changed(checkpoint: Checkpoint, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Checkpoint:
    return canonical(checkpoint.architecture, {n: change(n, t) for n, t in checkpoint.tensors.items()}, "changed")


def with_head(checkpoint: Checkpoint, tensor: torch.Tensor, name: str = HEAD) -> Checkpoint:
    return Checkpoint(checkpoint.architecture, {**checkpoint.tensors, name: tensor})


def noisy(checkpoint: Checkpoint, relative: float, block: str = "") -> Checkpoint:
    """Gaussian noise on each tensor of a block, or of all of them, of a norm relative to the tensor's."""
    generator = torch.Generator().manual_seed(0)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith(f"esm.encoder.layer.{block}") or "inv_freq" in name:
            return tensor
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + noise * (relative * tensor.norm() / noise.norm())

    return changed(checkpoint, change)


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr(Esm2Encoder, "__init__", refuse)


# The panel.


def test_the_panel_is_of_real_proteins_and_its_digest_is_golden(proteins: dict[str, str]):
    assert len(panel()) == 8
    assert panel().items() <= proteins.items()
    lengths = sorted(len(sequence) for sequence in panel().values())
    assert (lengths[0], lengths[-1]) == (61, 398)
    assert panel_digest() == "23f2bcd801c8aa5e7c2109dd9b35df9f"


# Real weights: what the tolerance was chosen by.


@pytest.mark.parametrize(
    ("dtype", "level", "low", "high"),
    [(torch.float16, "patch", 0.0008, 0.002), (torch.bfloat16, "minor", 0.008, 0.016)],
)
def test_weights_stored_in_half(checkpoint: Checkpoint, dtype: torch.dtype, level: str, low: float, high: float):
    found = measure(checkpoint, changed(checkpoint, lambda _, t: t.to(dtype)))
    assert found.level == level, found
    assert found.drift and low < found.drift.max_relative_l2 < high
    assert 0.999 < found.drift.min_cosine < 1
    assert found.drift.max_relative_l2_pooled > 0


@pytest.mark.parametrize(("relative", "block"), [(0.01, ""), (0.003, "0.")])
def test_weights_that_were_tuned_are_a_minor_change(checkpoint: Checkpoint, relative: float, block: str):
    found = measure(checkpoint, noisy(checkpoint, relative, block))
    assert found.level == "minor"
    assert found.drift and found.drift.max_relative_l2 > DEFAULT_TOLERANCE
    assert "more than the tolerance of 0.004" in found.reasons[0]


# Levels, on random weights.


def test_the_same_weights_are_a_patch_and_nothing_is_embedded(tiny: Checkpoint, no_encoder: None):
    found = measure(tiny, make_checkpoint())
    reason = "the trunk is the same, and so is every embedding"
    assert found == Compatibility("patch", (reason,), PanelDrift(0.0, 1.0, 0.0), DEFAULT_TOLERANCE, panel_digest())


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (make_checkpoint(width=64), "the embedding width changed from 32 to 64"),
        (make_checkpoint(layers=3), "the number of blocks changed from 2 to 3"),
    ],
)
def test_another_shape_is_major_and_nothing_is_embedded(
    tiny: Checkpoint, no_encoder: None, other: Checkpoint, reason: str
):
    found = measure(tiny, other)
    assert (found.level, found.reasons[0], found.drift) == ("major", reason, None)


def test_another_alphabet_is_major(tiny: Checkpoint, no_encoder: None):
    tokens = tiny.architecture.tokens
    swapped = (*tokens[:4], tokens[5], tokens[4], *tokens[6:])
    found = measure(tiny, replace(tiny, architecture=replace(tiny.architecture, tokens=swapped)))
    assert (found.level, found.reasons) == ("major", ("the alphabet changed",))


def test_another_architecture_of_the_same_shape_is_minor(tiny: Checkpoint):
    architecture: Architecture = replace(tiny.architecture, layer_norm_eps="1e-12")
    found = measure(tiny, replace(tiny, architecture=architecture))
    assert found.level == "minor"
    assert found.reasons[0] == "the architecture (layer_norm_eps) changed from 1e-05 to 1e-12"
    assert found.drift and 0 < found.drift.max_relative_l2 < DEFAULT_TOLERANCE


def test_drift_is_measured_against_the_tolerance(tiny: Checkpoint):
    other = changed(tiny, lambda name, t: t * 1.01 if name == FINAL_NORM else t)
    found = measure(tiny, other)
    assert found.level == "minor"
    assert found.drift and 0.005 < found.drift.max_relative_l2 < 0.0101
    assert measure(tiny, other, tolerance=0.02).level == "patch"
    assert measure(tiny, other, tolerance=0).level == "minor"


def test_the_drift_of_means_counts_too(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compatibility, "_drift", lambda *_: PanelDrift(0.001, 1.0, 0.005))
    found = measure(tiny, noisy(tiny, 0.001))
    assert found.level == "minor"
    assert "moved by 0.005 " in found.reasons[0]


def test_a_head_that_is_gone_is_major_and_a_new_one_minor(tiny: Checkpoint, no_encoder: None):
    headed = with_head(tiny, torch.ones(2, 2))
    assert measure(headed, tiny).level == "major"
    assert measure(headed, tiny).reasons[0] == "the head classifier is gone"
    found = measure(tiny, headed)
    assert (found.level, found.reasons[0]) == ("minor", "the head classifier is new")
    assert found.drift == PanelDrift()


@pytest.mark.parametrize(
    ("tensor", "level", "reason"),
    [
        (torch.ones(2, 2) * 1.001, "patch", "moved by 0.001 (relative L2, the worst tensor), within the tolerance"),
        (torch.ones(2, 2) * 1.01, "minor", "moved by 0.01 (relative L2, the worst tensor), more than the tolerance"),
        (torch.ones(2, 2).half(), "patch", "moved by 0 "),
        (torch.ones(4, 2), "minor", "has other tensors, or of other shapes"),
        (torch.tensor([[1.0, math.nan], [1.0, 1.0]]), "major", "has weights that are not finite"),
    ],
)
def test_a_head_that_changed(tiny: Checkpoint, no_encoder: None, tensor: torch.Tensor, level: str, reason: str):
    found = measure(with_head(tiny, torch.ones(2, 2)), with_head(tiny, tensor))
    assert found.level == level
    assert any(f"the head classifier {reason}" in said for said in found.reasons)


def test_a_head_of_zeros_that_has_weights_now_is_minor(tiny: Checkpoint, no_encoder: None):
    found = measure(with_head(tiny, torch.zeros(2)), with_head(tiny, torch.ones(2) * 1e-6))
    assert found.level == "minor"


def test_a_new_tensor_of_a_head_is_minor(tiny: Checkpoint, no_encoder: None):
    old = with_head(tiny, torch.ones(2))
    assert component_of("classifier.dense.bias") == component_of(HEAD)
    assert measure(old, with_head(old, torch.ones(2), "classifier.dense.bias")).level == "minor"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_major_and_no_result_is_nan(tiny: Checkpoint, value: float):
    broken = changed(tiny, lambda name, t: torch.full_like(t, value) if name == FINAL_NORM else t)
    for old, new, which in ((tiny, broken, "new"), (broken, tiny, "old")):
        found = measure(old, new)
        assert (found.level, found.drift) == ("major", None)
        assert found.reasons[0] == f"the {which} version's embeddings of the panel are not finite"
        json.dumps(found.to_record(), allow_nan=False)


def test_embeddings_of_zeros_have_a_drift(tiny: Checkpoint):
    zeros = changed(tiny, lambda name, t: torch.zeros_like(t) if "emb_layer_norm_after" in name else t)
    other = changed(zeros, lambda name, t: t + 1 if name == EMBEDDING else t)
    found = measure(tiny, zeros)
    assert found.drift and (found.drift.max_relative_l2, found.drift.min_cosine) == (1.0, 0.0)
    assert measure(zeros, other).drift == PanelDrift()
    back = measure(zeros, tiny)
    assert back.level == "minor" and back.drift and back.drift.max_relative_l2 == 1.0


def test_a_model_that_is_not_computed_is_said(tiny: Checkpoint):
    other = replace(tiny, architecture=replace(tiny.architecture, positions="absolute"))
    with pytest.raises(ModelError, match="ESM-1"):
        measure(tiny, other)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_is_a_number_of_at_least_0(tiny: Checkpoint, tolerance: float):
    with pytest.raises(ConfigError, match="use a number of at least 0"):
        measure(tiny, tiny, tolerance=tolerance)


def test_a_record_holds_plain_json_of_9_digits():
    drift = PanelDrift(0.0123456789123, 0.99999999999, 1 / 3)
    assert Compatibility("minor", ("because",), drift, 0.004, "abc").to_record() == {
        "level": "minor",
        "reasons": ["because"],
        "drift": {"max_relative_l2": 0.0123456789, "min_cosine": 1.0, "max_relative_l2_pooled": 0.333333333},
        "tolerance": 0.004,
        "panel": "abc",
    }
    assert Compatibility("major", ("because",), None, 0.004, "abc").to_record()["drift"] is None


# Numbers.


@pytest.mark.parametrize(
    ("known", "patch", "minor", "major"),
    [
        ([], "1.0.0", "1.0.0", "1.0.0"),
        (["1.0.0"], "1.0.1", "1.1.0", "2.0.0"),
        (["1.10.3", "1.9.0", "v0.1.0"], "1.10.4", "1.11.0", "2.0.0"),
        (["0.3.1"], "0.3.2", "0.4.0", "1.0.0"),
        (["1.0.0+build.7"], "1.0.1", "1.1.0", "2.0.0"),
        (["1.0.0-rc.1"], "1.0.0", "1.0.0", "1.0.0"),
        (["0.2.0-rc.1", "2.1.0-rc.1"], "2.1.0", "2.1.0", "2.1.0"),
        (["1.0.0-rc.1", "1.0.0"], "1.0.1", "1.1.0", "2.0.0"),
        (["1.0.0", "1.1.0-rc.1"], "1.0.1", "1.1.0", "2.0.0"),
        (["1.0.0", "1.1.0-rc.1", "1.5.0-rc.1"], "1.0.1", "1.5.0", "2.0.0"),
        (["1.0.0", "1.0.4-a"], "1.0.4", "1.1.0", "2.0.0"),
        (["1.0.0", "3.0.0-rc.1", "0.9.9-rc.1"], "1.0.1", "1.1.0", "3.0.0"),
    ],
)
def test_the_next_version(known: list[str], patch: str, minor: str, major: str):
    assert [next_version(level, known) for level in LEVELS] == [patch, minor, major]


versions = st.builds(
    lambda core, rest: ".".join(map(str, core)) + rest,
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from(["", "", "-rc.1", "-rc.2", "+b", "-a+b"]),
)


@given(st.sampled_from(LEVELS), st.lists(versions, max_size=8))
def test_the_next_version_is_a_new_release_greater_than_all_and_a_step_that_is_allowed(level: str, known: list[str]):
    found = next_version(level, known)
    assert found not in known
    assert found == next_version(level, reversed(known))
    number = semver.Version.parse(found)
    assert not number.prerelease and not number.build
    releases = [v for v in map(semver.Version.parse, known) if not v.prerelease]
    assert all(number > release for release in releases)
    if releases:
        assert allows(str(max(releases)), found, level)


@pytest.mark.parametrize("level", ["auto", "", "MAJOR"])
def test_another_level_is_refused(level: str):
    with pytest.raises(ConfigError, match="use one of patch, minor, major"):
        next_version(level, [])
    with pytest.raises(ConfigError, match="use one of patch, minor, major"):
        allows("1.0.0", "2.0.0", level)


def test_a_version_that_is_none_is_refused():
    with pytest.raises(InvalidVersionError):
        next_version("patch", ["1.0"])


@pytest.mark.parametrize(
    ("old", "new", "most"),
    [
        ("1.0.0", "1.0.1", "patch"),
        ("1.0.0", "1.0.7", "patch"),
        ("1.0.0", "1.1.0", "minor"),
        ("1.0.9", "1.2.3", "minor"),
        ("1.2.3", "2.0.0", "major"),
        ("1.2.3", "v3.1.0", "major"),
        ("0.1.0", "0.1.1", "patch"),
        ("0.1.0", "0.2.0", "major"),
        ("0.1.0", "1.0.0", "major"),
        ("1.0.0", "1.1.0-rc.1", "minor"),
        ("1.1.0-rc.1", "1.1.0-rc.2", "major"),
        ("1.0.0-rc.1", "1.0.0", "major"),
        ("1.0.0", "1.0.0", None),
        ("1.0.0+a", "1.0.0+b", None),
        ("2.0.0", "1.5.0", None),
        ("1.0.0", "1.0.0-rc.1", None),
    ],
)
def test_a_step_allows_its_level_and_those_below(old: str, new: str, most: str | None):
    allowed = LEVELS[: LEVELS.index(most) + 1] if most else ()
    assert tuple(level for level in LEVELS if allows(old, new, level)) == allowed
