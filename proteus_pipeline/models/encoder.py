"""A packed ESM-2 encoder: no padding between sequences, and the same bits in every company.

All sequences of a batch lie back to back in one (tokens, width) matrix; attention runs on each sequence's own rows. In
``strict`` numerics every matrix product is taken over tiles of exactly ``ROW_TILE`` rows, so that a BLAS library sees
one shape whatever shares the batch, and a row's result is a function of that row alone. ``tolerant`` takes each product
in one piece. Strictness was measured for the shapes of the published ESM-2, whose heads are 16 to 128 wide; with heads
8 wide, torch 2.13's own CPU attention gives other bits on other thread counts.

The arithmetic is fair-esm 2.0.0's (esm/model/esm2.py, esm/multihead_attention.py, esm/rotary_embedding.py): embeddings
scaled by 0.88 under token dropout, queries scaled before rotation, fp32 rotary tables from the stored inv_freq, erf
GELU, and the last layer taken after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from proteus_pipeline.errors import ConfigError, ModelError
from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.models.checkpoint import EMBEDDING, Checkpoint
from proteus_pipeline.models.plan import plan_batches

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Linear = Callable[[torch.Tensor], torch.Tensor]

ENGINE_REVISION = 1  # part of every embedding key: raised only when this file's golden bits change
ROW_TILE = 256  # a smaller tile wastes less on short jobs; 256 to 4096 rows run at the same rate (measured, 2 cores)
PRECISIONS = ("fp32", "mixed", "bf16")
NUMERICS = ("strict", "tolerant")
# ESM-2 was trained with 15% of tokens chosen, 80% of those masked (esm/model/esm2.py).
_KEPT_IN_TRAINING = 1 - 0.15 * 0.8


class Encoder(Protocol):
    """What a model family offers: per-token hidden states of any of its layers."""

    architecture: Architecture

    def encode(
        self, sequences: Sequence[str], layers: Sequence[int], token_budget: int
    ) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        """Yield, for each sequence in some order, its index and its (L + 2, D) fp32 hidden states by layer."""


class Esm2Encoder:
    """ESM-2 of any size, straight from canonical tensors.

    Parameters
    ----------
    checkpoint
        The tensors; they may be memory-mapped.
    precision
        ``fp32``; ``mixed``: bf16 matrix products and attention, fp32 residual, norms and rotation; ``bf16``: all but
        norms' statistics and rotation in bf16.
    numerics
        ``strict``: bit-identical on one device class whatever the batch, order and thread count; ``tolerant``.
    device
        ``cpu`` or ``cuda:N``.

    Raises
    ------
    ModelError
        For an architecture this encoder does not compute.
    ConfigError
        For an unknown precision or numerics.

    """

    def __init__(
        self, checkpoint: Checkpoint, *, precision: str = "fp32", numerics: str = "strict", device: str = "cpu"
    ) -> None:
        import torch

        if precision not in PRECISIONS:
            raise ConfigError(f"embedding.precision is {precision!r}", f"use one of {', '.join(PRECISIONS)}")
        if numerics not in NUMERICS:
            raise ConfigError(f"embedding.numerics is {numerics!r}", f"use one of {', '.join(NUMERICS)}")
        a = checkpoint.architecture
        if a.positions != "rotary" or a.emb_layer_norm_before:
            what = "a norm before its blocks" if a.positions == "rotary" else f"{a.positions} positions"
            raise ModelError(f"a model with {what} is an ESM-1", "use an ESM-2 checkpoint")
        # TF32 would round a GPU's fp32 products to 10 bits of mantissa: then fp32 would not mean fp32.
        torch.backends.cuda.matmul.allow_tf32 = False
        self.architecture = a
        self.device = device
        self.strict = numerics == "strict"
        self._compute = torch.float32 if precision == "fp32" else torch.bfloat16
        self._residual = torch.bfloat16 if precision == "bf16" else torch.float32
        self._tokens = _token_table(a)
        self._embedding = checkpoint.tensors[EMBEDDING].to(device, torch.float32)
        self._norm_after = self._norm(checkpoint.tensors, "esm.encoder.emb_layer_norm_after")
        self._blocks = [_Block(self, checkpoint.layer(i)) for i in range(a.layers)]
        self._rotary: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}

    def encode(
        self, sequences: Sequence[str], layers: Sequence[int], token_budget: int = 2048
    ) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        """Yield each sequence's index and its hidden states, in the order they are done.

        Parameters
        ----------
        sequences
            Normalised sequences, each of at least one residue.
        layers
            Layers wanted: 0 is the scaled embedding, ``architecture.layers`` the last, after the final norm.
        token_budget
            Tokens in one pass; decides speed and memory, and in strict numerics no bit.

        Yields
        ------
        tuple of int and dict
            (L + 2, D) fp32 by layer: the start token, the residues, the end token.

        """
        for batch in plan_batches([len(s) + 2 for s in sequences], token_budget):
            ids = [self._tokens[np.frombuffer(sequences[i].encode("ascii"), dtype=np.uint8)] for i in batch]
            yield from zip(batch, self._forward(ids, sorted(set(layers))), strict=True)

    def _forward(self, ids: list[NDArray[np.int64]], layers: list[int]) -> list[dict[int, NDArray[np.float32]]]:
        import torch

        cls, eos = self.architecture.tokens.index("<cls>"), self.architecture.tokens.index("<eos>")
        tokens = np.concatenate([np.concatenate(([cls], row, [eos])) for row in ids])
        lengths = [len(row) + 2 for row in ids]
        positions = np.concatenate([np.arange(n) for n in lengths])
        if self.strict:
            pad = -len(tokens) % ROW_TILE
            tokens, positions = np.pad(tokens, (0, pad)), np.pad(positions, (0, pad))
        with torch.inference_mode():
            x = self._embedding[torch.from_numpy(tokens).to(self.device)]
            if self.architecture.token_dropout:
                x = x * _KEPT_IN_TRAINING
            place = torch.from_numpy(positions).to(self.device)
            kept = {0: x} if 0 in layers else {}
            x = x.to(self._residual)
            for index in range(max(layers)):
                x = self._blocks[index](x, lengths, place)
                if index + 1 in layers:
                    last = index + 1 == self.architecture.layers
                    kept[index + 1] = self._norm_after(x.float()) if last else x.float()
            arrays = {layer: h.cpu().numpy() for layer, h in kept.items()}
        ends = np.cumsum(lengths)
        return [{layer: a[end - n : end] for layer, a in arrays.items()} for n, end in zip(lengths, ends, strict=True)]

    def _norm(self, tensors: dict[str, torch.Tensor] | object, name: str) -> Linear:
        import torch

        weight, bias = (tensors[f"{name}.{part}"].to(self.device, torch.float32) for part in ("weight", "bias"))  # type: ignore[index]
        eps = float(self.architecture.layer_norm_eps)
        return lambda x: torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def _linear(self, tensors: dict[str, torch.Tensor], *names: str) -> Linear:
        """Return the product with one or several weights laid side by side."""
        import torch

        weight = torch.cat([tensors[f"{n}.weight"] for n in names]).to(self.device, self._compute)
        bias = torch.cat([tensors[f"{n}.bias"] for n in names]).to(self.device, self._compute)

        def whole(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.to(self._compute), weight, bias)

        def tiled(x: torch.Tensor) -> torch.Tensor:
            out = x.new_empty((x.shape[0], weight.shape[0]), dtype=self._compute)
            for start in range(0, x.shape[0], ROW_TILE):
                out[start : start + ROW_TILE] = whole(x[start : start + ROW_TILE])
            return out

        return tiled if self.strict else whole

    def rotary(self, inv_freq: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, (at least `length`, head_width) fp32, of position times frequency.

        The angle is an fp32 product, as in fair-esm; its cosine is taken in fp64 and rounded once.
        """
        import torch

        key = inv_freq.cpu().numpy().tobytes()
        known = self._rotary.get(key)
        if known is None or known[0].shape[0] < length:
            rows = max(1024, 1 << (length - 1).bit_length())
            angles = np.outer(np.arange(rows, dtype=np.float32), inv_freq.cpu().numpy()).astype(np.float64)
            angles = np.concatenate((angles, angles), axis=1)
            known = tuple(torch.from_numpy(f(angles).astype(np.float32)).to(self.device) for f in (np.cos, np.sin))  # type: ignore[assignment]
            self._rotary[key] = known  # type: ignore[assignment]
        return known  # type: ignore[return-value]


