"""What a model family offers: outputs of some sequences, with the same bits in every company.

A family is a module with an encoder class that keeps to `Encoder`, and a row in `FAMILIES`; everything above this room asks
`make_encoder`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from proteus_pipeline.errors import ConfigError, ModelError
from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.models.attention import PROBABILITY_BYTES
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.device import has_bf16
from proteus_pipeline.models.shapes import LARGEST_CPU_TILES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Part of every embedding key: raised only when an encoder's golden bits change, or may have on a CPU that was not at hand.
ENGINE_REVISION = 7
PRECISIONS = ("fp32", "mixed", "bf16")
NUMERICS = ("strict", "tolerant")
TOKENS_PER_BATCH = 1536  # as fast as 2,048 on a CPU (8M, two threads), and a batch stays smaller
# By the family that an architecture says it is of.
FAMILIES = {"esm2": "proteus_pipeline.models.esm2:Esm2Encoder"}


@dataclass(frozen=True)
class Outputs:
    """What to compute of each sequence, in one pass.

    Attributes
    ----------
    layers
        Layers whose hidden states are wanted: 0 is the scaled token embedding, ``architecture.layers`` the last one, after
        the final norm.
    received
        Layers of which it is wanted how much attention each residue receives, from 1: of the block that ends in that layer.
    logits
        Whether the language-model head's logits are wanted.
    contacts
        Whether the contact head's map is wanted.

    """

    layers: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    logits: bool = False
    contacts: bool = False

    @classmethod
    def to_pool(cls, layer: int, pooling: str) -> Outputs:
        """Return what `proteus_pipeline.models.pooling.pool` needs of a layer; ConfigError where that can't be had."""
        if pooling != "attention":
            return cls(layers=(layer,))
        if layer == 0:
            raise ConfigError("layer 0 is before any attention", "use another layer, or another pooling")
        return cls(layers=(layer,), received=(layer,))


@dataclass(frozen=True)
class Encoded:
    """One sequence of L residues, encoded; all fp32.

    Attributes
    ----------
    hidden
        (L + 2, D) by layer: the start token, the residues, the end token.
    received
        (L,) by layer: the attention that each residue receives from all residues, itself included; the mean over heads and
        over those that pay it.
    logits
        (L + 2, V), or None.
    contacts
        (L, L) probabilities, or None.

    """

    hidden: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    received: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    logits: NDArray[np.float32] | None = None
    contacts: NDArray[np.float32] | None = None


class Encoder(Protocol):
    """Computes outputs of a checkpoint of one family."""

    architecture: Architecture

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in its device's memory between calls."""

    def check_files(self) -> None:
        """Raise IntegrityError where a file was written to that weights are used in place of; `compute` asks after each batch."""

    def compute(
        self, sequences: Sequence[str], outputs: Outputs, token_budget: int = TOKENS_PER_BATCH
    ) -> Generator[tuple[int, Encoded], None, None]:
        """Yield, for each sequence in some order, its index and its outputs; nothing computes any more once it is closed.

        Parameters
        ----------
        sequences
            Normalised sequences, each of at least one residue.
        outputs
            What is wanted.
        token_budget
            Tokens in one pass; decides speed and memory, and in strict numerics no bit.

        Raises
        ------
        ModelError
            For logits or contacts of a checkpoint without that head.
        IntegrityError
            When a file has changed that weights are used in place of.
        ConfigError
            For a layer that the model does not have.
        MemoryError
            When not even one sequence alone has room.

        """

    def encode(
        self, sequences: Sequence[str], layers: Sequence[int], token_budget: int = TOKENS_PER_BATCH
    ) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        """Yield each sequence's index and its (L + 2, D) fp32 hidden states by layer."""

    def flops(self, length: int) -> float:
        """Return the floating-point operations that a sequence of `length` residues takes."""

    def peak(self) -> float:
        """Return the rate of one large matrix product here and now, in this precision, FLOP/s: the ceiling of all work."""


