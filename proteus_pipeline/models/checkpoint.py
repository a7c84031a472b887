"""A model's canonical tensors: Hugging Face's ESM names, whichever kind of file they came from.

Two rules make equal models equal:

* ``rotary_embeddings.inv_freq`` is data. Official checkpoints hold it rounded to fp16 and fair-esm loads it as it is;
  recomputing it moves per-residue values by up to 0.04. It is kept for every layer, widened to fp32 (as every loader
  does, without loss), and written out from the formula only where a file carries none.
* What no forward pass reads is left out: ``position_ids``, the absolute ``position_embeddings`` that Hugging Face files
  carry beside rotary ones, and a language-model decoder that is the token embedding again.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import IntegrityError, ModelError
from proteus_pipeline.identity import digests
from proteus_pipeline.models.architecture import Architecture

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from proteus_pipeline.stores.files import OpenFile

TRUNK = "trunk"
EMBEDDING = "esm.embeddings.word_embeddings.weight"
_LAYER = "esm.encoder.layer.{}."
_INV_FREQ = "attention.self.rotary_embeddings.inv_freq"
_UNUSED = re.compile(r"esm\.embeddings\.position_(ids|embeddings\.weight)")
_TF_NORM = re.compile(r"(LayerNorm)\.(gamma|beta)")
# transformers 5 keeps one for all layers, and saves it under this name.
_SHARED_INV_FREQ = re.compile(r"(esm\.)?encoder\.layer\.\*\." + re.escape(_INV_FREQ))
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"}


def dtype_name(tensor: torch.Tensor) -> str:
    """Return safetensors' name of a tensor's dtype."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(
            f"tensors of dtype {name} are not supported", "convert the weights to fp32, fp16 or bf16 first"
        )
    return _DTYPES[name]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's C-order bytes, without a copy where it is contiguous."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def component_of(name: str) -> str:
    """Return the component a canonical tensor belongs to.

    >>> component_of("esm.encoder.layer.0.LayerNorm.bias"), component_of("classifier.dense.weight")
    ('trunk', 'classifier')
    """
    if name.startswith(("esm.embeddings.", "esm.encoder.")):
        return TRUNK
    return name.removeprefix("esm.").split(".", 1)[0]


class FilesInUse:
    """Files that tensors are used in place of. They were checked once, and have to stay what they were.

    Attributes
    ----------
    opened
        By their places, while tensors are asked for: what `KnownTensors.in_place` opened, and None for what it may not use.

    """

    def __init__(self) -> None:
        self._files: dict[OpenFile, tuple[str, str]] = {}
        self.opened: dict[Path, tuple[Any, OpenFile] | None] = {}

    def add(self, file: OpenFile, what: str, remedy: str) -> None:
        """Add a file that was opened before its tensors were checked; `what` and `remedy` are said when it has changed."""
        self._files[file] = what, remedy

    def check(self) -> None:
        """Raise IntegrityError where a file was written to since: what was computed meanwhile may be wrong."""
        for file, (what, remedy) in list(self._files.items()):
            if not file.is_unchanged():
                raise IntegrityError(what, remedy)

    def __getstate__(self) -> dict[str, Any]:
        self.check()  # or what was never checked would be copied, and never be again
        return {"_files": {}, "opened": {}}  # the numbers themselves go with a copy of who uses them


class KnownTensors(Mapping[str, "torch.Tensor"]):
    """Tensors whose digests are known before one is read; each is held to its own before anybody gets it."""

    digests: dict[str, str]

    @abstractmethod
    def in_place(self, name: str, in_use: FilesInUse) -> torch.Tensor | None:
        """Return a tensor to be used where it lies in its file, which is added to those; None where it has to be copied."""

    @abstractmethod
    def let_go(self) -> None:
        """Hold no tensor any more; the next touch reads and checks it again."""


@dataclass(frozen=True)
class Checkpoint:
    """An architecture and its tensors by canonical name; tensors may be memory-mapped, and read when touched.

    Attributes
    ----------
    architecture
        What the tensors fit.
    tensors
        By canonical name.
    mapped
        Whether their memory is a file's, and the system's to take back.

    """

    architecture: Architecture
    tensors: Mapping[str, torch.Tensor]
    mapped: bool = False

    @cached_property
    def tensor_digests(self) -> dict[str, str]:
        """Each tensor's digest by name."""
        if isinstance(self.tensors, KnownTensors):
            return self.tensors.digests
        return {
            name: digests.of_tensor(dtype_name(tensor), tuple(tensor.shape), tensor_bytes(tensor))
            for name, tensor in sorted(self.tensors.items())
        }

    @cached_property
    def digests(self) -> dict[str, str]:
        """Each component's digest by its name; ``trunk`` is always there."""
        return component_digests(self.architecture, self.tensor_digests)

    @property
    def trunk_digest(self) -> str:
        return self.digests[TRUNK]

    @property
    def model_digest(self) -> str:
        return digests.of_model(self.digests)

    def heads(self) -> Checkpoint:
        """Return what heads are made of, without holding the trunk: of tensors in memory, theirs and the token embedding."""
        if isinstance(self.tensors, KnownTensors):
            return self
        needed = {n: t for n, t in self.tensors.items() if component_of(n) != TRUNK or n == EMBEDDING}
        return Checkpoint(self.architecture, needed, self.mapped)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that are held in memory; mapped ones are the system's, which takes them back as it needs."""
        if self.mapped or isinstance(self.tensors, KnownTensors):
            return 0
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def let_go(self) -> None:
        """Free what was mapped, once nobody else holds its tensors; it is read and checked again when it is touched."""
        if isinstance(self.tensors, KnownTensors):
            self.tensors.let_go()

    def layer(self, index: int) -> Tensors:
        """Return one block's tensors, by their names within the block; each is read when it is touched."""
        return Tensors(self.tensors, _LAYER.format(index))


