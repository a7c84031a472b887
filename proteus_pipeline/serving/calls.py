"""What a call takes of memory beside the weights: known before it begins, from its sequences' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_pipeline.models.encoder import activation_bytes
from proteus_pipeline.models.shapes import GPU_TILE
from proteus_pipeline.models.workers import thread_count

if TYPE_CHECKING:
    from proteus_pipeline.models.architecture import Architecture


@dataclass(frozen=True)
class Call:
    """What is about to be computed.

    Attributes
    ----------
    lengths
        Residues of each sequence.
    attention
        Whether attention is looked at: for contacts, or to pool by it.

    """

    lengths: tuple[int, ...]
    attention: bool = False

    @classmethod
    def usual(cls, tokens: int, device: str) -> Call:
        """Return a call of whole batches on all threads, with the one more that waits to be taken."""
        return cls((max(_in_a_batch(tokens, device) - 2, 1),) * (_threads(device) + 1))

    def nbytes(self, architecture: Architecture, tokens: int, device: str) -> int:
        """Return about how many bytes it takes, in batches of so many tokens."""
        return activation_bytes(
            architecture,
            self.lengths,
            tokens=_in_a_batch(tokens, device),
            threads=_threads(device),
            attention=self.attention,
        )

    def __str__(self) -> str:
        """Say what it is, for an error."""
        one = len(self.lengths) == 1
        return f"{len(self.lengths)} sequence{'' if one else 's'} of at most {max(self.lengths, default=0)} residues"


def _in_a_batch(tokens: int, device: str) -> int:
    # A GPU's tile is filled up, in strict, whatever a batch has.
    return tokens if device == "cpu" else max(tokens, GPU_TILE)


def _threads(device: str) -> int:
    return thread_count() if device == "cpu" else 1