def weight_bytes(architecture: Architecture, precision: str, device: str = "cpu") -> int:
    """Return about how many bytes an encoder of a trunk will hold, before one is made: 4 a weight, or 2 in bf16.

    ``mixed`` counts as fp32: on a CPU a third of its products is, and another takes two numbers of bf16 a weight; and so does bf16 on
    a CPU that has no instructions for it, where the rounded numbers are kept as fp32. Rotary tables of 1,024 positions are counted:
    they are made with the first sequence.
    """
    a, d = architecture, architecture.width
    products = a.layers * (4 * d * d + 2 * d * a.ffn_width)
    rest = a.layers * (8 * d + d + a.ffn_width) + (len(a.tokens) + 2) * d  # biases and norms, embedding, the last norm
    halves = precision == "bf16" and (device != "cpu" or has_bf16())
    return (2 if halves else 4) * products + 4 * rest + 1024 * 4 * a.head_width


def activation_bytes(
    architecture: Architecture, lengths: Sequence[int], *, tokens: int, threads: int, attention: bool = False
) -> int:
    """Return about how many bytes a call takes beside the weights and what it returns.

    Of each token under way: the residual, queries, keys and values, a layer that is kept and its copy: 12 widths of fp32 are
    counted for these 6. Each thread has a batch, one more is done and waits to be taken, and a tile of the
    feed-forward is there three times; and rotary tables may be made for the longest. Measured on widths of 32 to 1,280 and 33
    to 4,000 residues, a call took 0.2 to 1.1 of that, when it held a width of rotations and another copy besides.

    Parameters
    ----------
    architecture
        The model's.
    lengths
        Residues of each sequence.
    tokens
        Of one batch.
    threads
        That compute.
    attention
        Whether probabilities are looked at, for contacts or for pooling by attention: of some heads at once, five times over.

    """
    if not lengths:
        return 0
    longest, total = max(lengths) + 2, sum(lengths) + 2 * len(lengths)
    under_way = min(max(tokens, longest) * (threads + 1), total) + sum(LARGEST_CPU_TILES)
    head = 4 * longest * longest
    maps = 5 * threads * max(head, min(architecture.heads * head, PROBABILITY_BYTES)) if attention else 0
    tiles = 12 * architecture.ffn_width * LARGEST_CPU_TILES[-1] * threads
    tables = 8 * architecture.head_width * longest
    return 48 * architecture.width * under_way + tables + tiles + maps


def check_options(precision: str, numerics: str) -> None:
    """Raise ConfigError for a precision or numerics that is not known."""
    if precision not in PRECISIONS:
        raise ConfigError(f"embedding.precision is {precision!r}", f"use one of {', '.join(PRECISIONS)}")
    if numerics not in NUMERICS:
        raise ConfigError(f"embedding.numerics is {numerics!r}", f"use one of {', '.join(NUMERICS)}")


def make_encoder(
    checkpoint: Checkpoint, *, precision: str = "fp32", numerics: str = "strict", device: str = "cpu"
) -> Encoder:
    """Return the encoder of a checkpoint's family.

    Parameters
    ----------
    checkpoint
        The tensors; they may be memory-mapped.
    precision
        ``fp32``; ``mixed``: bf16 matrix products with fp32 between them, but for what attention starts from and gives:
        fp32 on a CPU, and fp16 in a GPU's attention (on a CPU with AMX, 101 of 112,543 residues of the 8M had a cosine to
        fp32's below 0.9999, the least 0.99976); ``bf16``: all but norms' statistics and rotation in bf16.
    numerics
        ``strict``: bit-identical on one device class whatever the batch, order and thread count; ``tolerant``: the shapes
        of the moment, and results that are apart by rounding.
    device
        ``cpu`` or ``cuda:N``.

    Raises
    ------
    ModelError
        For an architecture that no encoder computes.
    ConfigError
        For an unknown precision or numerics.

    """
    check_options(precision, numerics)
    family = checkpoint.architecture.family
    if family not in FAMILIES:
        raise ModelError(f"no encoder computes the family {family!r}", f"use a model of {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[family].partition(":")
    encoder: Encoder = getattr(import_module(module), name)(
        checkpoint, precision=precision, strict=numerics == "strict", device=device
    )
    return encoder
