"""An encoder packed into compressed bytes, and unpacked again: sooner than from a slow source, later than kept.

Whatever pickles can be packed. Tensors go beside the pickle, each compressed by zstd over shuffled bytes; in memory only, and by
the process that made them, so that nothing foreign is ever unpickled.
"""

from __future__ import annotations

import io
import pickle
import time
from typing import TYPE_CHECKING, Any

from proteus_pipeline.models.memory import give_back
from proteus_pipeline.models.workers import thread_count, with_one_thread, workers

if TYPE_CHECKING:
    import torch
    from numcodecs.blosc import Blosc

    from proteus_pipeline.models.encoder import Encoder

_SAMPLE_BYTES = 4 << 20
_GIVEN_BACK_BYTES = 8 << 20


class Packed:
    """A compressed encoder, whose tensors are freed one after the other as they are compressed: it can't be used any more.

    Weights that are laid out for a kernel are copied into their usual order first; those are there until the encoder goes.

    Attributes
    ----------
    architecture
        The encoder's.
    nbytes
        What it holds in memory.
    raw_bytes
        What its tensors hold once it is unpacked.

    """

    def __init__(self, encoder: Encoder) -> None:
        pickler, codec = _Pickler.fill(encoder), _codec()
        self.architecture = encoder.architecture
        self.raw_bytes = sum(tensor.nbytes for tensor in pickler.kept)
        self._pickle = pickler.pickle
        self._parts = []
        freed = 0
        for tensor in pickler.kept:
            size = tensor.nbytes
            self._parts.append((codec.encode(_bytes(tensor)), tensor.dtype, tuple(tensor.shape)))
            tensor.data = tensor.new_empty(0)
            freed += size
            if freed > _GIVEN_BACK_BYTES:
                freed = 0
                give_back()  # or the copy would be there beside all that it was made from
        self.nbytes = len(self._pickle) + sum(len(part) for part, _, _ in self._parts)

    def unpack(self) -> Any:
        """Return the encoder anew, bit for bit, by all threads."""
        codec = _codec()
        with workers(thread_count()) as pool:
            tensors = list(pool.ahead(lambda part: _decode(codec, *part), self._parts))
        return _Unpickler(io.BytesIO(self._pickle), tensors).load()


def measure(encoder: object) -> tuple[float, float]:
    """Return what a sample of an encoder's largest tensor is compressed to, as a share, and seconds a byte to bring it back.

    The seconds are those of one thread, over the number of threads there are.
    """
    largest = max(_Pickler.fill(encoder).kept, key=lambda tensor: tensor.nbytes)
    sample = _bytes(largest)[:_SAMPLE_BYTES]
    codec = _codec()
    packed = codec.encode(sample)

    def decode() -> float:
        began = time.perf_counter()
        codec.decode(packed)
        return time.perf_counter() - began

    # In a thread of its own, as each part is: in the main one Blosc would use threads of its own too.
    return len(packed) / sample.nbytes, with_one_thread(decode) / sample.nbytes / thread_count()


class _Pickler(pickle.Pickler):
    """Pickles everything but tensors, which it keeps in a list."""

    kept: list[torch.Tensor]
    pickle: bytes

    @classmethod
    def fill(cls, value: object) -> _Pickler:
        file = io.BytesIO()
        pickler = cls(file, protocol=5)
        pickler.kept = []
        pickler.dump(value)
        pickler.pickle = file.getvalue()
        return pickler

    def persistent_id(self, value: Any) -> int | None:
        import torch

        if not isinstance(value, torch.Tensor):
            return None
        self.kept.append(value)
        return len(self.kept) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = dict(enumerate(tensors))

    def persistent_load(self, number: Any) -> torch.Tensor:
        return self._tensors.pop(number)  # each is asked for once, and may be freed as soon as it is laid out anew


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _decode(codec: Blosc, part: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        codec.decode(part, out=_bytes(out))
    return out


def _codec() -> Blosc:
    from numcodecs.blosc import SHUFFLE, Blosc

    return Blosc(cname="zstd", clevel=1, shuffle=SHUFFLE)
