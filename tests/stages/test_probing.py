from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError, ModelError, SequenceError
from proteus_pipeline.sequences.fasta import read_fasta
from proteus_pipeline.sequences.labels import labels_from_headers
from proteus_pipeline.stages import probing
from proteus_pipeline.stages.probing import ProbeResult, ProbeSettings, probe

DEMO = Path(__file__).parents[2] / "data" / "demo100.fasta"
SETTINGS = ProbeSettings()


def sequences(count, length=30, seed=0):
    letters = np.random.default_rng(seed).choice(list("ACDEFGHIKLMNPQRSTVWY"), (count, length))
    return ["".join(row) for row in letters]


def scores(result: ProbeResult, which="embedding"):
    found = result.metrics[which]
    assert isinstance(found, dict)
    return found


def labelled(count=60, classes="abc", seed=0):
    """Ids, sequences and targets; the vectors come apart by class along their first axes."""
    rng = np.random.default_rng(seed)
    ids = [f"p{i}" for i in range(count)]
    codes = np.arange(count) % len(classes)
    vectors = rng.normal(size=(count, 8)).astype(np.float32)
    vectors[np.arange(count), codes] += 20
    return ids, vectors, sequences(count, seed=seed), {name: classes[c] for name, c in zip(ids, codes, strict=True)}


def test_separable_classes_are_told_apart_and_composition_is_not():
    result = probe(*labelled(), {}, SETTINGS)
    assert result.metrics["status"] == "ok"
    assert result.metrics["task"] == "classification"
    assert result.metrics["classes"] == {"a": 20, "b": 20, "c": 20}
    assert result.metrics["folds"] == 5
    assert result.metrics["majority"] == pytest.approx(1 / 3, abs=1e-6)
    assert scores(result)["accuracy"] == scores(result)["macro_f1"] == scores(result)["mcc"] == 1.0
    assert scores(result)["log_loss"] < 0.1
    assert scores(result, "composition")["accuracy"] < 0.6
    assert result.metrics["gain"] == pytest.approx(1.0 - scores(result, "composition")["accuracy"])


def test_random_vectors_of_the_demo_proteins_score_near_chance_and_composition_above():
    records = list(read_fasta(DEMO))
    targets = {label.id: label.target for label in labels_from_headers(records, "loc")}
    vectors = np.random.default_rng(1).normal(size=(len(records), 64)).astype(np.float32)
    result = probe([r.id for r in records], vectors, [r.sequence for r in records], targets, {}, SETTINGS)
    assert result.metrics["labelled"] == 100
    assert result.metrics["majority"] == 0.2
    assert scores(result)["accuracy"] < 0.4
    assert scores(result, "composition")["accuracy"] > 0.45
    assert result.metrics["gain"] < 0
    assert len(result.predictions) == 100


@settings(max_examples=8)
@given(st.permutations(range(30)), st.permutations(range(30)), st.booleans())
def test_neither_order_nor_names_matter(order, names, grouped):
    ids, vectors, texts, targets = labelled(30)
    texts[3], vectors[3], targets["p3"] = texts[0], vectors[0], targets["p0"]
    vectors[:, :3] /= 20  # where answers are uncertain, a changed fold shows
    groups = {name: f"g{i // 4}" for i, name in enumerate(ids)} if grouped else {}
    first = probe(ids, vectors, texts, targets, groups, SETTINGS)

    renamed = {name: f"q{names[i]}" for i, name in enumerate(ids)}
    regrouped = {f"g{i}": f"h{names[i]}" for i in range(8)}
    second = probe(
        [renamed[ids[i]] for i in order],
        vectors[order],
        [texts[i] for i in order],
        {renamed[name]: target for name, target in targets.items()},
        {renamed[name]: regrouped[group] for name, group in groups.items()},
        SETTINGS,
    )
    assert second.metrics == first.metrics
    told = {(renamed[one.id], one.actual, one.predicted, one.fold) for one in first.predictions}
    assert {(one.id, one.actual, one.predicted, one.fold) for one in second.predictions} == told


def test_the_same_call_gives_the_same_result_and_the_seed_another_folding():
    data = labelled()
    assert probe(*data, {}, SETTINGS) == probe(*data, {}, SETTINGS)
    folds = [{one.id: one.fold for one in probe(*data, {}, ProbeSettings(seed=s)).predictions} for s in (0, 1)]
    assert folds[0] != folds[1]


@pytest.mark.parametrize(("worth", "least"), [(None, 1), (0, 2)])
def test_small_products_take_one_thread_and_the_others_are_given_back(monkeypatch, worth, least):
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    seen, fit = [], LogisticRegression.fit

    def looked_at(self, *args):
        seen.append(threads())
        return fit(self, *args)

    monkeypatch.setattr(LogisticRegression, "fit", looked_at)
    if worth is not None:
        monkeypatch.setattr(probing, "_WORTH_THREADS", worth)
    with threadpool_limits(2, "blas"):
        probe(*labelled(), {}, SETTINGS)
        assert threads() == {2}
    assert seen and all(one == {least} for one in seen)