class _Block:
    """One transformer block over packed rows."""

    def __init__(self, encoder: Esm2Encoder, tensors: dict[str, torch.Tensor]) -> None:
        import torch

        self._encoder = encoder
        self._norm1 = encoder._norm(tensors, "attention.LayerNorm")  # noqa: SLF001 - one class in two parts
        self._norm2 = encoder._norm(tensors, "LayerNorm")  # noqa: SLF001
        names = (f"attention.self.{part}" for part in ("query", "key", "value"))
        self._qkv = encoder._linear(tensors, *names)  # noqa: SLF001
        self._out = encoder._linear(tensors, "attention.output.dense")  # noqa: SLF001
        self._up = encoder._linear(tensors, "intermediate.dense")  # noqa: SLF001
        self._down = encoder._linear(tensors, "output.dense")  # noqa: SLF001
        self._inv_freq = tensors["attention.self.rotary_embeddings.inv_freq"].to(torch.float32)

    def __call__(self, x: torch.Tensor, lengths: list[int], place: torch.Tensor) -> torch.Tensor:
        x = x + self._out(self._attend(self._norm1(x.float()), lengths, place)).to(x.dtype)
        return x + self._down(_gelu(self._up(self._norm2(x.float())), self._encoder.strict)).to(x.dtype)

    def _attend(self, x: torch.Tensor, lengths: list[int], place: torch.Tensor) -> torch.Tensor:
        import torch

        a = self._encoder.architecture
        rows = x.shape[0]
        q, k, v = self._qkv(x).view(rows, 3, a.heads, a.head_width).unbind(1)
        cos, sin = (t[place].unsqueeze(1) for t in self._encoder.rotary(self._inv_freq, max(lengths)))
        q = _rotate(q.float() * a.head_width**-0.5, cos, sin).to(v.dtype)
        k = _rotate(k.float(), cos, sin).to(v.dtype)
        out = torch.zeros_like(v)
        start = 0
        for length in lengths:
            # (1, heads, length, head_width): a shape of this sequence alone.
            own = (t[start : start + length].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
            query, key, value = own
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
            out[start : start + length] = attended.squeeze(0).transpose(0, 1)
            start += length
        return out.reshape(rows, a.width)


def _gelu(x: torch.Tensor, strict: bool) -> torch.Tensor:
    import torch

    if x.dtype != torch.float32 and (x.is_cuda or not strict):
        return torch.nn.functional.gelu(x)
    # torch's fused CPU kernel has a coarser erf: it puts hidden states 1.4 times as far from fp64 as this form does. And
    # it has another for the last few elements of each thread's share, so that the thread count would enter the bits.
    wide = x.float()
    return (wide * 0.5).mul_((wide * 0.5**0.5).erf_().add_(1.0)).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    import torch

    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _token_table(architecture: Architecture) -> NDArray[np.int64]:
    """Return the token of each byte, (256,); bytes outside the vocabulary map to <unk>, and rules refuse them earlier."""
    table = np.full(256, architecture.tokens.index("<unk>"), dtype=np.int64)
    for index, token in enumerate(architecture.tokens):
        if len(token) == 1:
            table[ord(token)] = index
    return table
