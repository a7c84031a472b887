"""The rules that make a sequence one that ESM-2 can read. Nothing about a residue changes unless a rule says so.

The same sequence in gives the same sequence out, whatever its id and wherever it stands in a file: the digest of the
normalised sequence is part of every embedding's key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from proteus_pipeline.errors import ConfigError, SequenceError
from proteus_pipeline.sequences.fasta import Record, shown

ALPHABET = "LAGVSERTIDPKQNFYMHWCXBUZO"
"""The letters ESM-2's vocabulary has: all but J (leucine or isoleucine)."""

_CHOICES = {
    "unknown": ("error", "x", "drop"),
    "stops": ("strip", "error"),
    "gaps": ("error", "remove"),
    "duplicates": ("error", "first"),
    "long": ("error", "truncate", "window"),
}
_UNGAP = str.maketrans("", "", "-.")
_REFUSALS = (
    ("which is no residue", re.compile(r"[^A-Za-z*.-]"), "correct the sequence"),
    ("a gap", re.compile(r"[.-]"), "take gaps out with data.gaps=remove"),
    (
        "a stop before the end",
        re.compile(r"\*(?=[.-]*[^.-])"),
        "split the sequence at its stops, or correct its frame",
    ),
    ("a stop", re.compile(r"\*"), "take it off the end with data.stops=strip"),
    (
        "a letter that ESM-2 does not know",
        re.compile(rf"[^{ALPHABET}{ALPHABET.lower()}*.-]"),
        "read it as X with data.unknown=x, or leave the record out with data.unknown=drop",
    ),
)


@dataclass(frozen=True)
class Rules:
    """What to do with what ESM-2 can't read; the fields are the config's ``data.*`` keys.

    Attributes
    ----------
    unknown
        A letter that is not in `ALPHABET` (J): ``error``; ``x`` reads it as X; ``drop`` leaves the record out.
    stops
        ``*`` at the end: ``strip`` or ``error``. One anywhere else is always an error.
    gaps
        ``-`` and ``.``: ``error`` or ``remove``.
    duplicates
        An id with two different sequences: ``error``, or ``first`` to keep the first. An id that comes again with the
        same sequence is kept once.
    long
        A sequence of more than `max_length` residues: ``error``; ``truncate`` keeps its first ones; ``window`` keeps it
        whole, to be embedded in windows.
    max_length
        In residues, without the special tokens.

    Raises
    ------
    ConfigError
        For a value that is none of these.

    """

    unknown: str = "error"
    stops: str = "strip"
    gaps: str = "error"
    duplicates: str = "error"
    long: str = "error"
    max_length: int = 1022

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError(f"data.{field}={value!r} is not known", f"use one of {', '.join(allowed)}")
        length = self.max_length
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ConfigError(f"data.max_length={length!r} is no length", "use a whole number of residues, 1 or more")


@dataclass(frozen=True)
class Counts:
    """What `clean` did; ``records == kept + repeated + dropped``.

    Attributes
    ----------
    records
        Records read.
    kept
        Records returned.
    unique
        Distinct sequences among those kept.
    residues
        Residues of those kept, all together.
    repeated
        Records left out because their id had come before.
    replaced
        Residues of those kept that were set to X.
    dropped
        Records left out for a letter ESM-2 does not know.
    truncated
        Records kept that were cut to ``max_length``.
    windowed
        Records longer than ``max_length`` that were kept whole.

    """

    records: int = 0
    kept: int = 0
    unique: int = 0
    residues: int = 0
    repeated: int = 0
    replaced: int = 0
    dropped: int = 0
    truncated: int = 0
    windowed: int = 0


@dataclass(frozen=True)
class _Outcome:
    sequence: str
    replaced: int = 0
    truncated: bool = False


def clean(records: Iterable[Record], rules: Rules) -> tuple[list[Record], Counts]:
    """Apply the rules to records, in their order, reading each once.

    Raises
    ------
    SequenceError
        For the first record that the rules refuse, with its id and the override that would admit it; for records that
        were all dropped.

    """
    kept: dict[str, Record] = {}
    read = repeated = replaced = dropped = truncated = windowed = 0
    for record in records:
        read += 1
        outcome = _apply(record.sequence, rules, f"record {shown(record.id)}")
        if not outcome.sequence:
            dropped += 1
            continue
        earlier = kept.get(record.id)
        if earlier is not None:
            if earlier.sequence != outcome.sequence and rules.duplicates == "error":
                raise SequenceError(
                    f"record {shown(record.id)} comes twice, with different sequences",
                    "rename one, or keep the first with data.duplicates=first",
                )
            repeated += 1
            continue
        kept[record.id] = Record(record.id, outcome.sequence, record.description)
        replaced += outcome.replaced
        truncated += outcome.truncated
        windowed += len(outcome.sequence) > rules.max_length
    if dropped and not kept:
        raise SequenceError(
            "data.unknown=drop left no record: each has a letter that ESM-2 does not know",
            "read such letters as X with data.unknown=x",
        )
    return list(kept.values()), Counts(
        records=read,
        kept=len(kept),
        unique=len({record.sequence for record in kept.values()}),
        residues=sum(len(record.sequence) for record in kept.values()),
        repeated=repeated,
        replaced=replaced,
        dropped=dropped,
        truncated=truncated,
        windowed=windowed,
    )


def normalise(sequence: str, rules: Rules, name: str = "sequence") -> str:
    """Return one sequence as ESM-2 reads it, by the same rules as `clean`.

    It is upper case, in `ALPHABET`, and never empty, but for a sequence that ``unknown="drop"`` leaves out: that
    gives ``""``. `name` is what messages call it.

    >>> normalise("mkJv*", Rules(unknown="x"))
    'MKXV'

    Raises
    ------
    SequenceError
        For a sequence the rules refuse, with the position (from 1, in `sequence` as given) and the override that would
        admit it where there is one.

    """
    return _apply(sequence, rules, name).sequence


def _apply(sequence: str, rules: Rules, name: str) -> _Outcome:
    residues = sequence.upper()
    if rules.gaps == "remove":
        residues = residues.translate(_UNGAP)
    if rules.stops == "strip":
        residues = residues.removesuffix("*")
    unknown = residues.count("J")
    if not (sequence.isascii() and residues.isalpha()) or (unknown and rules.unknown == "error"):
        raise _refusal(sequence, rules, name)
    if unknown and rules.unknown == "drop":
        return _Outcome("")
    truncated = False
    if len(residues) > rules.max_length:
        if rules.long == "error":
            raise SequenceError(
                f"{name} has {len(residues)} residues, more than data.max_length={rules.max_length}",
                "keep the first ones with data.long=truncate, or embed it in windows with data.long=window",
            )
        if rules.long == "truncate":
            residues, truncated = residues[: rules.max_length], True
            unknown = residues.count("J")
    return _Outcome(residues.replace("J", "X"), unknown, truncated)


def _refusal(sequence: str, rules: Rules, name: str) -> SequenceError:
    """Say what the rules refuse, in the sequence as given: upper-casing turns some foreign letters into A-Z."""
    for kind, refused, remedy in _REFUSALS:
        if (kind == "a gap" and rules.gaps == "remove") or (kind == "a stop" and rules.stops == "strip"):
            continue
        found = refused.search(sequence)
        if found:
            return SequenceError(f"{name} has {found.group()!r} at position {found.start() + 1}, {kind}", remedy)
    return SequenceError(f"{name} has no residues", "remove it, or give its sequence")
