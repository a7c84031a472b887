from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.models.encoder import Outputs, make_encoder
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages.contacts import LEAST, SEPARATION, choose, sparse


def records(lengths):
    return [Record(f"p{i}", "M" + "AC"[i % 2] * (n - 1)) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 60)), st.integers(0, 6), st.integers(1, 50))
def test_few_short_distinct_proteins_are_chosen_in_their_order(lengths, count, longest):
    every = records(lengths)
    chosen = choose(every, count, longest)
    assert len(chosen) <= count
    assert [r for r in every if r in chosen] == chosen
    assert all(SEPARATION < len(r.sequence) <= longest for r in chosen)
    distinct = {r.sequence for r in every if SEPARATION < len(r.sequence) <= longest}
    assert len({r.sequence for r in chosen}) == len(chosen) == min(count, len(distinct))


def test_the_choice_is_spread_over_the_file():
    assert [r.id for r in choose(records(range(10, 110)), 4, 400)] == ["p0", "p25", "p50", "p75"]


def test_pairs_are_the_contact_heads_own(checkpoint, proteins):
    sequence = proteins["P26381"][:80]
    [(_, encoded)] = make_encoder(checkpoint).compute([sequence], Outputs(contacts=True))
    full = encoded.contacts
    assert full is not None
    pairs = sparse(full)
    assert pairs
    kept = {(i, j): percent for i, j, percent in pairs}
    for i in range(1, 81):
        for j in range(1, 81):
            percent = float(full[i - 1, j - 1]) * 100
            if j - i < SEPARATION or percent < LEAST - 0.51:
                assert (i, j) not in kept
            elif percent > LEAST - 0.49:
                assert kept[i, j] == pytest.approx(percent, abs=0.51)


def test_a_short_protein_has_no_pairs():
    assert sparse(np.ones((SEPARATION, SEPARATION), np.float32)) == ()
