"""How far a version is from the one before it, measured: what SemVer asks of a change of weights.

A panel of eight real proteins (``canary.fasta``) is embedded with both versions, and the distance between the embeddings
decides, with what changed in architecture and heads:

======== ==============================================================================================================
major    embeddings have another width, depth or alphabet; a head is gone; a number is not finite
minor    embeddings moved by more than the tolerance, another difference in architecture, a head is new or was changed
patch    anything else: the same weights, or the same to within the tolerance (another file format, fp16 storage)
======== ==============================================================================================================

The panel's proteins are from UniProtKB/Swiss-Prot, five subcellular locations, 61 to 398 residues. Source: The UniProt
Consortium, https://www.uniprot.org, licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). Changes:
selected, and the headers shortened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.identity import digests
from proteus_pipeline.identity.names import Version
from proteus_pipeline.models.checkpoint import TRUNK, Checkpoint, component_of
from proteus_pipeline.registry.differences import TensorChange, compare_mappings, compare_tensors
from proteus_pipeline.sequences.fasta import read_fasta

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_pipeline.registry.version import ModelVersion

    Hidden = NDArray[np.float32]

LEVELS = ("patch", "minor", "major")
# The panel's worst protein, relative L2 over residues, measured on the real ESM-2 8M weights (of means in parentheses):
#   0.0013 (0.0010)  stored as fp16; 0.0015 for the worst of 100 proteins
#   0.0112 (0.0071)  stored as bf16
#   0.0053 to 0.010  0.3% of Gaussian noise on one block, whichever it is; 0.018 to 0.033 with 1% of it
#   0.0080, 0.082    0.1%, and 1%, of Gaussian noise on every block
#   0.0087 (0.0102)  10 steps of AdamW on the last block, masked residues, rate 1e-5; after 50 steps 0.023 (0.027)
#   0.34             50 such steps on every block
# fp16 is how weights are often published, and has to be a patch; the least tuning of one block has to be none. 0.004 is
# the geometric mean of fp16's distance and bf16's, and leaves a factor of 2.8 to either: weights stored as bf16 are a
# minor change, since that moves embeddings as far as tuning does.
DEFAULT_TOLERANCE = 0.004
_DIGITS = 9  # significant: a record says what was measured, not what the last bits were


@dataclass(frozen=True)
class PanelDrift:
    """How far the panel's embeddings moved, in the last layer, start and end tokens excluded.

    Attributes
    ----------
    max_relative_l2
        ``||new - old|| / ||old||`` over all residues of a protein; the worst protein's.
    min_cosine
        The smallest cosine similarity of one residue's two embeddings.
    max_relative_l2_pooled
        As `max_relative_l2`, of the means over residues.

    """

    max_relative_l2: float = 0.0
    min_cosine: float = 1.0
    max_relative_l2_pooled: float = 0.0


@dataclass(frozen=True)
class Compatibility:
    """What a change of weights asks of the version number, and why.

    Attributes
    ----------
    level
        ``patch``, ``minor`` or ``major``.
    reasons
        Sentences, those for the highest level first.
    drift
        None where nothing could be embedded or compared.
    tolerance
        The relative distance up to which versions count as the same.
    panel
        The digest of the proteins that were embedded.

    """

    level: str
    reasons: tuple[str, ...]
    drift: PanelDrift | None
    tolerance: float
    panel: str

    def to_record(self) -> dict[str, Any]:
        """Return what a version's record holds: plain JSON, with floats of 9 significant digits."""
        drift = self.drift and {
            "max_relative_l2": _rounded(self.drift.max_relative_l2),
            "min_cosine": _rounded(self.drift.min_cosine),
            "max_relative_l2_pooled": _rounded(self.drift.max_relative_l2_pooled),
        }
        return {
            "level": self.level,
            "reasons": list(self.reasons),
            "drift": drift,
            "tolerance": _rounded(self.tolerance),
            "panel": self.panel,
        }


@cache
def panel() -> Mapping[str, str]:
    """Return the panel's sequences by id."""
    with resources.as_file(resources.files("proteus_pipeline.registry").joinpath("canary.fasta")) as path:
        return {record.id: record.sequence for record in read_fasta(Path(path))}


def panel_digest() -> str:
    """Return the digest of the panel: of its sequences, whatever they are called."""
    return digests.of_record("panel", [digests.of_sequence(sequence) for sequence in panel().values()])


