"""Any text is an embedding or the rules' own error. 100,000 of them by make torture."""

from __future__ import annotations

import itertools
import os
from random import Random

import numpy as np
import pytest
from conftest import make_checkpoint

from proteus_pipeline.errors import SequenceError
from proteus_pipeline.models.encoder import Outputs, make_encoder
from proteus_pipeline.sequences.rules import ALPHABET, Rules, normalise

COUNT = 100_000 if os.environ.get("PROTEUS_TORTURE") == "1" else 1000
ANY = [chr(n) for n in range(256)]
RULES = [
    Rules(unknown=unknown, stops=stops, gaps=gaps, long=long, max_length=length)
    for unknown, stops, gaps, (long, length) in itertools.product(
        ("error", "x"), ("strip", "error"), ("error", "remove"), (("error", 1022), ("truncate", 300), ("window", 200))
    )
]


def text(random: Random) -> str:
    """A random text of 0 to 5,000 characters: of all bytes, of letters with some noise, or of letters alone."""
    length = int(5001 ** random.random()) - 1
    kind = random.random()
    if kind < 0.3:
        return "".join(random.choices(ANY, k=length))
    letters = random.choices(ALPHABET + ALPHABET.lower(), k=length)
    if kind < 0.6:
        for _ in range(random.randint(0, 3)):
            letters.insert(random.randint(0, length), random.choice("*-.J jX \n\0é"))
    return "".join(letters)


@pytest.mark.torture
def test_any_text_is_an_embedding_or_the_rules_error():
    random = Random(0)
    encoder = make_encoder(make_checkpoint(layers=1, width=16, heads=1))
    embedded, said = 0, []
    for _ in range(COUNT // 100):
        read = []
        for _ in range(100):
            rules = random.choice(RULES)
            try:
                read.append(normalise(text(random), rules, "it"))
            except SequenceError as error:
                said.append(str(error))
        outputs = Outputs(layers=(0, 1), received=(1,))
        done = dict(encoder.compute(read, outputs, random.randint(10, 9000)))
        assert done.keys() == set(range(len(read)))
        for index, encoded in done.items():
            for layer in (0, 1):
                assert encoded.hidden[layer].shape == (len(read[index]) + 2, 16)
                assert np.isfinite(encoded.hidden[layer]).all()
            assert abs(encoded.received[1].sum() - 1) < 1.1
            embedded += 1
    assert embedded + len(said) == COUNT
    assert min(embedded, len(said)) > COUNT / 5
    assert [line for line in said if "\n" in line or "it" not in line] == []