class Tensors(Mapping[str, "torch.Tensor"]):
    """Those of a checkpoint's tensors whose names begin in one way, by the rest of their names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._prefix + name]

    def in_place(self, name: str, in_use: FilesInUse) -> torch.Tensor | None:
        """Return a tensor as `KnownTensors.in_place` does; None too for one that lies in no file that was checked."""
        tensors = self._tensors
        return tensors.in_place(self._prefix + name, in_use) if isinstance(tensors, KnownTensors) else None

    def __iter__(self) -> Iterator[str]:
        # Over the names, and not the items: that would read every tensor of the model.
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def component_digests(architecture: Architecture, tensor_digests: Mapping[str, str]) -> dict[str, str]:
    """Fold tensors' digests by name into each component's."""
    parts: dict[str, dict[str, str]] = {}
    for name, digest in tensor_digests.items():
        parts.setdefault(component_of(name), {})[name] = digest
    identity = architecture.identity()
    return {name: digests.of_component(name, identity, tensors) for name, tensors in sorted(parts.items())}


def canonical(
    architecture: Architecture, tensors: Mapping[str, torch.Tensor], origin: str, *, mapped: bool = False
) -> Checkpoint:
    """Apply the two rules above, and check that the trunk is whole.

    Parameters
    ----------
    architecture
        What the tensors should fit.
    tensors
        By Hugging Face's names, with or without the ``esm.`` prefix.
    origin
        What to call the file in an error.
    mapped
        Whether the tensors are a mapped file's.

    Raises
    ------
    ModelError
        When a trunk tensor is missing, of another shape, or unknown.

    """
    a = architecture
    if min(a.width, a.heads, a.ffn_width) < 1 or a.layers < 0 or a.width % (2 * a.heads):
        raise ModelError(
            f"{origin} says {a.layers} layers, width {a.width}, {a.heads} heads, which no ESM-2 can have",
            "give the configuration that belongs to these weights",
        )
    named: dict[str, torch.Tensor] = {}
    shared = None
    for name, tensor in tensors.items():
        if _SHARED_INV_FREQ.fullmatch(name):
            shared = tensor.float()
            continue
        if not _NAME.fullmatch(name):
            raise ModelError(
                f"{origin} has a tensor called {name[:60]!r}", "rename it: it becomes part of a file's name"
            )
        bare = name.startswith(("embeddings.", "encoder.", "contact_head.", "pooler."))
        full = f"esm.{name}" if bare else name
        # transformers 5 saves block norms by TensorFlow's names, and reads either.
        full = _TF_NORM.sub(lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", full)
        if full in named:
            raise ModelError(f"{origin} holds {full} twice, under two names", "remove one of them")
        named[full] = tensor
    kept = {name: t for name, t in named.items() if not _UNUSED.fullmatch(name)}
    decoder = kept.get("lm_head.decoder.weight")
    embedding = kept.get(EMBEDDING)
    if decoder is not None and embedding is not None and _same(decoder, embedding):
        del kept["lm_head.decoder.weight"]
    # Hugging Face stores the decoder's bias twice.
    if "lm_head.bias" in kept and "lm_head.decoder.bias" in kept:
        del kept["lm_head.decoder.bias"]
    for index in range(architecture.layers):
        name = _LAYER.format(index) + _INV_FREQ
        kept[name] = kept[name].float() if name in kept else inv_freq(architecture) if shared is None else shared
    _check_trunk(architecture, kept, origin)
    return Checkpoint(architecture, dict(sorted(kept.items())), mapped)


def inv_freq(architecture: Architecture) -> torch.Tensor:
    """Return the rotary frequencies of the formula, (head_width / 2,) fp32: 10000^(-2i/d), RoFormer's equation 15."""
    import torch

    width = architecture.head_width
    return 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width))


def trunk_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor a trunk of this architecture has, by canonical name."""
    a, d, f = architecture, architecture.width, architecture.ffn_width

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (d,), f"{name}.bias": (d,)}

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (len(a.tokens), d)} | norm("esm.encoder.emb_layer_norm_after")
    if a.emb_layer_norm_before:
        shapes |= norm("esm.embeddings.layer_norm")
    for index in range(a.layers):
        p = _LAYER.format(index)
        for projection in ("query", "key", "value"):
            shapes |= linear(f"{p}attention.self.{projection}", d, d)
        shapes |= linear(f"{p}attention.output.dense", d, d) | norm(f"{p}attention.LayerNorm")
        shapes |= linear(f"{p}intermediate.dense", f, d) | linear(f"{p}output.dense", d, f) | norm(f"{p}LayerNorm")
        shapes[p + _INV_FREQ] = (a.head_width // 2,)
    return shapes


def _check_trunk(architecture: Architecture, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
    wanted = trunk_shapes(architecture)
    found = {name: tuple(t.shape) for name, t in tensors.items() if component_of(name) == TRUNK}
    remedy = "give an ESM-2 checkpoint: a fair-esm .pt, or a Hugging Face folder with config.json"
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(f"{origin} lacks {len(missing)} of ESM-2's tensors, {missing[0]} first", remedy)
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ModelError(f"{origin} has {len(unknown)} tensors ESM-2 does not know, {unknown[0]} first", remedy)
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(
                f"{origin}: {name} has shape {found[name]}, and its configuration asks for {shape}", remedy
            )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(a, b)
