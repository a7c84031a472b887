"""Matrix products, in the three precisions.

A product's bits are those of its shape: in strict numerics, a row's product is always taken over a tile of the same number of
rows, and over the same parts of the columns.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from proteus_pipeline.models.workers import with_one_thread

if TYPE_CHECKING:
    import torch

_ROOT = 0.5**0.5  # of x / sqrt(2), GELU's erf is taken
_ALIGNED = 16  # columns of fp32: 64 bytes

Part = Callable[[], object]
"""Some of a product's work. Parts don't wait for each other, and who does which is no matter."""


class Product(ABC):
    """``x @ weight.T + bias``, and GELU of it where that was asked for.

    Attributes
    ----------
    nbytes
        What it holds in memory.

    """

    nbytes: int

    @abstractmethod
    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the product of (T, in) `x`, (T, out): in `out`, if one is given."""

    @abstractmethod
    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product of (T, in) `x` to (T, out) `residual`."""

    def parts(self, x: torch.Tensor, out: torch.Tensor) -> Sequence[Part]:
        """Return what writes the product to `out`: all of it at once, where a product has no parts."""
        return [partial(self, x, out)]

    def parts_added(self, residual: torch.Tensor, x: torch.Tensor) -> Sequence[Part]:
        """Return what adds the product to `residual`."""
        return [partial(self.add_to, residual, x)]

    def parts_made(self, x: torch.Tensor, made: list[torch.Tensor]) -> Sequence[Part]:
        """Return what writes the product to memory of its own, which is in `made` when all parts are done."""
        return [lambda: made.append(self(x))]


class Fp32Product(Product):
    """In fp32, by torch.mm.

    Not by oneDNN, which takes 0.95 of an encoder's time with packed weights (8M, AMD EPYC with AVX-512): it sums all inputs
    in one go, and the encoder would be twice as far from float64 as fair-esm is.

    Parameters
    ----------
    weight
        (out, in) fp32; on a CPU it is used where it lies: to turn it round would take as long as all else of a load, and BLAS
        lays a part out for its kernel in any case.
    bias
        (out,) fp32; copied.
    gelu
        Whether GELU is taken of the result.
    columns
        How many a thread takes in one go; 0 for all.

    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, gelu: bool, columns: int = 0) -> None:
        on_gpu = bias.is_cuda
        # torch's GELU of a CPU has a coarser erf; its own passes are fewer with the root in the product.
        self._erf, self._gelu = gelu and not on_gpu, gelu and on_gpu
        self._weight = turned(weight).t() if on_gpu else weight
        self._bias = bias * _ROOT if self._erf else bias.clone()
        self._columns = _in_parts(len(bias), columns or len(bias))
        self.nbytes = self._weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        out = self._room(x) if out is None else out
        for part in self.parts(x, out):
            part()
        return out

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        for part in self.parts_added(residual, x):
            part()

    def parts(self, x: torch.Tensor, out: torch.Tensor) -> Sequence[Part]:
        """Return what writes the product to `out`, some columns each: always the same ones."""
        return [partial(self._write, x, out, columns) for columns in self._columns]

    def parts_added(self, residual: torch.Tensor, x: torch.Tensor) -> Sequence[Part]:
        return [partial(self._add, residual, x, columns) for columns in self._columns]

    def parts_made(self, x: torch.Tensor, made: list[torch.Tensor]) -> Sequence[Part]:
        made.append(self._room(x))
        return self.parts(x, made[-1])

    def _room(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((x.shape[0], len(self._bias)))

    def _write(self, x: torch.Tensor, out: torch.Tensor, columns: slice) -> None:
        import torch

        # Biases are added in a pass of their own, where torch would first spread them over the output in one.
        product, weight = out[:, columns], self._weight[columns].t()
        if self._erf:
            product.addmm_(x, weight, beta=0, alpha=_ROOT).add_(self._bias[columns])
            product.addcmul_(product, torch.erf(product)).mul_(_ROOT)
            return
        torch.mm(x, weight, out=product).add_(self._bias[columns])
        if self._gelu:
            product.copy_(torch.nn.functional.gelu(product))

    def _add(self, residual: torch.Tensor, x: torch.Tensor, columns: slice) -> None:
        residual[:, columns].addmm_(x, self._weight[columns].t()).add_(self._bias[columns])


class PackedBf16Product(Product):
    """Of bf16 numbers on a CPU that multiplies them: by oneDNN, with the weight laid out for its kernel once.

    Bias and GELU are taken of the fp32 sums, in the same pass; then they are rounded to bf16: the kernel gives nothing else.
    torch has these operations for what its compiler writes.

    Parameters
    ----------
    weight, bias
        (out, in) and (out,), fp32; both are copied.
    rows
        Of the tiles to come: the layout is chosen for them.
    gelu
        Whether GELU is taken of the result.
    weights
        A weight is the sum of so many bf16 numbers: of two, it has 16 bits.
    sums
        With 2, what is added to a residual is the rounded sum and, by a second product, what rounding left of it.

    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, rows: int, *, gelu: bool, weights: int = 1, sums: int = 1
    ) -> None:
        import torch

        self._bias, self._rows, self._weights, self._sums = bias.clone(), rows, weights, sums
        self._weight = self._pack(torch.cat(_summands(weight, weights), 1))
        self.nbytes = 2 * weights * weight.numel() + bias.nbytes
        self._then: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        # The threads that multiply have one thread each, and a layout may be chosen by how many there are.
        pack = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 - no public name
        packed: torch.Tensor = with_one_thread(partial(pack, weight, self._rows))
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weight": self._weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._weight = self._pack(state["_weight"])

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        product: torch.Tensor = linear(self._taken(x), self._weight, self._bias, *self._then)
        return product if out is None else out.copy_(product)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        import torch

        if self._sums == 1:
            residual.add_(self(x))
            return
        x = self._taken(x)
        linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        rounded = linear(x, self._weight, None, "none", [], "")
        # The subtraction is done with the kernel's fp32 sums.
        left = linear.binary(x, rounded, self._weight, None, "sub")
        residual.add_(rounded).add_(left).add_(self._bias)

    def _taken(self, x: torch.Tensor) -> torch.Tensor:
        """Return (T, in) `x` in bf16, as many times side by side as a weight has numbers."""
        import torch

        x = x.bfloat16()
        return x if self._weights == 1 else torch.cat([x] * self._weights, 1)


class Bf16Product(Product):
    """Of bf16 numbers, by torch.mm: on a GPU, and on any other CPU.

    On a CPU without instructions for it, torch takes tens of times as long as for fp32: there the same rounded numbers are
    multiplied as fp32.

    Parameters
    ----------
    weight, bias
        (out, in) and (out,), fp32; both are copied.
    native
        Whether the device multiplies bf16.
    gelu
        Whether GELU is taken of the result, which then is bf16: the next product would round it in any case.
    weights
        A weight is the sum of so many bf16 numbers, unless the device multiplies them.

    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, native: bool, gelu: bool, weights: int = 1) -> None:
        import torch

        self._native, self._gelu = native, gelu
        if native:
            self._weight = turned(weight.bfloat16())
        else:
            self._weight = turned(torch.stack([t.float() for t in _summands(weight, weights)]).sum(0))
        self._bias = bias.clone()
        self.nbytes = self._weight.nbytes + bias.nbytes
        self._sums = native and weight.is_cuda and _gives_sums(torch)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        product = self._product(x)
        if self._gelu:
            product = torch.nn.functional.gelu(product).bfloat16()
        return product if out is None else out.copy_(product)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x))

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """Return (T, out) fp32 sums."""
        import torch

        x = x.bfloat16()
        if not self._native:
            product = torch.mm(x.float(), self._weight)
        elif self._sums:
            product = torch.mm(x, self._weight, out_dtype=torch.float32)
        else:
            product = torch.mm(x, self._weight).float()  # rounded to bf16 on the way
        return product.add_(self._bias)