def test_unlabelled_records_change_nothing():
    ids, vectors, texts, targets = labelled()
    kept = [i for i, name in enumerate(ids) if name in targets and i < 45]
    few = {ids[i]: targets[ids[i]] for i in kept}
    alone = probe([ids[i] for i in kept], vectors[kept], [texts[i] for i in kept], few, {}, SETTINGS)
    assert probe(ids, vectors, texts, few | {"elsewhere": "a"}, {}, SETTINGS) == alone


@settings(max_examples=10)
@given(st.lists(st.integers(0, 7), min_size=24, max_size=24), st.sampled_from(["classification", "regression"]))
def test_a_group_is_never_split(numbers, task):
    ids, vectors, texts, _ = labelled(24)
    targets = {name: str(i % 2) for i, name in enumerate(ids)}
    groups = {name: f"g{number}" for name, number in zip(ids, numbers, strict=True)}
    result = probe(ids, vectors, texts, targets, groups, ProbeSettings(task=task))
    seen: dict[str, set[int]] = {}
    for one in result.predictions:
        seen.setdefault(groups[one.id], set()).add(one.fold)
    assert all(len(folds) == 1 for folds in seen.values())
    assert bool(result.predictions) == (result.metrics["status"] == "ok")
    assert result.metrics["status"] == "ok" or len(set(numbers)) < 4 or task == "classification"


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_equal_sequences_stay_together_even_through_a_group(task):
    ids, vectors, texts, _ = labelled(40)
    targets = {name: str(i % 2) for i, name in enumerate(ids)}
    for i in range(0, 40, 4):  # 0 and 1 share a sequence, 1 and 2 a group
        texts[i + 1] = texts[i]
    groups = {ids[j]: f"g{i}" for i in range(0, 40, 4) for j in (i + 1, i + 2)}
    result = probe(ids, vectors, texts, targets, groups, ProbeSettings(task=task))
    fold = {one.id: one.fold for one in result.predictions}
    assert len(fold) == 40
    assert all(fold[ids[i]] == fold[ids[i + 1]] == fold[ids[i + 2]] for i in range(0, 40, 4))


