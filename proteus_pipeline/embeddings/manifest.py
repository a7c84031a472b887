"""The manifest: what an embed stage made, in a small file whose bytes change when a number does.

It holds content hashes and sketches, not vectors; those are in the cache. So a clone can tell from git alone whether it
computes the same, and where other bits are right, on another device class, how far they are apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.sketch import PROJECTIONS, Sketch, sketch
from proteus_pipeline.embeddings.stored import to_fp32
from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.stores.files import storage_error, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
# Above every sum of as many fp32 numbers as a disk can hold.
_LARGEST_SUM = 1e60
_STAGES = {"results/embeddings.json": "embed", "results/candidate.json": "compare"}
DEFAULT_CACHE = ".proteus/cache"


@dataclass(frozen=True, slots=True)
class Listed(Embedded):
    """A manifest's row: an embedding, the device class that computed it, and its sketch."""

    device_class: str
    sketch: Sketch


@dataclass(frozen=True)
class Manifest:
    """A list of embeddings by sequence id, all by the same weights and recipe."""

    trunk: str
    recipe: dict[str, Any]
    ids: tuple[str, ...]
    entries: tuple[Listed, ...]


def listed(cache: EmbeddingCache, entries: Sequence[Embedded]) -> list[Listed]:
    """Return what a manifest says of embeddings that are in a cache.

    Raises
    ------
    StorageError
        When one is not there any more.

    """
    wanted = {e.key: e for e in entries}
    rows: dict[str, Listed] = {}
    for entry, array in cache.find(wanted):
        if entry.content != wanted[entry.key].content:
            continue  # since these were made, another device class's came first
        e = wanted[entry.key]
        rows[e.key] = Listed(e.key, e.shape, e.stored, e.content, entry.device_class, sketch(array, e.stored))
    for key, found in cache.candidates([key for key in wanted if key not in rows]).items():
        for entry in found:
            if entry.content == wanted[key].content:
                e, made = wanted[key], sketch(cache.read(entry), entry.stored)
                rows[key] = Listed(e.key, e.shape, e.stored, e.content, entry.device_class, made)
                break
    if gone := [key for key in wanted if key not in rows]:
        raise StorageError(f"{len(gone)} of {len(wanted)} embeddings are gone from {cache.path} again", "run it again")
    return [rows[e.key] for e in entries]


def write_manifest(
    path: Path, trunk: str, recipe: dict[str, Any], ids: Sequence[str], entries: Sequence[Listed]
) -> None:
    """Write a manifest, one sequence a line: the same bytes for the same numbers of the same origin."""
    classes = sorted({e.device_class for e in entries})
    about = {"format": FORMAT, "trunk": trunk, "recipe": recipe, "device_classes": classes}
    head = json.dumps(about, sort_keys=True)
    rows = [
        json.dumps(
            {
                "id": i,
                "key": e.key,
                "shape": list(e.shape),
                "dtype": e.stored,
                "content": e.content,
                "device_class": classes.index(e.device_class),
                "sketch": e.sketch,
            }
        )
        for i, e in zip(ids, entries, strict=True)
    ]
    text = f'{head[:-1]}, "sequences": [\n' + ",\n".join(rows) + "\n]}\n"
    write_atomic(path, text.encode())


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises
    ------
    StorageError
        When there is none, or it can't be read.
    IntegrityError
        When it is damaged or of another format.

    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist", remedy(path, "dvc repro")) from error
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        value = json.loads(data)
        if value["format"] != FORMAT:
            raise IntegrityError(
                f"{path} has format {_brief(value['format'])}, and this proteus reads {FORMAT}",
                remedy(path, "dvc repro"),
            )
        rows, recipe = value["sequences"], _recipe(value["recipe"])
        entries = tuple(_row(r, value["device_classes"]) for r in rows)
        return Manifest(_text(value["trunk"]), recipe, tuple(_text(r["id"]) for r in rows), entries)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise IntegrityError(f"{path} is damaged ({what})", remedy(path, "dvc repro --force --single-item")) from error


