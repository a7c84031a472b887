from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.embeddings.computing import spans_of, tokens_of
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.shards import Part, shards
from proteus_pipeline.errors import ConfigError

SEQUENCES = st.lists(st.text("ACDEFG", min_size=1, max_size=60), max_size=40)
RECIPES = st.sampled_from([Recipe(2), Recipe(2, window=20, overlap=5)])


@given(SEQUENCES, RECIPES, st.integers(1, 300), st.randoms(use_true_random=False))
def test_shards_hold_each_key_once_within_bounds_in_whatever_order_they_come(
    sequences: list[str], recipe: Recipe, tokens: int, chance: random.Random
):
    missing = {recipe.key("0" * 32, s): s for s in sequences}
    divided = shards(missing, recipe, tokens)
    assert [key for one in divided for key in one] == sorted(missing)
    assert {key: s for one in divided for key, s in one.items()} == missing
    for one in divided:
        takes = [tokens_of(spans_of(s, recipe)) for s in one.values()]
        assert takes
        assert len(takes) == 1 or sum(takes) <= tokens
    shuffled = list(missing.items())
    chance.shuffle(shuffled)
    assert shards(dict(shuffled), recipe, tokens) == divided


def test_what_fits_is_one_shard():
    assert len(shards({"a": "AAA", "b": "CCC"}, Recipe(2), 10)) == 1
    assert len(shards({"a": "AAA", "b": "CCC"}, Recipe(2), 9)) == 2
    assert shards({}, Recipe(2), 9) == []


@given(SEQUENCES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_parts_are_the_whole_and_equal(sequences: list[str], of: int, chance: random.Random):
    parts = [Part(n, of).take(sequences) for n in range(1, of + 1)]
    assert sum(map(len, parts)) == len(set(sequences))
    assert set().union(*parts) == set(sequences)
    residues = [sum(map(len, part)) for part in parts]
    assert max(residues) - min(residues) <= max(map(len, sequences), default=0)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    chance.shuffle(sequences)
    assert [Part(n, of).take(sequences) for n in range(1, of + 1)] == parts


def test_parts_stay_what_they_are():
    # Golden: tasks of one array may run weeks apart.
    sequences = ["MKV", "MK", "MKVLA", "AC", "MKVL", "WWWWW"]
    assert [sorted(Part(n, 3).take(sequences)) for n in (1, 2, 3)] == [
        ["MKV", "MKVLA"],
        ["AC", "WWWWW"],
        ["MK", "MKVL"],
    ]


@pytest.mark.parametrize(
    "text", ["", "1", "0/4", "5/4", "1/0", "a/b", "1/4/2", "-1/4", "1 /4", "1.0/4", "\u0661/\u0664", "1/4\n", "9" * 99]
)
def test_what_is_no_part_is_refused(text: str):
    with pytest.raises(ConfigError, match="write i/n") as caught:
        Part.parse(text)
    assert "\n" not in str(caught.value)


def test_a_part_is_read():
    assert Part.parse("3/12") == Part(3, 12)
