"""A model in memory, and the moment at which its memory is back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proteus_pipeline.models.memory import give_back

if TYPE_CHECKING:
    from proteus_pipeline.models.encoder import Encoder


@dataclass(eq=False)
class Resident:
    """A model in memory.

    Attributes
    ----------
    digest
        Of the model.
    encoder
        The loaded model.
    nbytes
        Of its weights, measured.
    seconds
        What its source took to load.
    since
        When it was loaded.
    leases
        How many are computing with it, or said they will.
    promised
        How many of these leases are a ``with`` block of somebody's, who may do anything before it ends.
    lent
        Whether its encoder itself was handed out, so that nobody knows who computes with it.

    """

    digest: str
    encoder: Encoder
    nbytes: int
    seconds: float
    since: float
    leases: int = 0
    promised: int = 0
    lent: bool = False

    def when_freed(self, call: Callable[[], None]) -> None:
        """Have it called once the last who holds the encoder dropped it, and what it held went back to the system."""
        # Its attributes outlive an encoder here: they are freed by the call that says so, and not some time after it.
        weakref.finalize(self.encoder, _free, vars(self.encoder), call).atexit = False


def _free(attributes: dict[str, Any], call: Callable[[], None]) -> None:
    attributes.clear()
    give_back()
    call()
