"""Matrix products, in the three precisions, into buffers that are there already.

A product's bits are those of its shape: in strict numerics, all are taken over tiles of the same number of rows. Biases
are added in a pass of their own, where torch would first spread them over the output in one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Product(Protocol):
    """``x @ weight.T + bias``."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the product of (T, in) `x` to (T, out) `out`, and return it."""

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product of (T, in) `x` to (T, out) `residual`."""


class Fp32Product:
    """In fp32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        # Turned round in memory: BLAS would otherwise do that for every tile, at some hundredths of the time (measured, MKL).
        self._weight, self._bias = weight.t().contiguous(), bias

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.mm(x, self._weight, out=out).add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.addmm_(x, self._weight).add_(self._bias)


class Bf16Product:
    """Of bf16 numbers, summed in fp32.

    On a CPU without instructions for it, torch takes tens of times as long as for fp32: there the same rounded numbers are
    multiplied as fp32.

    Parameters
    ----------
    native
        Whether the device multiplies bf16.

    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, native: bool) -> None:
        import torch

        self._native = native
        rounded = weight.t().contiguous().bfloat16()
        self._weight, self._bias = rounded if native else rounded.float(), bias
        self._sums = native and weight.is_cuda and _gives_sums(torch)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        import torch

        x = x.bfloat16()
        if not self._native and out.dtype == torch.float32:
            return torch.mm(x.float(), self._weight, out=out).add_(self._bias)
        if not self._native:
            product = torch.mm(x.float(), self._weight)
        elif self._sums:
            product = torch.mm(x, self._weight, out_dtype=torch.float32)
        else:
            product = torch.mm(x, self._weight).float()  # rounded to bf16 on the way: a CPU's kernel gives nothing else
        return out.copy_(product.add_(self._bias))

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x, x.new_empty((x.shape[0], self._weight.shape[1]), dtype=residual.dtype)))


def _gives_sums(torch: Any) -> bool:
    """Say whether torch's bf16 product can give its fp32 sums as they are: newer ones can, on a GPU."""
    return "dtype" in torch.ops.aten.mm.overloads()
