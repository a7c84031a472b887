"""What a result says beside what is found here: recipe, sequences, numbers, scores; and how far apart they may be."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.computing import Progress, compute
from proteus_pipeline.embeddings.manifest import Listed, Manifest
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.sketch import distance, sketch
from proteus_pipeline.embeddings.stored import content_hash, to_fp32
from proteus_pipeline.errors import ConfigError
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages.probe import one_vector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from proteus_pipeline.models.encoder import Encoder

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
TURNED = 3
SCORES_APART = 0.01
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
    return TURNED / (len(classes) * min(classes.values())) if classes else SCORES_APART


def _close(name: str, one: object, other: object, allowed: float) -> bool:
    if not (isinstance(one, float) and isinstance(other, float)):
        return False  # counts and words must be the same
    return abs(one - other) <= (SCORES_APART * abs(other) if name in _UNBOUNDED else allowed)


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
