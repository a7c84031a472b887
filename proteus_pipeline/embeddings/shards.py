"""How work is divided: among the workers of a cluster, or the tasks of a job array. Nothing but sequences enters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proteus_pipeline.embeddings.computing import spans_of, tokens_of
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.errors import ConfigError

_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


def shards(missing: Mapping[str, str], recipe: Recipe, tokens: int) -> list[dict[str, str]]:
    """Divide sequences, by key, into shards of at most so many tokens each; one that is longer is a shard of its own.

    In the order of the keys, which are digests: each shard has long and short ones, and which shards there are follows from
    the keys alone, in whatever order they come.
    """
    divided: list[dict[str, str]] = []
    room = 0
    for key in sorted(missing):
        takes = tokens_of(spans_of(missing[key], recipe))
        if not divided or takes > room:
            divided.append({})
            room = tokens
        divided[-1][key] = missing[key]
        room -= takes
    return divided


@dataclass(frozen=True)
class Part:
    """One of several equal parts of a file, for the tasks of a job array.

    Attributes
    ----------
    number, of
        Which, counted from 1, and how many there are.

    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return what ``i/n`` means.

        >>> Part.parse("2/8")
        Part(number=2, of=8)

        Raises
        ------
        ConfigError
            When it is none.

        """
        found = _PART.fullmatch(text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--shard {text!r} is no part", "write i/n, as 1/8 to 8/8 for eight tasks")
        return cls(int(found[1]), int(found[2]))

    def take(self, sequences: Iterable[str]) -> set[str]:
        """Return this part's sequences: each distinct one is in one part, whatever order they come in.

        They are dealt like cards, the longest first, so that no part has more residues than another by more than the
        longest sequence.
        """
        ordered = sorted(set(sequences), key=lambda s: (-len(s), s))
        return set(ordered[self.number - 1 :: self.of])
