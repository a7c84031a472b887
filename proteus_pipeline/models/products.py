"""Matrix products, in the three precisions, into buffers that are there already.

A product's bits are those of its shape: in strict numerics, all are taken over tiles of the same number of rows. Biases
are added in a pass of their own, where torch would first spread them over the output in one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

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
        # Turned round in memory: BLAS would otherwise do that for every tile, at a twentieth of the time (measured, MKL).
        self._weight, self._bias = weight.t().contiguous(), bias

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.mm(x, self._weight, out=out).add_(self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.addmm_(x, self._weight).add_(self._bias)


class Bf16Product:
    """Of bf16 numbers, summed in fp32 and rounded to bf16 once.

    On a CPU without instructions for it, torch takes tens of times as long as for fp32: there the same rounded numbers are
    multiplied as fp32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, native: bool) -> None:
        import torch

        self._native = native
        rounded = (weight.t().contiguous().bfloat16(), bias.bfloat16())
        self._weight, self._bias = rounded if native else tuple(t.float() for t in rounded)
        self._dtype = torch.bfloat16

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        import torch

        x = x.to(self._dtype)
        if self._native:
            return torch.addmm(self._bias, x, self._weight, out=out)
        return out.copy_(torch.mm(x.float(), self._weight).add_(self._bias))

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        residual.add_(self(x, x.new_empty((x.shape[0], self._weight.shape[1]), dtype=self._dtype)))