def test_memorised_copies_are_no_knowledge():
    """Vectors that only say which sequence it is can't score above chance, however often each sequence is repeated."""
    count, copies = 20, 6
    texts = [text for text in sequences(count) for _ in range(copies)]
    vectors = np.repeat(np.eye(count, dtype=np.float32) * 10, copies, axis=0)
    ids = [f"p{i}" for i in range(len(texts))]
    targets = {name: "ab"[i // copies % 2] for i, name in enumerate(ids)}
    assert scores(probe(ids, vectors, texts, targets, {}, SETTINGS))["accuracy"] <= 0.6


def test_embedding_and_composition_are_scored_in_the_same_folds():
    ids, _, texts, targets = labelled(50, "ab")
    composition = np.asarray([[text.count(x) / len(text) for x in "ACDEFGHIKLMNPQRSTVWY"] for text in texts])
    result = probe(ids, composition, texts, targets, {}, SETTINGS)
    assert scores(result) == scores(result, "composition")
    assert result.metrics["gain"] == 0.0


def test_regression_recovers_a_linear_target():
    ids, vectors, texts, _ = labelled(60)
    weights = np.random.default_rng(3).normal(size=8)
    targets = {name: str(float(value)) for name, value in zip(ids, vectors @ weights, strict=True)}
    result = probe(ids, vectors, texts, targets, {}, SETTINGS)
    assert result.metrics["task"] == "regression"
    assert scores(result)["r2"] > 0.999
    assert scores(result)["spearman"] > 0.99
    assert scores(result)["mae"] <= scores(result)["rmse"]
    assert scores(result, "composition")["r2"] < 0.5
    assert result.metrics["gain"] == pytest.approx(scores(result)["r2"] - scores(result, "composition")["r2"])
    assert {one.actual for one in result.predictions} == set(targets.values())


def test_regression_keeps_the_digits_of_small_units():
    ids, vectors, texts, _ = labelled(30)
    targets = {name: repr(float(value) * 1e-9) for name, value in zip(ids, vectors[:, 0], strict=True)}
    result = probe(ids, vectors, texts, targets, {}, ProbeSettings(task="regression"))
    assert 0 < scores(result)["mae"] < 1e-8
    assert len({one.predicted for one in result.predictions}) == 30


def test_regression_where_nothing_is_known_has_finite_scores():
    ids, _, _, _ = labelled(12)
    targets = {name: str(i) for i, name in enumerate(ids)}
    result = probe(ids, np.zeros((12, 4), np.float32), sequences(12), targets, {}, SETTINGS)
    assert all(math.isfinite(value) for value in scores(result).values())
    assert scores(result)["r2"] < 0


@pytest.mark.parametrize("bad", ["high", "nan", "inf", "1_2"])
def test_regression_names_the_first_label_that_is_no_number(bad):
    ids, vectors, texts, _ = labelled(12)
    targets = {name: str(i) for i, name in enumerate(ids)} | {"p5": bad, "p9": "low"}
    with pytest.raises(SequenceError, match=rf"'p5' is '{bad}'.*probe\.task=classification"):
        probe(ids, vectors, texts, targets, {}, ProbeSettings(task="regression"))
    assert probe(ids, vectors, texts, targets, {}, SETTINGS).metrics["task"] == "classification"


def test_numbers_may_be_classes_when_asked():
    ids, vectors, texts, _ = labelled(48)
    targets = {name: str(i % 12) for i, name in enumerate(ids)}
    assert probe(ids, vectors, texts, targets, {}, SETTINGS).metrics["task"] == "regression"
    forced = probe(ids, vectors, texts, targets, {}, ProbeSettings(task="classification"))
    assert forced.metrics["task"] == "classification"
    assert forced.metrics["folds"] == 4  # the classes' size


def test_without_labels_there_is_a_status_and_no_error():
    ids, vectors, texts, _ = labelled()
    assert probe(ids, vectors, texts, {}, {}, SETTINGS) == ProbeResult({"status": "no labels"}, ())
    assert probe([], np.zeros((0, 8), np.float32), [], {}, {}, SETTINGS).metrics == {"status": "no labels"}


@pytest.mark.parametrize(
    ("targets", "left_out"),
    [
        ({"p0": "a"}, ["a"]),
        ({"p0": "a", "p1": "a", "p2": "a"}, []),
        ({"p0": "a", "p1": "a", "p2": "b"}, ["b"]),
        ({"p0": "a", "p1": "b", "p2": "c"}, ["a", "b", "c"]),
    ],
)
def test_too_few_classes_is_a_status(targets, left_out):
    ids, vectors, texts, _ = labelled()
    result = probe(ids, vectors, texts, targets, {}, SETTINGS)
    assert result.metrics["status"] == "too few labels"
    assert result.metrics["labelled"] == len(targets)
    assert result.metrics["left_out"] == left_out
    assert result.predictions == ()


def test_too_few_numbers_is_a_status():
    ids, vectors, texts, _ = labelled()
    regression = ProbeSettings(task="regression")
    for targets in ({"p0": "1", "p1": "2", "p2": "3"}, dict.fromkeys(ids, "1.5")):
        result = probe(ids, vectors, texts, targets, {}, regression)
        assert result.metrics == {"status": "too few labels", "task": "regression", "labelled": len(targets)}
    enough = probe(ids, vectors, texts, {f"p{i}": str(i) for i in range(4)}, {}, regression)
    assert enough.metrics["status"] == "ok"
    assert enough.metrics["folds"] == 2


def test_a_class_of_one_is_left_out_and_named_and_a_small_one_makes_fewer_folds():
    ids, vectors, texts, targets = labelled(40, "ab")
    targets |= {"p0": "alone", "p1": "rare", "p2": "rare", "p3": "rare"}
    result = probe(ids, vectors, texts, targets, {}, SETTINGS)
    assert result.metrics["left_out"] == ["alone"]
    assert result.metrics["folds"] == 3
    assert "p0" not in {one.id for one in result.predictions}
    assert len(result.predictions) == 39


def test_a_class_that_is_all_one_sequence_is_left_out():
    ids, vectors, texts, targets = labelled(40, "ab")
    targets |= dict.fromkeys(ids[:6], "copies")
    texts[:6] = [texts[0]] * 6
    result = probe(ids, vectors, texts, targets, {}, SETTINGS)
    assert result.metrics["left_out"] == ["copies"]


@pytest.mark.parametrize("seed", range(6))
def test_a_training_side_of_one_class_still_answers(seed):
    ids, vectors, texts, _ = labelled(4)
    targets = dict(zip(ids, "aabb", strict=True))
    groups = dict(zip(ids, "xyzy", strict=True))  # some foldings of these leave only a's, or only b's, to learn from
    result = probe(ids, vectors, texts, targets, groups, ProbeSettings(seed=seed))
    assert result.metrics["status"] == "ok"
    assert sorted(one.id for one in result.predictions) == ids


def test_an_embedding_that_is_not_finite_is_named():
    ids, vectors, texts, targets = labelled()
    vectors[4, 2] = np.nan
    with pytest.raises(ModelError, match="'p4' is not finite"):
        probe(ids, vectors, texts, targets, {}, SETTINGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "clustering"),
        ("folds", 1),
        ("folds", 2.5),
        ("folds", True),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", "0"),
        ("regularisation_c", 0),
        ("regularisation_c", math.nan),
        ("regularisation_c", math.inf),
        ("regularisation_c", "1"),
    ],
)
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(ConfigError, match=rf"probe\.{key} is "):
        ProbeSettings(**{key: value})
