from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry import differences
from proteus_pipeline.registry.differences import (
    Change,
    TensorChange,
    compare_mappings,
    compare_records,
    compare_tensors,
)
from proteus_pipeline.registry.records import VersionRecord

DENSE = "esm.encoder.layer.0.intermediate.dense.weight"
HEAD = "classifier.dense.weight"
RECORD = VersionRecord(
    name="m",
    version="1.0.0",
    sequence=1,
    model_digest="d",
    components={"trunk": "a", "lm_head": "b"},
    architecture={"layers": 2, "width": 32, "tokens": ["<cls>", "A"]},
    weights={"md5": "x.dir", "size": 1},
    metadata={"licence": "MIT", "training": {"epochs": 3, "data": "UR50D"}},
    configuration={"rate": 0.5},
    dependencies=("base@v1.0.0", "other@latest"),
)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
mappings = st.dictionaries(st.sampled_from(["a", "b", "a.b", "", '"']), json_like, max_size=3)


class Touched(Mapping[str, torch.Tensor]):
    """Tensors that remember who read them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.touched: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.touched.add(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def with_tensors(checkpoint: Checkpoint, **tensors: torch.Tensor | None) -> Checkpoint:
    named = {**checkpoint.tensors, **{name.replace("__", "."): t for name, t in tensors.items()}}
    return Checkpoint(checkpoint.architecture, {name: t for name, t in sorted(named.items()) if t is not None})


def one(old: torch.Tensor | None, new: torch.Tensor | None) -> TensorChange:
    """The change of one tensor of a head."""
    tiny = make_checkpoint(1, 8, 1)
    before, after = (with_tensors(tiny, classifier__dense__weight=t) for t in (old, new))
    (change,) = compare_tensors(before, after)
    assert change.name == HEAD
    json.dumps(asdict(change), allow_nan=False)
    return change


def test_records_differ_by_dotted_key():
    new = replace(
        RECORD,
        components={"trunk": "c", "classifier": "d"},
        architecture={**RECORD.architecture, "width": 64},
        metadata={"training": {"epochs": 4, "data": "UR50D", "rate": 0.1}},
        configuration={},
        dependencies=("base@v1.1.0", "third@v1.0.0", "third@v2.0.0", "other@latest"),
    )
    found = compare_records(RECORD, new)
    assert not found.empty
    assert found.metadata.added == {"training.rate": 0.1}
    assert found.metadata.removed == {"licence": "MIT"}
    assert found.metadata.changed == {"training.epochs": Change(3, 4)}
    assert found.configuration.removed == {"rate": 0.5}
    assert found.dependencies.changed == {"base": Change("base@v1.0.0", "base@v1.1.0")}
    assert found.dependencies.added == {"third": ["third@v1.0.0", "third@v2.0.0"]}
    assert found.architecture.changed == {"width": Change(32, 64)}
    assert (found.components.added, found.components.removed) == ({"classifier": "d"}, {"lm_head": "b"})
    assert found.components.changed == {"trunk": Change("a", "c")}
    assert json.loads(json.dumps(asdict(found)))["metadata"]["changed"]["training.epochs"] == {"old": 3, "new": 4}


def test_a_record_does_not_differ_from_itself_nor_by_the_order_of_its_dependencies():
    assert compare_records(RECORD, RECORD).empty
    assert compare_records(RECORD, replace(RECORD, dependencies=RECORD.dependencies[::-1])).empty


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": True}, {"a": 1}),
        ({"a": None}, {}),
        ({"a": {}}, {}),
        ({"a": {}}, {"a": {"b": 1}}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({'"a.b"': 1}, {"a.b": 1}),
    ],
)
def test_what_looks_alike_and_is_not(old: dict[str, object], new: dict[str, object]):
    assert not compare_mappings(old, new).empty


@given(mappings, mappings)
def test_mappings_compare_the_same_from_either_side(old: dict[str, object], new: dict[str, object]):
    there, back = compare_mappings(old, new), compare_mappings(new, old)
    assert compare_mappings(old, old).empty
    assert (there.added, there.removed) == (back.removed, back.added)
    assert there.changed == {key: Change(change.new, change.old) for key, change in back.changed.items()}
    json.dumps(asdict(there), allow_nan=False)


def test_a_checkpoint_does_not_differ_from_itself_and_nothing_is_read(tiny: Checkpoint):
    same = [Checkpoint(tiny.architecture, Touched(tiny.tensors)) for _ in range(2)]
    touched = [c.tensors.touched for c in same if c.tensor_digests and isinstance(c.tensors, Touched)]
    for names in touched:
        names.clear()
    assert compare_tensors(*same) == []
    assert touched == [set(), set()]


def test_only_what_differs_is_read(tiny: Checkpoint):
    changed = with_tensors(tiny, **{DENSE: tiny.tensors[DENSE] + 1})
    old, new = (Checkpoint(tiny.architecture, Touched(c.tensors)) for c in (tiny, changed))
    assert old.tensor_digests != new.tensor_digests
    assert isinstance(old.tensors, Touched) and isinstance(new.tensors, Touched)
    old.tensors.touched.clear()
    new.tensors.touched.clear()
    (change,) = compare_tensors(old, new)
    assert old.tensors.touched == new.tensors.touched == {DENSE}
    assert (change.name, change.kind, change.old_shape, change.old_dtype) == (DENSE, "changed", (128, 32), "F32")
    assert change.max_abs == pytest.approx(1.0, rel=1e-6)
    assert compare_tensors(old, new, components=["lm_head"]) == []


def test_each_kind_of_change():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    places = ((2, 2), "F32")
    assert one(None, a) == TensorChange(HEAD, "added", None, places[0], None, places[1])
    assert one(a, None) == TensorChange(HEAD, "removed", places[0], None, places[1], None)
    assert one(a, a.reshape(1, 4).half()) == TensorChange(HEAD, "reshaped", (2, 2), (1, 4), "F32", "F16")
    assert one(a, a.half()) == TensorChange(HEAD, "retyped", (2, 2), (2, 2), "F32", "F16", 0.0, 0.0)
    changed = one(a, a + torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    assert (changed.kind, changed.max_abs) == ("changed", 2.0)
    assert changed.relative == pytest.approx(2 / 30**0.5)
    assert one(torch.tensor(2), torch.tensor(3)).relative == 0.5


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([1.0, float("nan"), 3.0], [1.0, 2.0, 3.5], (0.5, 0.5 / 10**0.5, 1, 0)),
        ([1.0, 2.0], [float("inf"), float("nan")], (None, None, 0, 2)),
        ([0.0, 0.0], [0.0, 2.0], (2.0, None, 0, 0)),
        ([0.0, 0.0], [0.0, -0.0], (0.0, 0.0, 0, 0)),
    ],
)
def test_numbers_that_have_no_distance(old: list[float], new: list[float], expected: tuple[float | None, ...]):
    change = one(torch.tensor(old), torch.tensor(new))
    found = (change.max_abs, change.relative, change.old_not_finite, change.new_not_finite)
    assert found == pytest.approx(expected)


def test_a_distance_beyond_the_largest_number_is_none():
    change = one(torch.tensor([1e308], dtype=torch.float64), torch.tensor([-1e308], dtype=torch.float64))
    assert (change.max_abs, change.relative) == (None, None)


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch):
    a, b = torch.randn(7, 11), torch.randn(7, 11)
    whole = one(a, b)
    monkeypatch.setattr(differences, "_BLOCK", 10)
    parts = one(a, b)
    assert parts.max_abs == whole.max_abs
    assert parts.relative == pytest.approx(whole.relative, rel=1e-12)


numbers = st.lists(st.floats(width=32, allow_subnormal=False), min_size=3, max_size=3).map(torch.tensor)


@given(numbers | st.none(), numbers | st.none(), st.booleans())
def test_tensors_compare_the_same_from_either_side(a: torch.Tensor | None, b: torch.Tensor | None, wide: bool):
    architecture = make_checkpoint(1, 8, 1).architecture
    b = b.double() if b is not None and wide else b
    old, new = (Checkpoint(architecture, {} if t is None else {HEAD: t}) for t in (a, b))
    assert compare_tensors(old, old) == []
    there, back = compare_tensors(old, new), compare_tensors(new, old)
    assert len(there) == len(back)
    mirrored = {"added": "removed", "removed": "added"}
    for one_way, other in zip(there, back, strict=True):
        assert one_way.kind == mirrored.get(other.kind, other.kind)
        assert (one_way.old_shape, one_way.old_dtype) == (other.new_shape, other.new_dtype)
        assert (one_way.old_not_finite, one_way.new_not_finite) == (other.new_not_finite, other.old_not_finite)
        assert one_way.max_abs == other.max_abs
        json.dumps(asdict(one_way), allow_nan=False)
