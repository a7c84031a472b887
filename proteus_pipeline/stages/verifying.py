"""``proteus verify``: whether a committed result is what its weights, its settings and its sequences give.

Nothing that was computed before is believed: the sequences are made again from the committed inputs, and embedded again,
past the cache. What is compared is a manifest, which git has, and the scores that were computed from it.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.config.composition import PARAMS, compose, read_params
from proteus_pipeline.embeddings.computing import Progress, compute
from proteus_pipeline.embeddings.manifest import Listed, Manifest, read_manifest
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.sketch import distance, sketch
from proteus_pipeline.embeddings.stored import content_hash, to_fp32
from proteus_pipeline.errors import ConfigError, IntegrityError
from proteus_pipeline.models.device import device_class, resolve_device
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages.compare import scores
from proteus_pipeline.stages.compose import recipe_of, resolve_stages
from proteus_pipeline.stages.embed import stage_encoder
from proteus_pipeline.stages.prepare import prepared
from proteus_pipeline.stages.probe import one_vector, probe_records
from proteus_pipeline.stages.probing import ProbeSettings
from proteus_pipeline.stages.project import CANDIDATE, DRIFT, MANIFEST, METRICS, Project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.models.encoder import Encoder

SAMPLE = 200  # sequences that are computed again, where nobody says how many
# How far an embedding may be, by relative L2, from the same one of another device class. Measured on the real 8M weights and
# the 100 demonstration proteins, layers 3 and 6, all poolings; AVX-512 against AVX2 and against no vector instructions, in
# torch, MKL and oneDNN alike. The worst of 900 embeddings, and in parentheses as their sketches tell it:
#   2.8e-6 (3.7e-6)  fp32
#   8.4e-3 (1.2e-2)  mixed
#   2.0e-2 (3.4e-2)  bf16
# Deeper models round more often: a factor of 5 is left to them in fp32, of 2.4 where weights rounded to bf16, 1e-2 away,
# could not be told apart anyhow. In fp32 even weights rounded to fp16, 1.3e-3 away, are. Two proteins are 0.16 apart, or more.
TOLERANCES = {"fp32": 2e-5, "mixed": 3e-2, "bf16": 8e-2}
# Where two numbers differ by a little, rounding to a stored dtype moves some of them by a whole step of it. Measured on the
# same embeddings: 4.7e-5 in fp16 and 1.1e-4 in bf16, of fp32's 2.8e-6.
_STEPS = {"fp32": 0.0, "fp16": 2.0**-10, "bf16": 2.0**-7}
# Of so many predictions that fall the other way, scores that count them may differ, on another device class; of the others,
# so large a part. Measured on the same proteins: fp32 turns none, mixed none, bf16 one, with 0.25% of the log loss.
_TURNED = 3
_SCORES_APART = 0.01
_UNBOUNDED = ("log_loss", "mae", "rmse")


@dataclass(frozen=True)
class Difference:
    """One thing that is not what the result says.

    Attributes
    ----------
    kind
        ``weights``, ``recipe``, ``sequences``, ``numbers`` or ``metrics``: what to do about it is said for each.
    what
        The thing.
    expected, found
        What the committed files say, and what is so here.

    """

    kind: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, found {self.found}"


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
    stage = "compare" if _same(path, project.work / CANDIDATE) else "embed"
    if stage == "compare" and _is_idle(path):
        raise ConfigError(f"{path} lists nothing: no candidate was set", "check another manifest, or set candidate=")
    stated = read_manifest(path)
    changes = {"runtime": {"device": device}} if device else {}
    composition = compose(project.work, read_params(project.work / PARAMS), changes=changes)
    composed = resolve_stages(project, composition, (stage,), fetching)
    model = composed["stages"][stage]["model"]
    if model["reference"] is None:
        raise ConfigError(f"{path} is a candidate's, and params.yaml sets none", "set candidate=NAME@vX.Y.Z there")
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
            allowed = turned(found) if compared.near else 0.0
            own = json.loads(json.dumps(found if stage == "embed" else scores(found)))
            wrong = list(differing_metrics(kept, own, allowed, where))
            differences += wrong
            file = where.partition(":")[0]
            metrics = f"{len(wrong)} differ from {file}" if wrong else f"as {file} says"
            if compared.near and not wrong:
                metrics += f", or no farther than {_TURNED} predictions or {_SCORES_APART:.0%} of a score"
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


def draw(ids: Sequence[str], sample: int, seed: int) -> set[str]:
    """Return some ids by a seed, all where there are no more.

    >>> sorted(draw(["a", "b", "c", "d"], 2, seed=1)) == sorted(draw(["d", "c", "b", "a"], 2, seed=1))
    True
    """
    return set(random.Random(seed).sample(sorted(ids), min(sample, len(ids))))  # noqa: S311 - no secret


def tolerance(recipe: Recipe) -> float:
    """Return how far apart, by relative L2, two device classes may be.

    >>> f"{tolerance(Recipe(layer=6)):.1e}", f"{tolerance(Recipe(layer=6, stored='fp16')):.1e}"
    ('2.0e-05', '1.6e-04')
    """
    rounding = TOLERANCES[recipe.precision]
    return rounding + math.sqrt(rounding * _STEPS[recipe.stored])


def differing_recipe(stated: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield what a manifest's recipe and the settings differ in."""
    for name in sorted({*stated, *own}):
        if stated.get(name) != own.get(name):
            yield Difference("recipe", f"recipe: {name}", str(stated.get(name)), str(own.get(name)))


