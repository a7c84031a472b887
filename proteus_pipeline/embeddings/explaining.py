"""What a run would do before it does it, and why what is missing is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.deriving import sources
from proteus_pipeline.embeddings.keys import key_array
from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES
from proteus_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.index import SegmentHeader

NEVER = "never seen"
# So many computed proteins are explained one by one, in results/run.json; all of them are counted.
MOST_EXPLAINED = 200
DEVICE_CLASS = "device class"
_COMPONENTS = ("layer", "pooling", "precision", "numerics", "stored", "engine")


@dataclass(frozen=True)
class Plan:
    """What embedding some sequences would take.

    Attributes
    ----------
    sequences, unique
        Asked for, and different ones among them.
    hits, derived, misses
        Of the different ones: stored, derivable from what is stored, to compute.
    tokens
        To compute.
    nbytes
        What the cache would grow by, before compression.
    seconds
        What computing would take here, by what these weights took on this machine's device class before; None where
        they never ran.

    """

    sequences: int
    unique: int
    hits: int
    derived: int
    misses: int
    tokens: int
    nbytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Miss:
    """Why one embedding is not there.

    Attributes
    ----------
    key
        The embedding key that was looked for.
    sequence
        Whose.
    differs
        In what the nearest entry of this sequence differs: ``weights``, ``layer``, ``pooling``, ``precision``,
        ``numerics``, ``stored``, ``engine``, ``policy`` (windows), ``device class``; what was done to the very entry:
        ``invalidated``, ``quarantined``, ``retired``; or ``never seen``.
    nearest
        What that entry was made by, with its trunk digest; None where there is none.
    detail
        For the very entry, the reason that was given.

    """

    key: str
    sequence: str
    differs: tuple[str, ...]
    nearest: Mapping[str, Any] | None = None
    detail: str = ""


def plan(
    cache: EmbeddingCache, sequences: Sequence[str], trunk: str, recipe: Recipe, width: int, device_class: str = ""
) -> Plan:
    """Return what embedding sequences would take; nothing is read but indexes.

    Parameters
    ----------
    cache
        Where stored entries lie.
    sequences
        Normalised.
    trunk, recipe
        As for `proteus_pipeline.embeddings.embedder.embed`.
    width
        The model's.
    device_class
        Whose past speed to go by; any where empty.

    """
    by_key = {recipe.key(trunk, s): s for s in sequences}
    absent = _missing(cache, by_key)
    hits = len(by_key) - len(absent)
    left = _underivable(cache, absent, trunk, recipe)
    lengths = [len(s) for s in left.values()]
    tokens = sum(end - start + 2 for n in lengths for start, end in windows(n, recipe.window, recipe.overlap))
    rows = sum(lengths) if recipe.pooling == "per_residue" else len(lengths)
    rate = speed(cache.visible.segments().values(), trunk, device_class)
    return Plan(
        len(sequences),
        len(by_key),
        hits,
        len(by_key) - hits - len(left),
        len(left),
        tokens,
        rows * width * NUMPY_DTYPES[recipe.stored].itemsize,
        tokens / rate if rate else None,
    )


def speed(headers: Iterable[SegmentHeader], trunk: str, device_class: str) -> float | None:
    """Return the tokens per second that some weights were computed at, over all segments that say so."""
    made = [
        h.attestation
        for h in headers
        if h.trunk == trunk and h.attestation.origin == "computed" and device_class in {"", h.attestation.device_class}
    ]
    seconds = sum(a.seconds for a in made)
    return sum(a.tokens for a in made) / seconds if seconds > 0 else None


def _missing(cache: EmbeddingCache, by_key: Mapping[str, str]) -> dict[str, str]:
    found = cache.look_up(list(by_key))
    return {key: by_key[key] for key in found[-1].missing()}


def _underivable(cache: EmbeddingCache, missing: Mapping[str, str], trunk: str, recipe: Recipe) -> dict[str, str]:
    left = dict(missing)
    for source in sources(recipe):
        stored = {source.key(trunk, s): key for key, s in left.items()}
        left = {stored[other]: left[stored[other]] for other in _missing(cache, stored)}
    return left


def explain(cache: EmbeddingCache, sequences: Iterable[str], trunk: str, recipe: Recipe) -> list[Miss]:
    """Say of each sequence that is a miss why it is one; of hits, and of what can be derived, nothing.

    The nearest entry is one of the same sequence that differs in as few components as any; of two equally near ones,
    the newer.
    """
    by_key = {recipe.key(trunk, s): s for s in dict.fromkeys(sequences)}
    left = _underivable(cache, _missing(cache, by_key), trunk, recipe)
    return explain_missing(cache, left, trunk, recipe)


def explain_missing(cache: EmbeddingCache, missing: Mapping[str, str], trunk: str, recipe: Recipe) -> list[Miss]:
    """Say of each of some sequences, by key, why the cache has no entry of it."""
    left = dict(missing)
    misses = _refused(cache, left)
    for miss in misses:
        left.pop(miss.key)
    for header, differs in _others(cache, trunk, recipe):
        if not left:
            break
        try:
            other = Recipe.of_described(header.recipe)
        except (KeyError, TypeError, ValueError, ConfigError):
            continue  # of a later version, which knows more
        keys = {other.key(header.trunk, s): key for key, s in left.items()}
        absent = set(_missing(cache, keys))
        nearest = dict(header.recipe) | {"trunk": header.trunk}
        for near, key in keys.items():
            # Windows matter to sequences longer than one: for the others, this is the very key.
            if near not in absent and near != key:
                sequence = left.pop(key)
                same = recipe.identity(len(sequence))["windows"] == other.identity(len(sequence))["windows"]
                misses.append(Miss(key, sequence, tuple(d for d in differs if d != "policy" or not same), nearest))
    never = (NEVER,)  # one for all: of a first run's
    return misses + [Miss(key, sequence, never) for key, sequence in left.items()]


def _refused(cache: EmbeddingCache, left: Mapping[str, str]) -> list[Miss]:
    """Return the misses whose very entry is there, and hidden or of another device class."""
    misses: dict[str, Miss] = {}
    keys = sorted(left)
    if not keys:
        return []
    wanted = key_array(keys)
    events = cache.visible.events
    for index in cache.visible.indexes:
        for place, number in zip(*(column.tolist() for column in index.locate(wanted)[::2]), strict=True):
            if number >= len(index.segments):
                continue  # damage: what was large was not checked when it was opened
            key, header = keys[place], index.segments[number]
            why = next((e for e in events if e.hides(header) or key in e.segments.get(header.segment, ())), None)
            nearest = dict(header.recipe) | {"trunk": header.trunk}
            if why:
                misses.setdefault(key, Miss(key, left[key], (why.kind,), nearest, why.reason))
            else:
                misses[key] = Miss(key, left[key], (DEVICE_CLASS,), nearest, header.attestation.device_class)
    return list(misses.values())


def _others(cache: EmbeddingCache, trunk: str, recipe: Recipe) -> list[tuple[SegmentHeader, tuple[str, ...]]]:
    """Return one header of each other combination of weights and recipe in the cache, with what differs, nearest first."""
    newest: dict[tuple[object, ...], SegmentHeader] = {}
    for header in cache.all_segments():
        described = tuple(str(v) for _, v in sorted(header.recipe.items()))
        known = newest.get((header.trunk, *described))
        if known is None or known.published < header.published:
            newest[header.trunk, *described] = header
    mine = recipe.described()
    found = []
    for header in newest.values():
        differs = ["weights"] if header.trunk != trunk else []
        differs += [c for c in _COMPONENTS if header.recipe.get(c) != mine[c]]
        differs += ["policy"] if (header.recipe.get("windows") or None) != (mine["windows"] or None) else []
        if differs:
            found.append((header, tuple(differs)))
    return sorted(found, key=lambda pair: (len(pair[1]), -pair[0].published))


def counts(misses: Iterable[Miss]) -> dict[str, int]:
    """Return how many misses there are for each reason, the most frequent first."""
    return dict(Counter(" and ".join(m.differs) for m in misses).most_common())
