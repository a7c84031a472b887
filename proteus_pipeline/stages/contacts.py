"""contacts: contact maps of a few proteins, by the model's contact head where it has one, for the page.

A map is kept in ``.proteus/contacts`` under a key of what decides it, so that a changed file of proteins computes only
the maps of proteins that are new among the chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from proteus_pipeline.identity import digests
from proteus_pipeline.models.encoder import ENGINE_REVISION, Outputs
from proteus_pipeline.models.pooling import finite
from proteus_pipeline.sequences.fasta import Record, read_fasta
from proteus_pipeline.stages.embed import stage_encoder
from proteus_pipeline.stages.project import CONTACTS, SEQUENCES, Project
from proteus_pipeline.stores.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

FOLDER = ".proteus/contacts"
FORMAT = 1
HEAD = "contact_head"
# The head was fitted to pairs at least this far apart in the sequence; nearer ones touch in any protein.
SEPARATION = 6
# What is kept of a map, in percent: the rest is nearly all of the pairs, and shows nothing.
LEAST = 5


@dataclass(frozen=True)
class ContactMap:
    """One protein's predicted contacts.

    Attributes
    ----------
    id, sequence
        The protein's.
    pairs
        ``(i, j, percent)`` of each pair of residues, counted from 1, i < j, at least `SEPARATION` apart, whose
        probability is `LEAST` percent or more.

    """

    id: str
    sequence: str
    pairs: tuple[tuple[int, int, int], ...]


def run(here: Project) -> None:
    """Write results/contacts.json."""
    composed = here.composed
    settings = composed["report"]
    chosen = choose(list(read_fasta(here.work / SEQUENCES)), settings["contacts"], settings["contacts_max_length"])
    components = _components(here, composed) if chosen else {}
    maps, computed = _maps(here, composed, components, chosen) if HEAD in components else ([], 0)
    status = "ok" if maps else "no contact head" if chosen else "no proteins"
    value = {"format": FORMAT, "status": status, "maps": [asdict(one) for one in maps]}
    write_atomic(here.work / CONTACTS, (json.dumps(value) + "\n").encode())
    # Not as hits and computed, which count embeddings.
    here.record("contacts", result=status, maps=len(maps), maps_computed=computed)


def choose(records: Sequence[Record], count: int, longest: int) -> list[Record]:
    """Return at most `count` records of at most `longest` residues, evenly spaced in their order, no sequence twice."""
    first: dict[str, Record] = {}
    for record in records:
        if SEPARATION < len(record.sequence) <= longest:
            first.setdefault(record.sequence, record)
    short = list(first.values())
    count = min(count, len(short))
    return [short[i * len(short) // count] for i in range(count)]


def sparse(contacts: NDArray[np.float32]) -> tuple[tuple[int, int, int], ...]:
    """Return the pairs that a `ContactMap` keeps of (L, L) probabilities."""
    import numpy as np

    percent = np.rint(np.triu(contacts, SEPARATION) * 100).astype(int)
    rows, columns = np.nonzero(percent >= LEAST)
    return tuple(zip((rows + 1).tolist(), (columns + 1).tolist(), percent[rows, columns].tolist(), strict=True))


def _components(here: Project, composed: Mapping[str, Any]) -> Mapping[str, str]:
    from proteus_pipeline.registry.provision import provide

    version = provide(here.manager, composed["stages"]["embed"]["model"]["reference"], here.catalogue)
    return version.record.components if version.record else version.checkpoint.digests


def _maps(
    here: Project, composed: dict[str, Any], components: Mapping[str, str], chosen: Sequence[Record]
) -> tuple[list[ContactMap], int]:
    """Return the maps of some records, in their order, and how many of them were computed."""
    e = composed["embedding"]
    decides = [components["trunk"], components[HEAD], e["precision"], e["numerics"], ENGINE_REVISION]
    paths = {
        r.sequence: here.home / FOLDER / f"{digests.of_record('contacts', [*decides, r.sequence])}.json" for r in chosen
    }
    pairs = {s: known for s, path in paths.items() if (known := _kept(path)) is not None}
    missing = [s for s in paths if s not in pairs]
    if missing:
        encoder = stage_encoder(here, composed, "embed")
        budget = composed["runtime"]["tokens_per_batch"]
        with closing(encoder.compute(missing, Outputs(contacts=True), budget)) as encoded:
            for index, outputs in encoded:
                assert outputs.contacts is not None  # noqa: S101 - they were asked for
                found = sparse(finite(outputs.contacts, e["precision"]))
                pairs[missing[index]] = found
                _keep(paths[missing[index]], found)
    return [ContactMap(r.id, r.sequence, pairs[r.sequence]) for r in chosen], len(missing)


def _keep(path: Path, pairs: Sequence[Sequence[int]]) -> None:
    text = json.dumps(pairs)
    write_atomic(
        path, json.dumps({"format": FORMAT, "digest": digests.of_bytes(text.encode()), "pairs": text}).encode()
    )


def _kept(path: Path) -> tuple[tuple[int, int, int], ...] | None:
    """Return the pairs that were kept, or None where there are none, or their bytes are not what was written."""
    try:
        value = json.loads(path.read_bytes())
        text = value["pairs"]
        if value["format"] != FORMAT or value["digest"] != digests.of_bytes(text.encode()):
            return None
        return tuple((int(i), int(j), int(percent)) for i, j, percent in json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
