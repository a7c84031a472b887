"""A transformer block of ESM-2 over packed rows, a tile at a time, and the precision that it computes in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from proteus_pipeline.models.attention import Heads
from proteus_pipeline.models.checkpoint import FilesInUse
from proteus_pipeline.models.device import has_bf16, matmul_rate
from proteus_pipeline.models.products import Bf16Product, Fp32Product, PackedBf16Product, Product, can_pack, joined
from proteus_pipeline.models.shapes import shapes_of
from proteus_pipeline.models.workers import Steps

if TYPE_CHECKING:
    import torch

    from proteus_pipeline.models.architecture import Architecture
    from proteus_pipeline.models.checkpoint import Tensors


@dataclass
class Batch:
    """One batch on its way through the blocks.

    Attributes
    ----------
    lengths, rows
        Tokens of each sequence, and where they lie.
    tiles
        The rows that are computed at a time.
    x
        (T, D), the residual.
    qkv
        (T, 3 D) and some more rows: what attention takes; what it gives lies where the queries were.
    angles
        (T, head_width / 2) complex rotations, by the bytes of the frequencies that a block has.
    kept
        (T, D) fp32 hidden states by layer, of those that are wanted.
    contacts
        (L, L) logits so far, by sequence.
    received
        (L,) attention received, by layer and sequence.

    """

    lengths: list[int]
    rows: list[slice]
    tiles: list[slice]
    x: torch.Tensor
    qkv: torch.Tensor
    angles: dict[bytes, torch.Tensor]
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    contacts: dict[int, torch.Tensor] = field(default_factory=dict)
    received: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def let_go(self) -> None:
        """Free what only blocks need."""
        self.qkv = self.qkv.new_empty((0, self.qkv.shape[1]))
        self.angles.clear()

    @property
    def context(self) -> torch.Tensor:
        """(T, D) and some more rows: what attention gives."""
        return self.qkv[:, : self.x.shape[1]]


@dataclass(frozen=True)
class Norm:
    """A layer norm over (T, D) rows."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.weight.nbytes + self.bias.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` normalised."""
        import torch

        return torch.nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class Arithmetic:
    """What a precision means on a device: of which dtype numbers are, and by what they are multiplied.

    Attributes
    ----------
    between
        The dtype of what passes from one operation to the next.
    heads
        An architecture's heads, in the dtype that attention is computed in.
    tiles
        How many rows tiles have, the fewest first: in strict numerics a sequence lies in those that its own length asks for.
    in_use
        Files whose weights are multiplied with as they lie.

    """

    def __init__(self, architecture: Architecture, precision: str, device: str) -> None:
        import torch

        self.architecture = architecture
        self.device = device
        self.in_use = FilesInUse()
        self._precision = precision
        self._on_cpu = device == "cpu"
        self._native = not self._on_cpu or has_bf16()
        # Rounding what attention starts from and gives costs the real 8M weights a cosine of 0.998 in the worst residue, and is
        # a third of the products; with the feed-forward's alone in bf16, of finer weights and sums, 99.9% have 0.9999.
        self.between = torch.bfloat16 if precision == "bf16" else torch.float32
        shapes = shapes_of(device)
        # Weights of bf16 are laid out for one number of rows.
        self.tiles = shapes.tiles if precision == "fp32" else (shapes.packed,)
        self._columns = shapes.columns
        halves = {"fp32": torch.float32, "mixed": torch.float16, "bf16": torch.bfloat16}
        attends = halves[precision] if not self._on_cpu else self.between if self._native else torch.float32
        self.heads = Heads(architecture.heads, architecture.head_width, attends, shapes.key_multiple)

    def norm(self, tensors: Mapping[str, torch.Tensor], name: str) -> Norm:
        """Return a layer norm by its name."""
        import torch

        # Copies, here and of what is joined: a mapped file's pages can be let go, and tensors begin at an aligned address.
        weight, bias = (
            tensors[f"{name}.{part}"].to(self.device, torch.float32, copy=True) for part in ("weight", "bias")
        )
        return Norm(weight, bias, float(self.architecture.layer_norm_eps))

    def dense(self, tensors: Tensors, name: str, *, exact: bool = False, gelu: bool = False) -> Product:
        """Return the product with the weight and bias of that name, as `product` does: with the weight where it lies, if it may."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        if self._on_cpu and self._is_fp32(exact=exact):
            lying = tensors.in_place(weight, self.in_use)
            if lying is not None:
                return Fp32Product(lying, tensors[bias].float(), gelu=gelu, columns=self._columns)
        return self.product([tensors[weight]], [tensors[bias]], exact=exact, gelu=gelu)

    def product(
        self, weight: Iterable[torch.Tensor], bias: Iterable[torch.Tensor], *, exact: bool = False, gelu: bool = False
    ) -> Product:
        """Return the product with a weight and a bias, in this precision, or in fp32 where `exact` can be had.

        The weight is (..., in) pieces, and the bias as many of its own, which lie one below the other.
        """
        import torch

        offset = torch.cat([t.to(self.device, torch.float32).reshape(-1) for t in bias])
        whole = joined((t.to(self.device, torch.float32) for t in weight), len(offset))
        if self._is_fp32(exact=exact):
            return Fp32Product(whole, offset, gelu=gelu, columns=self._columns)
        finer = self._precision == "mixed" and self._on_cpu
        weights = 2 if finer and gelu else 1
        if self._on_cpu and self._native and can_pack():
            sums = 2 if finer and not gelu else 1
            return PackedBf16Product(whole, offset, self.tiles[-1], gelu=gelu, weights=weights, sums=sums)
        return Bf16Product(whole, offset, native=self._native, gelu=gelu, weights=weights)

    def _is_fp32(self, *, exact: bool) -> bool:
        return self._precision == "fp32" or (exact and self._precision == "mixed" and self._on_cpu)

    def peak(self) -> float:
        """Return the rate of one large matrix product here and now, in this precision, FLOP/s."""
        import torch

        half = self._precision != "fp32" and self._native
        return matmul_rate(self.device, torch.bfloat16 if half else torch.float32)


class Block:
    """One transformer block: what comes before its attention, and what comes after, for a tile of rows."""

    def __init__(self, arithmetic: Arithmetic, tensors: Tensors) -> None:
        self._arithmetic = arithmetic
        a = arithmetic.architecture
        self._norm1 = arithmetic.norm(tensors, "attention.LayerNorm")
        self._norm2 = arithmetic.norm(tensors, "LayerNorm")

        def projections(part: str) -> Iterator[torch.Tensor]:
            # A head's row i and row i + head_width / 2 are rotated together: one becomes the real part, the other the imaginary.
            for name in ("query", "key"):
                rows = tensors[f"attention.self.{name}.{part}"]
                yield rows.view(a.heads, 2, a.head_width // 2, *rows.shape[1:]).transpose(1, 2)
            yield tensors[f"attention.self.value.{part}"]

        self._qkv = arithmetic.product(projections("weight"), projections("bias"), exact=True)
        self._out = arithmetic.dense(tensors, "attention.output.dense", exact=True)
        self._up = arithmetic.dense(tensors, "intermediate.dense", gelu=True)
        self._down = arithmetic.dense(tensors, "output.dense")
        self.frequencies = tensors["attention.self.rotary_embeddings.inv_freq"].float().cpu().numpy().tobytes()

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        parts = (self._norm1, self._norm2, self._qkv, self._out, self._up, self._down)
        return sum(part.nbytes for part in parts)

    def project(self, batch: Batch, rows: slice) -> Steps:
        """Write a tile's queries and keys, rotated, and its values."""
        normed: list[torch.Tensor] = []
        yield [lambda: normed.append(self._norm1(batch.x[rows].float()))]
        yield self._qkv.parts(normed[0], batch.qkv[rows])
        yield [partial(self._rotate, batch, rows)]

    def finish(self, batch: Batch, rows: slice) -> Steps:
        """Add a tile's attention to its residual, and then what the feed-forward makes of it."""
        x = batch.x[rows]
        normed: list[torch.Tensor] = []
        wide: list[torch.Tensor] = []
        yield self._out.parts_added(x, batch.context[rows])
        yield [lambda: normed.append(self._norm2(x.float()))]
        yield self._up.parts_made(normed[0], wide)
        yield self._down.parts_added(x, wide[0])

    def _rotate(self, batch: Batch, rows: slice) -> None:
        import torch

        width = self._arithmetic.architecture.width
        qkv = batch.qkv[rows]
        rotated = qkv[:, : 2 * width].float()  # in fp32, qkv itself
        angles = batch.angles[self.frequencies][rows]
        pairs = torch.view_as_complex(rotated.view(len(rotated), -1, angles.shape[1], 2))
        pairs *= angles.unsqueeze(1)  # the same for each head; as fast as a table of whole rows, which would be large
        if rotated.dtype != qkv.dtype:
            qkv[:, : 2 * width] = rotated
