"""What differs between two versions: of what their records say, and of their tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from proteus_pipeline.models.checkpoint import Checkpoint, component_of, dtype_name
from proteus_pipeline.registry.records import VersionRecord
from proteus_pipeline.registry.version import ModelVersion

if TYPE_CHECKING:
    import torch

# In fp64 a block is 8 MiB, and there are three of them at a time, however large the tensor.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Change:
    """One value, before and after."""

    old: Any
    new: Any


@dataclass(frozen=True)
class MappingDifference:
    """What differs between two mappings, by dotted key: ``training.epochs``; a part with a dot of its own is quoted.

    Attributes
    ----------
    added, removed
        The values that only the new one has, or only the old one.
    changed
        Both values. True is not 1 here, and 1 is not 1.0: what is compared is their JSON.

    """

    added: Mapping[str, Any] = field(default_factory=dict)
    removed: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, Change] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.added or self.removed or self.changed)


@dataclass(frozen=True)
class RecordDifference:
    """What differs between two versions' records; ``dataclasses.asdict`` gives plain JSON.

    Attributes
    ----------
    metadata, configuration, architecture, components
        By dotted key; components by name, with their digests.
    dependencies
        By model: the one reference to it, or the list of them where there are several. Their order is no difference.

    """

    metadata: MappingDifference
    configuration: MappingDifference
    dependencies: MappingDifference
    architecture: MappingDifference
    components: MappingDifference

    @property
    def empty(self) -> bool:
        parts = (self.metadata, self.configuration, self.dependencies, self.architecture, self.components)
        return all(part.empty for part in parts)


@dataclass(frozen=True)
class TensorChange:
    """One tensor that differs; ``dataclasses.asdict`` gives plain JSON, with no NaN.

    Attributes
    ----------
    name
        Canonical.
    kind
        ``added``, ``removed``, ``reshaped``, ``retyped`` (the same shape in another dtype), or ``changed``.
    old_shape, new_shape, old_dtype, new_dtype
        None where the tensor is not; dtypes by safetensors' names.
    max_abs
        The largest difference of one number, for ``retyped`` and ``changed``; None where no number can be compared.
    relative
        The Frobenius norm of the difference over that of the old tensor; None where the old one is all zeros and the
        new one isn't, too.
    old_not_finite, new_not_finite
        How many numbers are NaN or infinite; `max_abs` and `relative` are of the others.

    """

    name: str
    kind: str
    old_shape: tuple[int, ...] | None
    new_shape: tuple[int, ...] | None
    old_dtype: str | None
    new_dtype: str | None
    max_abs: float | None = None
    relative: float | None = None
    old_not_finite: int = 0
    new_not_finite: int = 0


@dataclass(frozen=True)
class VersionDifference:
    """What differs between two versions; ``dataclasses.asdict`` gives plain JSON.

    Attributes
    ----------
    old, new
        Their references.
    records
        None where one of them has no record.
    tensors
        By name; empty where all are equal.

    """

    old: str
    new: str
    records: RecordDifference | None
    tensors: list[TensorChange]

    @property
    def empty(self) -> bool:
        """Whether the two are the same."""
        return not self.tensors and (self.records is None or self.records.empty)


def compare_versions(old: ModelVersion, new: ModelVersion) -> VersionDifference:
    """Compare two versions; of their tensors, only those that differ are read.

    Raises
    ------
    StorageError, IntegrityError
        As `ModelVersion.checkpoint`.

    """
    records = compare_records(old.record, new.record) if old.record and new.record else None
    return VersionDifference(old.reference, new.reference, records, compare_tensors(old.checkpoint, new.checkpoint))


def compare_records(old: VersionRecord, new: VersionRecord) -> RecordDifference:
    """Return what differs between what two records say of their versions."""
    return RecordDifference(
        metadata=compare_mappings(old.metadata, new.metadata),
        configuration=compare_mappings(old.configuration, new.configuration),
        dependencies=compare_mappings(_by_model(old.dependencies), _by_model(new.dependencies)),
        architecture=compare_mappings(old.architecture, new.architecture),
        components=compare_mappings(old.components, new.components),
    )


def compare_mappings(old: Mapping[str, Any], new: Mapping[str, Any]) -> MappingDifference:
    """Return what differs between two JSON-like mappings; lists are compared whole.

    >>> compare_mappings({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
    MappingDifference(added={}, removed={}, changed={'a.b': Change(old=1, new=3)})
    """
    before, after = _leaves(old), _leaves(new)
    both = sorted(before.keys() & after.keys())
    return MappingDifference(
        added={key: after[key] for key in sorted(after.keys() - before.keys())},
        removed={key: before[key] for key in sorted(before.keys() - after.keys())},
        changed={k: Change(before[k], after[k]) for k in both if _text(before[k]) != _text(after[k])},
    )


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        # Quoted, "a.b" is never taken for b within a.
        part = json.dumps(key, ensure_ascii=False) if not key or "." in key or '"' in key else key
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{part}.")
        else:
            leaves[prefix + part] = _plain(value)
    return leaves


def _plain(value: Any) -> Any:
    """Return a value as plain JSON holds it: a NaN or infinity, which JSON has not, is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _by_model(references: Sequence[str]) -> dict[str, Any]:
    named: dict[str, list[str]] = {}
    for reference in sorted(set(references)):
        named.setdefault(reference.partition("@")[0], []).append(reference)
    return {name: found[0] if len(found) == 1 else found for name, found in named.items()}


def compare_tensors(
    old: Checkpoint, new: Checkpoint, *, components: Collection[str] | None = None
) -> list[TensorChange]:
    """Return the tensors that differ, by name; those with equal digests are not read.

    Parameters
    ----------
    old, new
        The versions' tensors; they may be read from disk when they are touched.
    components
        Compare these alone; all where it is None.

    """
    before, after = old.tensor_digests, new.tensor_digests
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    wanted = names if components is None else [name for name in names if component_of(name) in components]
    return [
        _change(name, old.tensors[name] if name in before else None, new.tensors[name] if name in after else None)
        for name in wanted
    ]


def _change(name: str, old: torch.Tensor | None, new: torch.Tensor | None) -> TensorChange:
    old_shape, new_shape = (None if t is None else tuple(t.shape) for t in (old, new))
    old_dtype, new_dtype = (None if t is None else dtype_name(t) for t in (old, new))
    kind = "removed" if old is not None else "added"
    distance: tuple[float | None, float | None, int, int] = (None, None, 0, 0)
    if old is not None and new is not None:
        kind = "changed" if old_dtype == new_dtype else "retyped"
        if old_shape != new_shape:
            kind = "reshaped"
        else:
            distance = _distance(old, new)
    return TensorChange(name, kind, old_shape, new_shape, old_dtype, new_dtype, *distance)


def _distance(old: torch.Tensor, new: torch.Tensor) -> tuple[float | None, float | None, int, int]:
    """Return the largest difference, the relative one, and how many numbers of each tensor are not finite."""
    import torch

    before, after = old.detach().cpu().reshape(-1), new.detach().cpu().reshape(-1)
    largest, moved, length = 0.0, 0.0, 0.0
    lost = [0, 0]
    compared = 0
    for start in range(0, before.numel(), _BLOCK):
        one, other = (t[start : start + _BLOCK].to(torch.float64) for t in (before, after))
        finite = one.isfinite(), other.isfinite()
        lost = [count + int((~f).sum()) for count, f in zip(lost, finite, strict=True)]
        both = finite[0] & finite[1]
        if not both.all():
            one, other = one[both], other[both]
        if not one.numel():
            continue
        compared += one.numel()
        difference = other - one
        largest = max(largest, float(difference.abs().max()))
        moved = math.hypot(moved, float(torch.linalg.vector_norm(difference)))
        length = math.hypot(length, float(torch.linalg.vector_norm(one)))
    if not compared:
        return None, None, lost[0], lost[1]
    relative = 0.0 if moved == 0 else moved / length if length else None
    return _finite(largest), _finite(relative), lost[0], lost[1]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
