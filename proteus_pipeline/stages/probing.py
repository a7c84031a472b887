"""What embeddings know about the labels: a linear probe with cross-validation.

Beside the probe stands the same model on the sequences' amino-acid composition, in the same folds: what the embeddings
add is the difference, ``gain``.

A sequence never sits on both sides of a fold: records of one sequence, or of one given group, are one *unit*, and folds
are made of whole units. Records of one sequence are kept, not merged, so that each gets its prediction. They are taken
in the order of their sequences' digests, so that neither the records' order nor their names matter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from proteus_pipeline.errors import ConfigError, ModelError, SequenceError
from proteus_pipeline.identity import digests
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.sequences.labels import Label, infer_task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Features = NDArray[np.floating[Any]]
    Whole = NDArray[np.int64]

TASKS = ("auto", "classification", "regression")
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
MAX_SEED = 2**32 - 1
FINITE = "embed with embedding.precision=fp32"
# Numbers from which BLAS gets its threads. 100 vectors of 320 took 4.3 s with one thread in place of 9, on two busy cores.
_WORTH_THREADS = 1 << 22
MIN_REGRESSION_UNITS = 4  # two folds of two


@dataclass(frozen=True)
class ProbeSettings:
    """How to probe: the config's ``probe`` section.

    Attributes
    ----------
    task
        ``classification``, ``regression``, or ``auto``: what the labels look like.
    folds
        How many folds, at least 2; fewer are made where the labels are few.
    seed
        Which of the possible foldings is taken.
    regularisation_c
        The inverse strength of the classifier's L2 penalty. Regression chooses its own inside each fold.

    Raises
    ------
    ConfigError
        For a value that can't be used, naming its key.

    """

    task: str = "auto"
    folds: int = 5
    seed: int = 0
    regularisation_c: float = 1.0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"probe.task is {self.task!r}", f"use one of {', '.join(TASKS)}")
        if type(self.folds) is not int or self.folds < 2:
            raise ConfigError(f"probe.folds is {self.folds!r}", "use a whole number from 2 up")
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"probe.seed is {self.seed!r}", f"use a whole number from 0 to {MAX_SEED}")
        c = self.regularisation_c
        if type(c) not in {int, float} or not 0 < c < math.inf:
            raise ConfigError(f"probe.regularisation_c is {c!r}", "use a number above 0, such as 1.0")


@dataclass(frozen=True)
class Prediction:
    """What a probe that never saw a sequence said about it; `fold` counts from 0."""

    id: str
    actual: str
    predicted: str
    fold: int


@dataclass(frozen=True)
class ProbeResult:
    """A probe's metrics, ready for JSON, and its held-out predictions in the order of the sequences' digests."""

    metrics: dict[str, object]
    predictions: tuple[Prediction, ...]


class _Record(NamedTuple):
    """A labelled record; its fields are in the order it is sorted by. `row` is its place in the caller's arrays."""

    digest: str
    target: str
    id: str
    row: int
    sequence: str


Records = Sequence[_Record]


def probe(
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    sequences: Sequence[str],
    targets: Mapping[str, str],
    groups: Mapping[str, str],
    settings: ProbeSettings,
) -> ProbeResult:
    """Fit and score a linear probe on pooled embeddings; records without a target are left aside.

    Parameters
    ----------
    ids, vectors, sequences
        The records: their ids, their (N, D) embeddings, and their normalised sequences.
    targets
        Each labelled id's label, as text.
    groups
        Each grouped id's group; ids without one stand alone.

    Returns
    -------
    ProbeResult
        ``metrics["status"]`` is ``ok``, ``no labels`` or ``too few labels``; with ``ok`` there are ``task``,
        ``labelled``, ``folds``, ``gain``, and ``embedding`` and ``composition``, each with the task's scores over all
        held-out predictions: accuracy, its standard deviation over folds, balanced accuracy, macro F1, log loss and
        MCC; or R2, Spearman's rank correlation, MAE and RMSE, the last two in the labels' unit. Classification also
        gives ``classes`` (members of each), ``left_out`` (classes whose members are all one unit, and so can't be in
        both sides of a fold) and ``majority`` (the share of the largest class).

    Raises
    ------
    SequenceError
        When regression is asked for and a label is no finite number.
    ModelError
        When a labelled embedding is not finite.

    """
    import numpy as np

    records = sorted(
        _Record(digests.of_sequence(sequence), targets[name], name, row, sequence)
        for row, (name, sequence) in enumerate(zip(ids, sequences, strict=True))
        if name in targets
    )
    if not records:
        return ProbeResult({"status": "no labels"}, ())
    features = np.asarray(vectors)[[record.row for record in records]].astype(np.float64)
    for record, row in zip(records, features, strict=True):
        if not np.isfinite(row).all():
            raise ModelError(f"the embedding of {shown(record.id)} is not finite", FINITE)
    units = _units(records, groups)
    labels = (Label(record.id, record.target) for record in records)
    task = infer_task(labels) if settings.task == "auto" else settings.task
    with _as_few_threads_as_are_worth_it(features):
        return (_regression if task == "regression" else _classification)(records, features, units, settings)


