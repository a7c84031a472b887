"""prepare: a FASTA file becomes clean records and their labels; every rule is in the configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from proteus_pipeline.sequences.fasta import Record, read_fasta, write_fasta
from proteus_pipeline.sequences.labels import LabelTable, labels_from_headers, read_labels, write_labels
from proteus_pipeline.sequences.rules import Counts, clean
from proteus_pipeline.stages.compose import rules_of
from proteus_pipeline.stages.project import COUNTS, LABELS, SEQUENCES, Project
from proteus_pipeline.stores.files import write_atomic


def run(project: Project) -> None:
    """Write the clean FASTA file, the labels, and what was done to the records."""
    records, counts, table = prepared(project, project.composed["data"])
    (project.work / SEQUENCES).parent.mkdir(parents=True, exist_ok=True)
    write_fasta(project.work / SEQUENCES, records)
    write_labels(project.work / LABELS, table.labels)
    facts = dataclasses.asdict(counts) | {"labelled": len(table.labels), "labels_ignored": table.ignored}
    write_atomic(project.work / COUNTS, (json.dumps(facts, indent=1) + "\n").encode())
    project.record("prepare", sequences=counts.kept, **facts)


def prepared(project: Project, data: dict[str, Any]) -> tuple[list[Record], Counts, LabelTable]:
    """Return the clean records that a composed ``data`` section names, what was done to them, and their labels."""
    records, counts = clean(read_fasta(project.find_file(data["fasta"])), rules_of(data))
    if data["labels"]:
        return records, counts, read_labels(project.find_file(data["labels"]), {r.id for r in records})
    return records, counts, LabelTable(labels_from_headers(records, data["label_key"]))