def _summands(weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Return so many bf16 tensors whose sum is next to an fp32 one."""
    parts: list[torch.Tensor] = []
    left = weight
    for _ in range(count):
        parts.append(left.bfloat16())
        left = left - parts[-1]
    return parts


def turned(weight: torch.Tensor) -> torch.Tensor:
    """Return the transpose as rows of its own: in one pass, and in memory that is touched once."""
    return weight.new_empty(weight.shape[::-1]).copy_(weight.t())


def joined(pieces: Iterable[torch.Tensor], height: int) -> torch.Tensor:
    """Return a copy of pieces of `height` rows in all, one below the other: in one pass over each, as it comes."""
    whole, first = None, 0
    for piece in pieces:
        if whole is None:
            whole = piece.new_empty((height, piece.shape[-1]))
        rows = piece.numel() // piece.shape[-1]
        whole[first : first + rows].view(piece.shape).copy_(piece)
        first += rows
    if whole is None or first != height:
        raise ValueError(f"{height} outputs have {first} rows of weights")
    return whole


def _in_parts(outputs: int, most: int) -> tuple[slice, ...]:
    """Return columns in parts of at most so many, and of about equal widths."""
    count = -(-outputs // most)
    width = -(-outputs // (count * _ALIGNED)) * _ALIGNED
    return tuple(slice(first, min(first + width, outputs)) for first in range(0, outputs, width))


def can_pack() -> bool:
    """Say whether this CPU's bf16 products are oneDNN's; on Arm, torch hands them to a library that was not measured here."""
    import torch

    return (
        platform.machine().lower() in {"x86_64", "amd64"}
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn._linear_pointwise, "binary")  # noqa: SLF001
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _gives_sums(torch: Any) -> bool:
    """Say whether torch's bf16 product can give its fp32 sums as they are: newer ones can, on a GPU."""
    return "dtype" in torch.ops.aten.mm.overloads()
