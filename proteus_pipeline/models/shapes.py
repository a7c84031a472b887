"""In which shapes an encoder computes: of its device class alone, since bits follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from proteus_pipeline.models.device import device_class, on_gpu


@dataclass(frozen=True)
class Shapes:
    """How much is computed at a time.

    Attributes
    ----------
    tiles
        How many rows tiles have, the fewest first. A sequence lies in the smallest that it fits in, alone or with its like, or in
        several of the largest.
    columns
        Of a product, which a thread takes in one go; 0 for all.
    packed
        Rows of the only tile where weights are laid out for one number of rows: of bf16.
    key_multiple
        Attention takes keys in multiples of so many.

    """

    tiles: tuple[int, ...]
    columns: int
    packed: int
    key_multiple: int


# 256 rows waste little on short jobs, and of the 8M's widest matrix they are 1.3 MB; parts of 320 columns are no slower than all at
# once, and a large model's products have 4 to 16 times as many.
_CPU = Shapes((48, 96, 256), 320, 256, 1)
# torch's attention takes the keys that do not fill a register of AVX-512, 16 numbers, one after the other. With AVX2's registers of
# eight, a mask for some that are too many takes as long.
_AVX512 = Shapes(_CPU.tiles, _CPU.columns, _CPU.packed, 16)
# A Xeon with AMX has 2 MB of cache a core: 0.9 to 0.96 of the time that many proteins take (8M, fp32, two threads). One protein alone
# takes 0.7 to 1.3 times as long, by how its length fills tiles; 192 and 256 are there for that.
_AMX = Shapes((48, 96, 192, 256, 384), 960, 256, 16)
_GPU = Shapes((4096,), 0, 4096, 1)  # it needs more rows at once to be busy

GPU_TILE = _GPU.tiles[-1]
"""Rows of a GPU's only tile."""
LARGEST_CPU_TILES = _AMX.tiles
"""The tiles of the CPU that has the largest: for a bound on memory."""


def shapes_of(device: str) -> Shapes:
    """Return the shapes of a device: ``cpu`` or ``cuda:N``."""
    name = device_class(device)
    if on_gpu(name):
        return _GPU
    if "/AVX512" not in name:
        return _CPU
    return _AMX if "+AMX/" in name else _AVX512
