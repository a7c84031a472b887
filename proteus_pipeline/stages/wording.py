"""How the page says numbers, sizes, times and reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SCORES = {
    "classification": {
        "accuracy": "Accuracy",
        "balanced_accuracy": "Balanced accuracy",
        "macro_f1": "Macro F1",
        "mcc": "Matthews correlation",
        "log_loss": "Log loss (lower is better)",
    },
    "regression": {
        "r2": "R²",
        "spearman": "Spearman correlation",
        "mae": "Mean absolute error (lower is better)",
        "rmse": "Root mean square error (lower is better)",
    },
}
# What `proteus_pipeline.embeddings.explaining.Miss.differs` says, in sentences.
_REASONS = {
    "never seen": "The cache had nothing of this sequence.",
    "weights": "The cache had this sequence by other weights.",
    "invalidated": "Its entry was invalidated.",
    "quarantined": "Its entry was damaged, and is in quarantine.",
    "retired": "Its entry was evicted, or its file removed.",
    "device class": "Its entry is of another device class, which cache.accept=same_class refuses.",
    "engine": "The code that computes has changed its numbers since.",
    "policy": "It was cut into other windows.",
}
_MINUTE, _HOUR = 60.0, 3600.0
# Classes that are named, and characters of each: a class is whatever the entry's maker called it.
_FEW, _LONGEST = 5, 60


def number(value: float, digits: int = 3) -> str:
    """Return a number with so many decimals, and a minus that is as wide as a plus."""
    return f"{value:.{digits}f}".replace("-", MINUS)


def small(value: float) -> str:
    """Return three significant digits, with a power of ten in place of e-07."""
    mantissa, e, exponent = f"{value:#.3g}".partition("e")
    shown = mantissa.rstrip(".").replace("-", MINUS)
    return f"{shown} {TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPT)}" if e else shown


def seconds(value: float) -> str:
    """Return a time as people say it.

    >>> seconds(0.01), seconds(2.775), seconds(200), seconds(9000)
    ('0.0 s', '2.8 s', '3.3 min', '2.5 h')
    """
    if value < 2 * _MINUTE:
        return f"{value:.1f} s"
    return f"{value / _MINUTE:.1f} min" if value < 2 * _HOUR else f"{value / _HOUR:,.1f} h"


def size(nbytes: float) -> str:
    """Return a number of bytes in powers of a thousand.

    >>> size(999), size(24_561), size(4_815_814)
    ('999 B', '24.6 kB', '4.8 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


def clipped(text: str, most: int = 80) -> str:
    """Return a text's first characters, with a sign where some are left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


def reason(differs: str) -> str:
    """Return what a reason of results/run.json means.

    >>> reason("layer and pooling")
    'The cache had this sequence with another layer and pooling.'
    """
    return _REASONS.get(differs, f"The cache had this sequence with another {differs}.")


def by_class(counts: Mapping[str, int]) -> str:
    """Return how many entries are of which device class.

    >>> by_class({"cuda/sm_90": 4, "unattested": 1})
    '4 of cuda/sm_90, 1 of unattested'
    """
    said = [f"{number} of {name[:_LONGEST]}" for name, number in counts.items()]
    return ", ".join(said[:_FEW]) + (f", and {len(said) - _FEW} classes more" if len(said) > _FEW else "")


def recipe(described: Mapping[str, Any]) -> str:
    """Return a recipe as a line of a table: what `proteus_pipeline.embeddings.recipe.Recipe.described` says."""
    parts = [f"layer {described.get('layer', '?')}", *(str(described.get(k, "?")) for k in _IN_A_LINE)]
    return ", ".join([*parts, f"stored as {described.get('stored', '?')}"])


_IN_A_LINE: Sequence[str] = ("pooling", "precision", "numerics")