def measure(
    old: Checkpoint, new: Checkpoint, *, tolerance: float = DEFAULT_TOLERANCE, device: str = "cpu"
) -> Compatibility:
    """Measure how far `new` is from `old`.

    Where the trunks are the same, or can't be compared, nothing is embedded and no tensor is read but those of changed
    heads. Otherwise the models are loaded one after the other, in fp32 and strict numerics.

    Raises
    ------
    ConfigError
        For a tolerance that is no number of at least 0.
    ModelError
        When a model is one that the encoder does not compute.

    """
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"the tolerance is {tolerance}", "use a number of at least 0, such as 0.004")
    found = _architecture(old, new)
    drift: PanelDrift | None = None
    if all(level != "major" for level, _ in found):
        drift, verdict = _trunk(old, new, tolerance, device)
        found += [verdict, *_heads(old, new, tolerance)]
    order = sorted(found, key=lambda finding: -LEVELS.index(finding[0]))
    return Compatibility(order[0][0], tuple(reason for _, reason in order), drift, tolerance, panel_digest())


def measure_versions(old: ModelVersion, new: ModelVersion, tolerance: float | None) -> Compatibility:
    """Measure as `measure`; where no tolerance is given, by the one that was declared for `new`, or the usual one."""
    told = new.record.compatibility if new.record else {}
    declared = told.get("tolerance") if told.get("declared") else None
    allowed = tolerance if tolerance is not None else float(declared or DEFAULT_TOLERANCE)
    return measure(old.checkpoint, new.checkpoint, tolerance=allowed)


def _architecture(old: Checkpoint, new: Checkpoint) -> list[tuple[str, str]]:
    """Return the level and the sentence of each difference in architecture."""
    names = {"width": "the embedding width", "layers": "the number of blocks", "tokens": "the alphabet"}
    difference = compare_mappings(old.architecture.identity(), new.architecture.identity())
    found = []
    for key, change in difference.changed.items():
        what = f"{names.get(key, f'the architecture ({key})')} changed"
        values = "" if key == "tokens" else f" from {change.old} to {change.new}"
        found.append(("major" if key in names else "minor", what + values))
    return found


def _trunk(
    old: Checkpoint, new: Checkpoint, tolerance: float, device: str
) -> tuple[PanelDrift | None, tuple[str, str]]:
    if old.trunk_digest == new.trunk_digest:
        return PanelDrift(), ("patch", "the trunk is the same, and so is every embedding")
    before, after = _embed(old, device), _embed(new, device)
    for which, hidden in (("old", before), ("new", after)):
        if not _all_finite(hidden):
            return None, ("major", f"the {which} version's embeddings of the panel are not finite")
    drift = _drift(before, after)
    worst = max(drift.max_relative_l2, drift.max_relative_l2_pooled)
    moved = f"embeddings of the panel moved by {worst:.2g} (relative L2, the worst protein)"
    if worst > tolerance:
        return drift, ("minor", f"{moved}, more than the tolerance of {tolerance:g}")
    return drift, ("patch", f"{moved}, within the tolerance of {tolerance:g}")


def _embed(checkpoint: Checkpoint, device: str) -> list[Hidden]:
    """Return the last layer's (L, D) residues of each protein of the panel."""
    from proteus_pipeline.models.encoder import make_encoder
    from proteus_pipeline.models.pooling import pool

    sequences, last = list(panel().values()), checkpoint.architecture.layers
    encoder = make_encoder(checkpoint, precision="fp32", numerics="strict", device=device)
    done = {index: pool(hidden[last], "per_residue") for index, hidden in encoder.encode(sequences, [last])}
    return [done[index] for index in range(len(sequences))]


def _all_finite(hidden: list[Hidden]) -> bool:
    import numpy as np

    return all(bool(np.isfinite(one).all()) for one in hidden)


def _drift(before: list[Hidden], after: list[Hidden]) -> PanelDrift:
    import numpy as np

    whole, pooled, cosines = [], [], []
    for old, new in zip(before, after, strict=True):
        a, b = old.astype(np.float64), new.astype(np.float64)
        whole.append(_relative(a, b))
        pooled.append(_relative(a.mean(axis=0), b.mean(axis=0)))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(axis=1)
        # A row of zeros has no direction: like itself, and unlike any other.
        cosine = np.where(same, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0))
        cosines.append(float(np.clip(cosine, -1.0, 1.0).min()))
    return PanelDrift(max(whole), min(cosines), max(pooled))


