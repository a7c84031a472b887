"""A packed ESM-2 encoder: no padding between sequences, and the same bits in every company.

All sequences of a batch lie back to back in one (tokens, width) matrix; attention runs on each sequence's own rows. In
``strict`` numerics every matrix product is taken over tiles of a number of rows that a sequence's own length decides, and over
columns in parts that are always the same, so that a BLAS library sees one shape whatever shares the batch, and a row's result
is a function of that row alone; and on a CPU every operation runs in one thread, so that thread counts can't enter.
``tolerant`` takes what rows there are.

Tiles serve speed as well: what a block does to one between two attentions stays in a core's own cache.

The arithmetic is fair-esm 2.0.0's (esm/model/esm2.py, esm/multihead_attention.py, esm/rotary_embedding.py): embeddings
scaled by 0.88 under token dropout, fp32 rotary tables from the stored inv_freq, erf GELU, the last layer taken after the
final norm. It is written with fewer passes: the two halves that a head rotates are laid side by side in the weights, so that
the rotation is one product of complex numbers; GELU is taken in the product before it; the scale of the queries is the
attention kernel's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property, partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.errors import CacheMemoryError, ConfigError, ModelError
from proteus_pipeline.models.attention import attend, attend_together, probabilities
from proteus_pipeline.models.blocks import Arithmetic, Batch, Block
from proteus_pipeline.models.checkpoint import EMBEDDING, Checkpoint
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH, Encoded, Outputs
from proteus_pipeline.models.heads import ContactHead, LanguageHead
from proteus_pipeline.models.plan import plan_batches, plan_in_tiles, plan_tiles
from proteus_pipeline.models.workers import Alone, Crew, Workers, do_all, thread_count, workers

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from proteus_pipeline.models.architecture import Architecture

_BATCHES_EACH = 4
_LEAST_TILES = 2
_TABLE_ROWS = 1024  # of a rotary table, at least
# ESM-2 was trained with 15% of tokens chosen, 80% of those masked (esm/model/esm2.py).
_KEPT_IN_TRAINING = 1 - 0.15 * 0.8


class Esm2Encoder:
    """ESM-2 of any size, straight from canonical tensors; see `proteus_pipeline.models.encoder.make_encoder`.

    Raises
    ------
    ModelError
        For an architecture this encoder does not compute.

    """

    def __init__(self, checkpoint: Checkpoint, *, precision: str, strict: bool, device: str) -> None:
        import torch

        a = checkpoint.architecture
        if a.positions != "rotary" or a.emb_layer_norm_before:
            what = "a norm before its blocks" if a.positions == "rotary" else f"{a.positions} positions"
            raise ModelError(f"a model with {what} is an ESM-1", "use an ESM-2 checkpoint")
        # TF32 would round a GPU's fp32 products to 10 bits of mantissa: then fp32 would not mean fp32.
        torch.backends.cuda.matmul.allow_tf32 = False
        self.architecture: Architecture = a
        self.device = device
        self._strict = strict
        self._on_cpu = device == "cpu"
        self._heads_of = checkpoint.heads()
        self._arithmetic = Arithmetic(a, precision, device)
        self.heads = self._arithmetic.heads
        self._together = not self._on_cpu and self.heads.compute != torch.float32 and _has_varlen(device)
        self._tokens = _token_table(a)
        self._embedding = checkpoint.tensors[EMBEDDING].to(device, torch.float32, copy=True)
        self._norm_after = self._arithmetic.norm(checkpoint.tensors, "esm.encoder.emb_layer_norm_after")
        self._blocks: list[Block] = []
        with workers(thread_count() if self._on_cpu else 1) as pool:
            for block in pool.ahead(lambda i: Block(self._arithmetic, checkpoint.layer(i)), range(a.layers)):
                self._blocks.append(block)
                checkpoint.let_go()  # or all weights would be in memory twice: what is mapped, and the copies
        self._arithmetic.in_use.opened.clear()
        self._tables: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    @cached_property
    def _language_head(self) -> LanguageHead:
        head = LanguageHead(self._heads_of, self.device)
        self._heads_of.let_go()
        return head

    @cached_property
    def _contact_head(self) -> ContactHead:
        head = ContactHead(self._heads_of, self.device)
        self._heads_of.let_go()
        return head

    def encode(
        self, sequences: Sequence[str], layers: Sequence[int], token_budget: int = TOKENS_PER_BATCH
    ) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        """Yield each sequence's index and its (L + 2, D) fp32 hidden states by layer."""
        for index, encoded in self.compute(sequences, Outputs(layers=tuple(layers)), token_budget):
            yield index, encoded.hidden

    def compute(
        self, sequences: Sequence[str], outputs: Outputs, token_budget: int = TOKENS_PER_BATCH
    ) -> Generator[tuple[int, Encoded], None, None]:
        """Yield each sequence's index and its outputs; see `proteus_pipeline.models.encoder.Encoder`."""
        depth = self.architecture.layers
        if not all(0 <= n <= depth for n in outputs.layers) or not all(0 < n <= depth for n in outputs.received):
            raise ConfigError(f"{outputs} asks for a layer that is not there", f"the model has layers 0 to {depth}")
        if outputs.logits:
            self._language_head  # noqa: B018 - what is missing is said before anything is computed
        if outputs.contacts:
            self._contact_head  # noqa: B018
        if not sequences:
            return
        lengths = [len(s) + 2 for s in sequences]
        run = partial(self._run, sequences, outputs)
        if not self._on_cpu:
            # A tile is filled up in strict, whatever a batch has.
            least = self._arithmetic.tiles[-1] if self._strict else 0
            for batch in plan_batches(lengths, max(token_budget, least)):
                yield from run(Alone(), batch)
            return
        count = thread_count()
        # Several batches for each thread, where there is work for that: the threads end at about the same time.
        tiles = self._arithmetic.tiles if self._strict else self._arithmetic.tiles[-1:]
        share = max(_LEAST_TILES, -(-sum(lengths) // (_BATCHES_EACH * count * tiles[-1])))
        budget = min(token_budget, share * tiles[-1])
        batches = plan_in_tiles(lengths, budget, tiles)
        with workers(count) as pool:
            yield from self._on_threads(pool, run, batches)

    def _on_threads(
        self, pool: Workers, run: Callable[[Crew, list[int]], list[tuple[int, Encoded]]], batches: list[list[int]]
    ) -> Iterator[tuple[int, Encoded]]:
        """Yield all batches' outputs: the threads take a batch each, and share the last ones that are too few for that."""
        whole = len(batches) - len(batches) % pool.count
        for done in pool.ahead(partial(run, Alone()), batches[:whole]):
            yield from done
        for batch in batches[whole:]:
            yield from run(pool, batch)

    def _run(
        self, sequences: Sequence[str], outputs: Outputs, crew: Crew, batch: list[int]
    ) -> list[tuple[int, Encoded]]:
        """Return a batch's outputs; where it has no room, those of its halves."""
        try:
            encoded = self._forward([sequences[i] for i in batch], outputs, crew)
            self.check_files()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise CacheMemoryError(
                    f"a sequence of {len(sequences[batch[0]])} residues has no room on {self.device}",
                    "embed it in windows (data.long=window), or on another device (runtime.device=cpu)",
                ) from error
        else:
            return list(zip(batch, encoded, strict=True))
        middle = len(batch) // 2
        return [pair for half in (batch[:middle], batch[middle:]) for pair in self._run(sequences, outputs, crew, half)]

    def _forward(self, sequences: list[str], outputs: Outputs, crew: Crew) -> list[Encoded]:
        import torch

        with torch.inference_mode():
            batch = self._start(sequences)
            last = self.architecture.layers
            wanted = {*outputs.layers, *((last,) if outputs.logits else ())}
            depth = last if outputs.contacts else max((*wanted, *outputs.received), default=0)
            if 0 in wanted:
                batch.kept[0] = batch.x.clone()  # what follows adds to it in place
            batch.x = batch.x.to(self._arithmetic.between)
            for number, block in enumerate(self._blocks[:depth], 1):
                do_all(crew, partial(block.project, batch), batch.tiles)
                self._attend(batch, number, outputs, crew)
                do_all(crew, partial(block.finish, batch), batch.tiles)
                if number == depth:
                    batch.let_go()
                if number in wanted:
                    batch.kept[number] = self._layer(batch, number, depth, crew)
            batch.let_go()  # of no block too
            return self._results(batch, outputs, crew)

    def _start(self, sequences: list[str]) -> Batch:
        """Return a batch's token embeddings, rows padded to whole tiles, and room for what follows."""
        import torch

        a = self.architecture
        cls, eos = a.tokens.index("<cls>"), a.tokens.index("<eos>")
        ids = [self._tokens[np.frombuffer(s.encode("ascii"), dtype=np.uint8)] for s in sequences]
        lengths = [len(row) + 2 for row in ids]
        rows, tiles = plan_tiles(lengths, self._arithmetic.tiles, whole=self._strict)
        tokens, positions = np.zeros((2, tiles[-1].stop), dtype=np.int64)
        for sequence, where in zip(ids, rows, strict=True):
            tokens[where] = [cls, *sequence, eos]
            positions[where] = np.arange(len(sequence) + 2)
        x = self._embedding[torch.from_numpy(tokens).to(self.device)]
        if a.token_dropout:
            x *= _KEPT_IN_TRAINING
        place = torch.from_numpy(positions).to(self.device)
        qkv = x.new_empty((len(tokens) + self.heads.key_multiple - 1, 3 * a.width), dtype=self._arithmetic.between)
        qkv[len(tokens) :] = 0  # the last sequence's attention may look at them
        frequencies = {block.frequencies for block in self._blocks}
        return Batch(
            lengths,
            rows,
            tiles,
            x,
            qkv,
            {f: self._table(f, max(lengths))[place] for f in frequencies},
        )  # fmt: skip

    def _attend(self, batch: Batch, number: int, outputs: Outputs, crew: Crew) -> None:
        """Fill a batch's context; on the way, take what is wanted of the probabilities of block `number`."""
        rows = batch.rows
        if outputs.contacts or number in outputs.received:  # first: the context takes the queries' place
            crew.share(partial(self._look, batch, number, outputs), range(len(rows)))
        if not self._together:
            # The longest first: the threads that share them end at about the same time.
            order = sorted(range(len(rows)), key=lambda i: -batch.lengths[i])
            crew.share(lambda i: attend(self.heads, batch.qkv, rows[i], batch.context[rows[i]]), order)
        else:
            attend_together(self.heads, batch.qkv, batch.context, batch.lengths)

    def _look(self, batch: Batch, number: int, outputs: Outputs, index: int) -> None:
        """Take contacts and received attention of one sequence from block `number`, some heads at a time."""
        rows = batch.rows[index]
        length = batch.lengths[index] - 2
        received = batch.x.new_zeros(length + 2, dtype=self._embedding.dtype)
        for first, attention in probabilities(self.heads, batch.qkv[rows]):
            if outputs.contacts:
                if number == 1 and first == 0:
                    batch.contacts[index] = attention.new_zeros((length, length))
                self._contact_head.add(batch.contacts[index], number - 1, first, attention)
            received += attention[:, 1:-1].sum((0, 1))
        if number in outputs.received:
            batch.received[number, index] = received[1:-1] / (self.architecture.heads * length)

    def _layer(self, batch: Batch, number: int, depth: int, crew: Crew) -> torch.Tensor:
        """Return a layer's hidden states, fp32, the last one's after the final norm; of block `depth`, whom none follows, in place."""
        import torch

        x = batch.x
        ends = number == depth and x.dtype == torch.float32
        if number < self.architecture.layers:
            return x if ends else x.to(torch.float32, copy=True)
        out = x if ends else torch.empty_like(x, dtype=torch.float32)

        def norm(rows: slice) -> None:
            out[rows] = self._norm_after(x[rows].float())

        crew.share(norm, batch.tiles)
        return out

    def _results(self, batch: Batch, outputs: Outputs, crew: Crew) -> list[Encoded]:
        """Return each sequence's outputs as arrays of this machine's memory, and of their own."""
        rows = batch.rows
        hidden = {layer: batch.kept[layer].cpu().numpy() for layer in outputs.layers}
        done: dict[int, Encoded] = {}

        def finish(i: int) -> None:
            done[i] = Encoded(
                {layer: array[rows[i]].copy() for layer, array in hidden.items()},
                {layer: batch.received[layer, i].cpu().numpy() for layer in outputs.received},
                self._logits(batch.kept[self.architecture.layers], rows[i]) if outputs.logits else None,
                self._contact_head.contacts(batch.contacts[i]).cpu().numpy() if outputs.contacts else None,
            )

        crew.share(finish, range(len(rows)))
        return [done[i] for i in range(len(rows))]

    def _logits(self, hidden: torch.Tensor, rows: slice) -> NDArray[np.float32]:
        """Return one sequence's logits: its own shape, whatever its company."""
        logits: NDArray[np.float32] = self._language_head(hidden[rows]).cpu().numpy()
        return logits

    @property
    def nbytes(self) -> int:
        """Bytes that weights and rotary tables hold in this encoder's memory, the tables' first rows before they are made too.

        Heads are copied when they are first asked for.
        """
        held = self._norm_after.nbytes + sum(block.nbytes for block in self._blocks)
        first = 4 * _TABLE_ROWS * self.architecture.head_width
        tables = sum(
            self._tables[f].nbytes if f in self._tables else first for f in {b.frequencies for b in self._blocks}
        )
        made: list[LanguageHead | ContactHead] = [
            self.__dict__[name] for name in ("_language_head", "_contact_head") if name in self.__dict__
        ]
        heads = self._heads_of.nbytes + sum(head.nbytes for head in made)
        return self._embedding.nbytes + held + heads + tables

    def check_files(self) -> None:
        """Raise IntegrityError where a file was written to that weights are used in place of."""
        self._arithmetic.in_use.check()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again when it is asked for: tables, heads; and a lock can't be copied."""
        left = {"_lock", "_tables", "_language_head", "_contact_head"}
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._tables, self._lock = {}, threading.Lock()

    def flops(self, length: int) -> float:
        """Return the floating-point operations that a sequence of `length` residues takes."""
        return self.architecture.flops(length)

    def peak(self) -> float:
        """Return the rate of one large matrix product here and now, in this precision, FLOP/s."""
        return self._arithmetic.peak()

    def _table(self, frequencies: bytes, length: int) -> torch.Tensor:
        """Return cos + i sin of position times frequency, (at least `length`, head_width / 2) complex.

        The angle is an fp32 product, as in fair-esm; its cosine is taken in fp64 and rounded once.
        """
        import torch

        with self._lock:
            known = self._tables.get(frequencies)
            if known is None or known.shape[0] < length:
                rows = max(_TABLE_ROWS, 1 << (length - 1).bit_length())
                inv_freq = np.frombuffer(frequencies, dtype=np.float32)
                angles = np.outer(np.arange(rows, dtype=np.float32), inv_freq).astype(np.float64)
                table = (np.cos(angles).astype(np.float32) + 1j * np.sin(angles).astype(np.float32)).astype(
                    np.complex64
                )
                known = torch.from_numpy(table).to(self.device)
                self._tables[frequencies] = known
        return known


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether torch found no room: on a GPU it has an error for that, on a CPU only words."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "DefaultCPUAllocator" in str(error)


def _has_varlen(device: str) -> bool:
    """Say whether torch has its kernel for packs here: in a release that takes what we ask of it, on a GPU that runs it."""
    import torch

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "num_splits" in signature(varlen_attn).parameters and torch.cuda.get_device_capability(device) >= (8, 0)


def _token_table(architecture: Architecture) -> NDArray[np.int64]:
    """Return the token of each byte, (256,); bytes outside the vocabulary map to <unk>, and rules refuse them earlier."""
    table = np.full(256, architecture.tokens.index("<unk>"), dtype=np.int64)
    for index, token in enumerate(architecture.tokens):
        if len(token) == 1:
            table[ord(token)] = index
    return table