def _as_few_threads_as_are_worth_it(features: Features) -> AbstractContextManager[object]:
    """Have BLAS use one thread where products are small: several wait for each other longer than they compute."""
    import sklearn.linear_model  # noqa: F401 - SciPy has a BLAS of its own, which must be there to be told
    from threadpoolctl import threadpool_limits

    return nullcontext() if features.size > _WORTH_THREADS else threadpool_limits(1, "blas")


def _units(records: Records, groups: Mapping[str, str]) -> Whole:
    """Return each record's unit: records that share a sequence or a group, even through a third, share a unit."""
    import numpy as np

    parent = list(range(len(records)))
    first: dict[tuple[str, str], int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, record in enumerate(records):
        group = groups.get(record.id)
        for key in [("sequence", record.digest)] + ([("group", group)] if group else []):
            one, other = sorted((root(i), root(first.setdefault(key, i))))
            parent[other] = one
    # The root is the unit's first record, so that units are numbered in the records' order, whatever groups are called.
    return np.unique([root(i) for i in range(len(parent))], return_inverse=True)[1].astype(np.int64)


def _classification(records: Records, features: Features, units: Whole, settings: ProbeSettings) -> ProbeResult:
    import numpy as np

    members = Counter(record.target for record in records)
    spread = {target: set[int]() for target in sorted(members)}
    for record, unit in zip(records, units.tolist(), strict=True):
        spread[record.target].add(unit)
    classes = [target for target, found in spread.items() if len(found) >= 2]
    code_of = {target: code for code, target in enumerate(classes)}
    metrics: dict[str, object] = {
        "status": "ok" if len(classes) >= 2 else "too few labels",
        "task": "classification",
        "labelled": len(records),
        "classes": {target: members[target] for target in classes},
        "left_out": [target for target in spread if target not in code_of],
    }
    if len(classes) < 2:
        return ProbeResult(metrics, ())
    chosen = [i for i, record in enumerate(records) if record.target in code_of]
    records, features, units = [records[i] for i in chosen], features[chosen], units[chosen]
    codes = np.asarray([code_of[record.target] for record in records], np.int64)
    number = min(settings.folds, *(len(spread[target]) for target in classes))
    folds = _stratified_folds(codes, units, number, settings.seed)
    embedding = _class_probabilities(features, codes, folds, settings.regularisation_c)
    composition = _class_probabilities(_composition(records), codes, folds, settings.regularisation_c)
    scores, baseline = _class_scores(codes, embedding, folds), _class_scores(codes, composition, folds)
    metrics |= {
        "folds": number,
        "majority": _rounded(np.bincount(codes).max() / len(codes)),
        "embedding": scores,
        "composition": baseline,
        "gain": _rounded(scores["accuracy"] - baseline["accuracy"]),
    }
    return ProbeResult(metrics, _predictions(records, [classes[code] for code in embedding.argmax(axis=1)], folds))


def _stratified_folds(codes: Whole, units: Whole, number: int, seed: int) -> Whole:
    """Return each record's fold, classes spread evenly and units whole."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    alone = len(np.unique(units)) == len(units)
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(number, shuffle=True, random_state=seed)
    folds = np.zeros(len(codes), np.int64)
    for fold, (_, test) in enumerate(splitter.split(codes, codes, None if alone else units)):
        folds[test] = fold
    return folds


def _class_probabilities(features: Features, codes: Whole, folds: Whole, c: float) -> Features:
    """Return the held-out probabilities, (N, classes)."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probabilities = np.zeros((len(codes), int(codes.max()) + 1))
    for fold in np.unique(folds):
        test = folds == fold
        seen = np.unique(codes[~test])
        if len(seen) == 1:  # large groups can leave one class to learn from
            probabilities[test, seen[0]] = 1.0
            continue
        # The solver's own tolerance, 1e-4, would leave the log loss at the mercy of the machine's rounding.
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-6, max_iter=5000))
        model.fit(features[~test], codes[~test])
        probabilities[np.ix_(test, seen)] = model.predict_proba(features[test])
    return probabilities


