"""``proteus verify``: whether a committed result is what its weights, its settings and its sequences give.

Nothing that was computed before is believed: the sequences are made again from the committed inputs, and embedded again,
past the cache. What is compared is a manifest, which git has, and the scores that were computed from it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proteus_pipeline.config.composition import PARAMS, compose, read_params
from proteus_pipeline.embeddings.computing import Progress
from proteus_pipeline.embeddings.manifest import Manifest, read_manifest
from proteus_pipeline.errors import ConfigError, IntegrityError
from proteus_pipeline.models.device import device_class, resolve_device
from proteus_pipeline.stages.compare import scores
from proteus_pipeline.stages.compose import recipe_of, resolve_stages
from proteus_pipeline.stages.differences import (
    SCORES_APART,
    TURNED,
    Comparison,
    Difference,
    differing_metrics,
    differing_recipe,
    differing_sequences,
    tolerance,
    turned,
)
from proteus_pipeline.stages.embed import stage_encoder
from proteus_pipeline.stages.prepare import prepared
from proteus_pipeline.stages.probe import probe_records
from proteus_pipeline.stages.probing import ProbeSettings
from proteus_pipeline.stages.project import CANDIDATE, DRIFT, MANIFEST, METRICS, Project

SAMPLE = 200  # sequences that are computed again, where nobody says how many


REMEDIES = {
    "weights": "set the version that made it (model= in params.yaml), or make it anew: proteus run",
    "recipe": "restore the settings that made it (git log -- params.yaml conf), or make it anew: proteus run",
    "sequences": "look at what changed the input (git log) or the manifest, or make it anew: proteus run",
    "numbers": "the manifest was edited, or another torch made it (constraints.txt names ours); make it anew: proteus run",
    "metrics": "restore the file (git log), or make it anew: dvc repro --force --single-item probe",
}
_CANDIDATES = {
    "weights": "set the version that made it (candidate= in params.yaml), or make it anew: proteus run",
    "metrics": "restore the file (git log), or make it anew: dvc repro --force --single-item compare",
}


@dataclass(frozen=True)
class Verification:
    """What was checked, and what it showed.

    Attributes
    ----------
    manifest, model
        What was checked, and the version that the settings name for it.
    device_class, made_on
        This machine's, and those that the manifest names.
    sequences, recomputed
        Of the input, and how many of them were computed again.
    seed
        Which sample that was.
    equal, near
        Of the manifest's rows, how many agree bit for bit, and within the tolerance.
    tolerance, farthest
        Of relative L2; `farthest` among `near`.
    metrics
        What came of the scores, in a few words.
    differences
        None where all is well.

    """

    manifest: str
    model: str
    device_class: str
    made_on: tuple[str, ...]
    sequences: int
    recomputed: int
    seed: int
    equal: int
    near: int
    tolerance: float
    farthest: float
    metrics: str
    differences: tuple[Difference, ...]

    @property
    def remedies(self) -> list[str]:
        """What to do, once for each kind of difference."""
        of_candidate = Path(self.manifest).name == Path(CANDIDATE).name
        remedies = REMEDIES | (_CANDIDATES if of_candidate else {})
        return [text for kind, text in remedies.items() if any(d.kind == kind for d in self.differences)]


def verify(
    project: Project,
    manifest: Path | None = None,
    *,
    sample: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    fetching: Callable[[int, int | None], None] | None = None,
) -> Verification:
    """Check a manifest against the project's weights, settings and input files; nothing is written but fetched weights.

    Parameters
    ----------
    project
        Where the result is.
    manifest
        Its manifest; by default that of the embed stage. The compare stage's is checked against the candidate's version.
    sample
        How many sequences to compute again; by default all of up to SAMPLE, else so many.
    seed
        Which of them; by default a random one, so that nobody can know beforehand which numbers are looked at.
    device
        Instead of ``runtime.device``.
    progress, fetching
        Told how far the computing is, and the fetching of weights.

    Raises
    ------
    StorageError
        When there is no such manifest, or an input file or the weights can't be had.
    IntegrityError
        When the manifest, the metrics or the weights are damaged.

    """
    path = project.work / MANIFEST if manifest is None else manifest
    stage, stated = _stated(project, path)
    composed = _composed(project, stage, path, device, fetching)
    model = composed["stages"][stage]["model"]
    recipe = recipe_of(composed, stage)
    records, _, labels = prepared(project, composed["data"])
    differences = [
        *_differing_weights(project, stated, model),
        *differing_recipe(stated.recipe, recipe.described()),
        *differing_sequences(stated, records, composed["data"]["fasta"]),
    ]
    here = device_class(resolve_device(composed["runtime"]["device"]))
    compared = Comparison(stated, recipe, here)
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    chosen: set[str] = set()
    metrics = "not computed again: the embeddings are others"
    kept, where = _kept_metrics(project, path, stage)
    if not any(d.kind in {"weights", "recipe"} for d in differences):
        chosen = draw([r.id for r in records], SAMPLE if sample is None else sample, seed)
        keys = {r.id: recipe.key(model["trunk_digest"], r.sequence) for r in records}
        wanted = {keys[r.id]: r.sequence for r in records if r.id in chosen}
        encoder = stage_encoder(project, composed, stage)
        vectors = dict(compared.run(encoder, wanted, composed["runtime"]["tokens_per_batch"], progress))
        differences += compared.differences
        if kept is None:
            metrics = where
        elif len(chosen) < len(records):
            metrics = f"not computed again from {len(chosen)} of {len(records)} sequences"
        else:
            rows = np.stack([vectors[keys[r.id]] for r in records])
            found = probe_records(records, rows, labels.labels, ProbeSettings(**composed["probe"])).metrics
            wrong, metrics = _compare_scores(kept, where, found, stage, near=bool(compared.near))
            differences += wrong
    return Verification(
        manifest=str(manifest or MANIFEST),
        model=model["reference"],
        device_class=here,
        made_on=tuple(sorted({e.device_class for e in stated.entries})),
        sequences=len(records),
        recomputed=len(chosen),
        seed=seed,
        equal=compared.equal,
        near=compared.near,
        tolerance=tolerance(recipe),
        farthest=compared.farthest,
        metrics=metrics,
        differences=tuple(differences),
    )


def _stated(project: Project, path: Path) -> tuple[str, Manifest]:
    """Return the stage that a manifest is of, and what it says."""
    stage = "compare" if _same(path, project.work / CANDIDATE) else "embed"
    if stage == "compare" and _is_idle(path):
        raise ConfigError(f"{path} lists nothing: no candidate was set", "check another manifest, or set candidate=")
    return stage, read_manifest(path)


def _composed(
    project: Project,
    stage: str,
    path: Path,
    device: str | None,
    fetching: Callable[[int, int | None], None] | None,
) -> dict[str, Any]:
    """Return the settings of the stage that a manifest is of, with the version that they mean."""
    changes = {"runtime": {"device": device}} if device else {}
    composition = compose(project.work, read_params(project.work / PARAMS), changes=changes)
    composed = resolve_stages(project, composition, (stage,), fetching)
    if composed["stages"][stage]["model"]["reference"] is None:
        raise ConfigError(f"{path} is a candidate's, and params.yaml sets none", "set candidate=NAME@vX.Y.Z there")
    return composed


def _compare_scores(
    kept: Mapping[str, Any], where: str, found: dict[str, Any], stage: str, *, near: bool
) -> tuple[list[Difference], str]:
    """Return what scores that are kept and those that were found differ in, and that in a few words."""
    allowed = turned(found) if near else 0.0
    own = json.loads(json.dumps(found if stage == "embed" else scores(found)))
    wrong = list(differing_metrics(kept, own, allowed, where))
    file = where.partition(":")[0]
    if wrong:
        return wrong, f"{len(wrong)} differ from {file}"
    within = f", or no farther than {TURNED} predictions or {SCORES_APART:.0%} of a score" if near else ""
    return [], f"as {file} says{within}"


def draw(ids: Sequence[str], sample: int, seed: int) -> set[str]:
    """Return some ids by a seed, all where there are no more.

    >>> sorted(draw(["a", "b", "c", "d"], 2, seed=1)) == sorted(draw(["d", "c", "b", "a"], 2, seed=1))
    True
    """
    return set(random.Random(seed).sample(sorted(ids), min(sample, len(ids))))  # noqa: S311 - no secret


def _differing_weights(project: Project, stated: Manifest, model: Mapping[str, Any]) -> Iterator[Difference]:
    if stated.trunk == model["trunk_digest"]:
        return
    registered = project.manager.list_versions(model["name"])
    whose = next((v.reference for v in registered if v.record and v.record.trunk_digest == stated.trunk), None)
    of = f" ({whose})" if whose else ""
    yield Difference(
        "weights", "trunk digest", f"{stated.trunk}{of}", f"{model['trunk_digest']} ({model['reference']})"
    )


def _kept_metrics(project: Project, path: Path, stage: str) -> tuple[dict[str, Any] | None, str]:
    """Return the metrics that belong to a manifest, and where they are; or None, and why there are none."""
    name = METRICS if stage == "embed" else DRIFT
    own = MANIFEST if stage == "embed" else CANDIDATE
    if not _same(path, project.work / own):
        return None, f"not compared: {name} is of {own}"
    try:
        value = json.loads((project.work / name).read_text(encoding="utf-8"))["probe"]
        kept = dict(value if stage == "embed" else value["candidate"])
    except FileNotFoundError:
        return None, f"not compared: there is no {name}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{name} is damaged ({error})", f"run: git checkout {name}") from error
    return kept, f"{name}: probe." if stage == "embed" else f"{name}: probe.candidate."


def _is_idle(path: Path) -> bool:
    """Say whether a candidate's manifest is one of no candidate."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # read_manifest says what is wrong
    return isinstance(value, dict) and "status" in value and "format" not in value


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