def _relative(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    import numpy as np

    moved = float(np.linalg.norm(b - a))
    # An all-zero embedding has no length to measure by; the new one's gives 1, or 0 where both are zero.
    return moved / float(np.linalg.norm(a) or np.linalg.norm(b) or 1.0)


def _heads(old: Checkpoint, new: Checkpoint, tolerance: float) -> list[tuple[str, str]]:
    """Return the level and the sentence of each difference between heads."""
    before, after = old.digests.keys() - {TRUNK}, new.digests.keys() - {TRUNK}
    found = [("major", f"the head {name} is gone") for name in sorted(before - after)]
    found += [("minor", f"the head {name} is new") for name in sorted(after - before)]
    changes: dict[str, list[TensorChange]] = {}
    for change in compare_tensors(old, new, components=before & after):
        changes.setdefault(component_of(change.name), []).append(change)
    return found + [_head(name, changes[name], tolerance) for name in sorted(changes)]


def _head(name: str, changes: list[TensorChange], tolerance: float) -> tuple[str, str]:
    if any(change.new_not_finite for change in changes):
        return "major", f"the head {name} has weights that are not finite"
    if any(change.kind in {"added", "removed", "reshaped"} for change in changes):
        return "minor", f"the head {name} has other tensors, or of other shapes"
    if any(change.relative is None for change in changes):
        return "minor", f"the head {name} has weights where it had zeros or numbers that are not finite"
    worst = max(change.relative or 0.0 for change in changes)
    moved = f"the head {name} moved by {worst:.2g} (relative L2, the worst tensor)"
    if worst > tolerance:
        return "minor", f"{moved}, more than the tolerance of {tolerance:g}"
    return "patch", f"{moved}, within the tolerance of {tolerance:g}"


def next_version(level: str, known: Iterable[str]) -> str:
    """Return the number of the next release: `level` above the greatest release that was ever registered.

    Where pre-releases of such a step were registered (``1.5.0-rc.1`` after ``1.0.0``, and the step is minor), it is the
    greatest one's release, 1.5.0. Where there are pre-releases alone, it is the greatest one's release, whatever the
    level; where there is nothing, 1.0.0. A major step from 0.y.z is 1.0.0.

    >>> next_version("minor", ["1.0.0", "1.1.0", "0.9.0"]), next_version("patch", ["1.0.0-rc.1"])
    ('1.2.0', '1.0.0')

    Parameters
    ----------
    level
        ``patch``, ``minor`` or ``major``.
    known
        Every version of the model that was ever registered, deleted ones too: a number is never used again.

    Raises
    ------
    ConfigError
        For another level.
    InvalidVersionError
        For a version that is not SemVer.

    """
    _check_level(level)
    versions = [Version.parse(text).semver for text in known]
    releases = [v.finalize_version() for v in versions if not v.prerelease]
    announced = [v.finalize_version() for v in versions if v.prerelease]
    if not releases:
        return str(max(announced, default="1.0.0"))
    last = max(releases)
    step = {"patch": last.bump_patch, "minor": last.bump_minor, "major": last.bump_major}[level]()
    return str(max([step, *(v for v in announced if v > last and _step(str(last), str(v)) == level)]))


def allows(old: str, new: str, level: str) -> bool:
    """Say whether the step from version `old` to `new` is at least `level`.

    From a pre-release every step is: it promised nothing. In 0.y.z a minor step is as good as a major one, as anything
    may change there. To a version that is not greater there is no step: a back-port is compared with its own
    predecessor.

    >>> allows("1.0.0", "1.0.1", "minor"), allows("0.1.0", "0.2.0", "major")
    (False, True)
    """
    _check_level(level)
    before, after = Version.parse(old).semver, Version.parse(new).semver
    if not after > before:
        return False
    if before.prerelease:
        return True
    step = _step(old, new)
    if before.major == 0 and step == "minor":
        step = "major"
    return LEVELS.index(step) >= LEVELS.index(level)


def _step(old: str, new: str) -> str:
    before, after = Version.parse(old).semver, Version.parse(new).semver
    if before.major != after.major:
        return "major"
    return "minor" if before.minor != after.minor else "patch"


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ConfigError(f"the step is {level!r}", f"use one of {', '.join(LEVELS)}")


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