def _class_scores(codes: Whole, probabilities: Features, folds: Whole) -> dict[str, float]:
    import numpy as np
    from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, matthews_corrcoef

    predicted = probabilities.argmax(axis=1)
    right = predicted == codes
    return {
        "accuracy": _rounded(right.mean()),
        "accuracy_std": _rounded(np.std([right[folds == fold].mean() for fold in np.unique(folds)])),
        "balanced_accuracy": _rounded(balanced_accuracy_score(codes, predicted)),
        "macro_f1": _rounded(f1_score(codes, predicted, average="macro", zero_division=0.0)),
        "log_loss": _rounded(log_loss(codes, probabilities, labels=np.arange(probabilities.shape[1])), 4),
        "mcc": _rounded(matthews_corrcoef(codes, predicted)),
    }


def _regression(records: Records, features: Features, units: Whole, settings: ProbeSettings) -> ProbeResult:
    import numpy as np
    from sklearn.model_selection import KFold

    actual = _numbers(records)
    count = int(units.max()) + 1
    metrics: dict[str, object] = {"status": "ok", "task": "regression", "labelled": len(records)}
    if count < MIN_REGRESSION_UNITS or np.ptp(actual) == 0:
        return ProbeResult(metrics | {"status": "too few labels"}, ())
    number = min(settings.folds, count // 2)
    # Whole units are folded here: scikit-learn's GroupKFold orders equal groups by an unstable sort, which differs
    # between CPUs.
    fold_of_unit = np.zeros(count, np.int64)
    for fold, (_, test) in enumerate(KFold(number, shuffle=True, random_state=settings.seed).split(fold_of_unit)):
        fold_of_unit[test] = fold
    folds = fold_of_unit[units]
    predicted, composition = (_values(x, actual, folds) for x in (features, _composition(records)))
    scores, baseline = _value_scores(actual, predicted), _value_scores(actual, composition)
    metrics |= {"folds": number, "embedding": scores, "composition": baseline}
    metrics["gain"] = _rounded(scores["r2"] - baseline["r2"])
    return ProbeResult(metrics, _predictions(records, [str(_significant(value)) for value in predicted], folds))


def _numbers(records: Records) -> Features:
    """Return the targets as numbers; the first in the caller's order that is none is the one that is named."""
    import numpy as np

    numbers = np.empty(len(records))
    for i, record in sorted(enumerate(records), key=lambda item: item[1].row):
        try:
            numbers[i] = math.nan if "_" in record.target else float(record.target)
        except ValueError:
            numbers[i] = math.nan
        if not math.isfinite(numbers[i]):
            raise SequenceError(
                f"the label of {shown(record.id)} is {shown(record.target)}, which is no finite number",
                "give every labelled sequence a number, or set probe.task=classification",
            )
    return numbers


def _values(features: Features, actual: Features, folds: Whole) -> Features:
    """Return the held-out predictions, (N,)."""
    import numpy as np
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted = np.zeros(len(actual))
    for fold in np.unique(folds):
        test = folds == fold
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 6, 19))).fit(features[~test], actual[~test])
        predicted[test] = model.predict(features[test])
    return predicted


def _value_scores(actual: Features, predicted: Features) -> dict[str, float]:
    import numpy as np

    error = predicted - actual
    # Where all predictions are one the correlation is undefined: they order nothing, and NaN is no JSON.
    spearman = np.corrcoef(_ranks(actual), _ranks(predicted))[0, 1] if np.ptp(predicted) else 0.0
    return {
        "r2": _rounded(1.0 - (error**2).sum() / ((actual - actual.mean()) ** 2).sum()),
        "spearman": _rounded(spearman),
        "mae": _significant(np.abs(error).mean()),
        "rmse": _significant(np.sqrt((error**2).mean())),
    }


def _ranks(values: Features) -> Features:
    """Return each value's rank, equal values sharing their mean one."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def _composition(records: Records) -> Features:
    """Return the fraction of each of the 20 amino acids in each sequence, (N, 20)."""
    import numpy as np

    texts = [record.sequence for record in records]
    return np.asarray([[text.count(residue) / max(len(text), 1) for residue in RESIDUES] for text in texts])


def _predictions(records: Records, predicted: Sequence[str], folds: Whole) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(record.id, record.target, answer, fold)
        for record, answer, fold in zip(records, predicted, folds.tolist(), strict=True)
    )


def _rounded(value: float, digits: int = 6) -> float:
    return round(float(value), digits) + 0.0


def _significant(value: float) -> float:
    return float(f"{value:.6g}")  # in the labels' unit, which may be small