def differing_sequences(stated: Manifest, records: Sequence[Record], fasta: str) -> Iterator[Difference]:
    """Yield each id whose key is not that of its sequence by the manifest's own weights and recipe."""
    try:
        recipe = Recipe.of_described(stated.recipe)
        own = {r.id: recipe.key(stated.trunk, r.sequence) for r in records}
    except (ConfigError, KeyError, TypeError, ValueError):
        return  # the recipe is no recipe, and was said to be another one
    listed = {i: e.key for i, e in zip(stated.ids, stated.entries, strict=True)}
    ids = {key: i for i, key in own.items()}
    for i, times in Counter(stated.ids).items():
        if times > 1:
            yield Difference("sequences", f"{i}: in the manifest", "one row", f"{times} rows")
    for i, key in own.items():
        if i not in listed:
            yield Difference("sequences", f"{i}: in the manifest", "no row", f"a sequence in {fasta}")
        elif listed[i] != key:
            whose = f", the key of {ids[listed[i]]}" if listed[i] in ids else ""
            yield Difference("sequences", f"{i}: key of its sequence", f"{listed[i]}{whose}", key)
    for i in listed.keys() - own.keys():
        yield Difference("sequences", f"{i}: in {fasta}", "a sequence", "none")


def differing_metrics(
    kept: Mapping[str, Any], found: Mapping[str, Any], allowed: float, path: str = ""
) -> Iterator[Difference]:
    """Yield each score that differs: at all, or where `allowed` is not 0, by more than another device class may make.

    Parameters
    ----------
    kept, found
        Scores, nested.
    allowed
        What the predictions that may fall the other way change in a score that counts them; 0 for none.
    path
        Before the name of each score.

    """
    for name in sorted({*kept, *found}):
        one, other = kept.get(name), found.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differing_metrics(one, other, allowed, f"{path}{name}.")
        elif one != other and not (allowed and _close(name, one, other, allowed)):
            yield Difference("metrics", f"{path}{name}", json.dumps(one), json.dumps(other))


def turned(metrics: Mapping[str, Any]) -> float:
    """Return what some predictions that fall the other way change at most in scores that count predictions.

    >>> round(turned({"classes": {"inside": 10, "outside": 90}}), 3)
    0.15
    """
    classes = metrics.get("classes")
    # Balanced scores are means over classes: a member of the smallest weighs most.
    return _TURNED / (len(classes) * min(classes.values())) if classes else _SCORES_APART


def _close(name: str, one: object, other: object, allowed: float) -> bool:
    if not (isinstance(one, float) and isinstance(other, float)):
        return False  # counts and words must be the same
    return abs(one - other) <= (_SCORES_APART * abs(other) if name in _UNBOUNDED else allowed)


class Comparison:
    """A manifest's rows beside what is computed here and now.

    Attributes
    ----------
    equal, near, farthest, differences
        As in `Verification`.

    """

    def __init__(self, stated: Manifest, recipe: Recipe, device_class: str) -> None:
        self._recipe, self._here, self._allowed = recipe, device_class, tolerance(recipe)
        self._rows: dict[str, list[tuple[str, Listed]]] = {}
        for i, e in zip(stated.ids, stated.entries, strict=True):
            self._rows.setdefault(e.key, []).append((i, e))
        self.equal = self.near = 0
        self.farthest = 0.0
        self.differences: list[Difference] = []

    def run(
        self, encoder: Encoder, wanted: Mapping[str, str], token_budget: int, progress: Progress | None
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Compute sequences by key, compare them with their rows, and yield each one's vector as the probe reads it."""
        if progress:
            progress.start(len(wanted), 0, sum(len(s) + 2 for s in wanted.values()), 0.0)
        for computed in compute(encoder, self._recipe, wanted, token_budget):
            if progress:
                progress.advance(1, len(wanted[computed.key]) + 2, 0.0)
            for i, row in self._rows.get(computed.key, ()):
                self.compare(i, row, computed.array)
            yield computed.key, one_vector(to_fp32(computed.array, self._recipe.stored))

    def compare(self, name: str, row: Listed, array: NDArray[np.generic]) -> None:
        """Compare one row with its array."""
        stored = self._recipe.stored
        content, own = content_hash(array, stored), sketch(array, stored)
        apart = distance(row.sketch, own)
        # A dtype and a shape are part of the content hash, but not of what people read.
        for what, told, is_so in (("dtype", row.stored, stored), ("shape", row.shape, array.shape)):
            if told != is_so:
                self._differs(f"{name}: {what}", str(told), str(is_so))
        if content == row.content:
            self.equal += 1
            if own != row.sketch:
                self._differs(f"{name}: sketch", " ".join(row.sketch), " ".join(own))
        elif row.device_class == self._here and self._recipe.numerics == "strict":
            self._differs(f"{name}: content", row.content, f"{content}, {_far(apart)}")
        elif not apart:
            # Of some 3,800 embeddings with other bits on another class (AVX-512, AVX2, no vector instructions; fp32 in all
            # poolings and stored dtypes) none had the same sketch: so this hash is not that of the sketch's array.
            self._differs(f"{name}: content", row.content, f"{content}, {_far(apart)}")
        elif apart <= self._allowed:
            self.near += 1
            self.farthest = max(self.farthest, apart)
        else:
            self._differs(f"{name}: embedding", f"one within {self._allowed:.1e}, by {row.device_class}", _far(apart))

    def _differs(self, what: str, expected: str, found: str) -> None:
        self.differences.append(Difference("numbers", what, expected, found))


def _far(apart: float) -> str:
    return f"{apart:.1e} away by its sketch" if apart else "the same by its sketch"


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