def remedy(path: Path, command: str) -> str:
    """Return what makes a manifest anew, by the stage that its name says it is of."""
    stage = _STAGES.get("/".join(path.absolute().parts[-2:]))
    return f"run: {command} {stage}" if stage else f"give a manifest, such as {' or '.join(_STAGES)}"


def _recipe(value: object) -> dict[str, Any]:
    """Return a recipe whose values are such as a recipe's are; which they are, is for others to compare."""
    if not isinstance(value, dict):
        raise TypeError(f"{_brief(value)} is no recipe")
    for name, field in value.items():
        if not (_is_windows(field) if name == "windows" else type(field) in {str, int, type(None)}):
            raise TypeError(f"{_brief(field)} is no {name} of a recipe")
        _text(str(field))
    return value


def _is_windows(value: object) -> bool:
    return value is None or (isinstance(value, list) and [type(n) for n in value] == [int, int])


def _row(row: dict[str, Any], classes: list[str]) -> Listed:
    numbers = tuple(_text(number) for number in row["sketch"])
    # A comparison with nan is false.
    if len(numbers) != PROJECTIONS + 1 or not all(abs(float(number)) < _LARGEST_SUM for number in numbers):
        raise ValueError(f"{_brief(numbers)} is no sketch")
    number, shape = row["device_class"], row["shape"]
    if type(number) is not int or number < 0:
        raise ValueError(f"{_brief(number)} is no device class's number")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise TypeError(f"{_brief(shape)} is no shape")
    texts = map(_text, (row["key"], row["dtype"], row["content"], classes[number]))
    key, stored, content, device_class = texts
    return Listed(key, tuple(shape), stored, content, device_class, numbers)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_brief(value)} is no text")
    value.encode()  # JSON can write halves of characters, which nothing can print
    return value


def _brief(value: object) -> str:
    return ascii(value)[:80]


def load_embeddings(
    manifest: str | Path, cache: str | Path | EmbeddingCache | None = None
) -> tuple[list[str], list[NDArray[np.float32]]]:
    """Return what a manifest lists: ids, and their embeddings as fp32, (D,) or (L, D) each.

    Parameters
    ----------
    manifest
        Such as ``results/embeddings.json``.
    cache
        The embedding cache; by default ``.proteus/cache`` in the manifest's folder or the nearest one above it.

    Raises
    ------
    StorageError
        When an embedding is not in the cache, or another one is there in its place.
    IntegrityError
        When it is there and damaged.

    """
    path = Path(manifest)
    listed = read_manifest(path)
    store = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache or _nearest_cache(path))
    wanted = {e.key: e.content for e in listed.entries}
    found: dict[str, NDArray[np.float32]] = {}
    damage: StorageError | None = None
    for key, entries in store.candidates(list(wanted)).items():
        # The manifest means these bits: an entry of another device class may hold others.
        for entry in entries:
            if entry.content == wanted[key]:
                try:
                    found[key] = to_fp32(store.read(entry), entry.stored)
                except StorageError as error:
                    damage = error  # the same bits may be stored a second time
                    continue
                break
    if missing := [i for i, e in zip(listed.ids, listed.entries, strict=True) if e.key not in found]:
        kind = IntegrityError if isinstance(damage, IntegrityError) else StorageError
        raise kind(
            f"{len(missing)} of {len(listed.ids)} embeddings of {path} are not in {store.path}, {missing[0]} first",
            remedy(path, "dvc repro --force --single-item"),
        ) from damage
    return list(listed.ids), [found[e.key] for e in listed.entries]


def _nearest_cache(path: Path) -> Path:
    parents = path.resolve().parents
    return next((p / DEFAULT_CACHE for p in parents if (p / DEFAULT_CACHE).is_dir()), parents[0] / DEFAULT_CACHE)
