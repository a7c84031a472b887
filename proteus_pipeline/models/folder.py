"""The canonical folder: Hugging Face's layout, one shard a block, the same bytes whoever writes it.

The safetensors files are written here, not by a library: a model version's pointer is the hash of these bytes, so they
may not change with a library's release. Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a
JSON header padded with spaces, the tensors back to back). Any reader of safetensors opens them. The header ends at a
multiple of 64 bytes, and tensors that are no multiple of it come last: so that a matrix of a mapped file begins where kernels
want it, and can be multiplied with as it lies.

``digests.json`` is ours, and other readers pass over it: each tensor's digest by its name, so that `mapped.open_mapped`
can hold a version's tensors to its record one at a time. ::

    {"schema": 1, "tensors": {NAME: DIGEST, ...}}
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.models.checkpoint import Checkpoint, component_of, dtype_name, tensor_bytes
from proteus_pipeline.models.reading import DIGESTS, DIGESTS_SCHEMA, INDEX
from proteus_pipeline.stores.files import atomic_path, write_atomic

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of a CPU
_BLOCK = re.compile(r"esm\.encoder\.layer\.(\d+)\.")
_HF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def shard_of(name: str, layers: int) -> str:
    """Return the file a tensor lies in: one for each block and each head, so that a change stores only what changed."""
    if found := _BLOCK.match(name):
        return f"model-layer-{int(found[1]):0{len(str(layers - 1))}d}.safetensors"
    component = component_of(name)
    if component != "trunk":
        return f"model-{component.replace('_', '-')}.safetensors"
    return "model-embeddings.safetensors" if ".embeddings." in name else "model-final-norm.safetensors"


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint as its canonical folder; `folder` is created, and should be empty.

    Raises
    ------
    StorageError
        When it can't be written.

    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(checkpoint.tensors.items()):
        shards.setdefault(shard_of(name, checkpoint.architecture.layers), {})[name] = tensor
    for shard, tensors in sorted(shards.items()):
        with atomic_path(folder / shard) as temporary, temporary.open("wb") as file:
            for data in _safetensors(tensors):
                file.write(data)
    total = sum(t.numel() * t.element_size() for t in checkpoint.tensors.values())
    weight_map = {name: shard for shard, tensors in sorted(shards.items()) for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomic(folder / INDEX, _json(index))
    write_atomic(folder / DIGESTS, _json({"schema": DIGESTS_SCHEMA, "tensors": checkpoint.tensor_digests}))
    write_atomic(folder / "config.json", _json(_config(checkpoint)))
    write_atomic(folder / "vocab.txt", "".join(f"{token}\n" for token in checkpoint.architecture.tokens).encode())


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    # "format" is what transformers looks for before it opens a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, item[0])))
    for name, tensor in ordered.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for tensor in ordered.values():
        yield tensor_bytes(tensor)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    a = checkpoint.architecture
    tokens = {token: index for index, token in enumerate(a.tokens)}
    dtype = dtype_name(checkpoint.tensors["esm.embeddings.word_embeddings.weight"])
    has_lm_head = any(component_of(name) == "lm_head" for name in checkpoint.tensors)
    return {
        "architectures": ["EsmForMaskedLM" if has_lm_head else "EsmModel"],
        "attention_probs_dropout_prob": 0.0,
        "emb_layer_norm_before": a.emb_layer_norm_before,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": a.width,
        "intermediate_size": a.ffn_width,
        "layer_norm_eps": float(a.layer_norm_eps),
        "mask_token_id": tokens["<mask>"],
        "max_position_embeddings": 1026,
        "model_type": "esm",
        "num_attention_heads": a.heads,
        "num_hidden_layers": a.layers,
        "pad_token_id": tokens["<pad>"],
        "position_embedding_type": a.positions,
        "token_dropout": a.token_dropout,
        "torch_dtype": _HF_DTYPES[dtype],
        "vocab_size": len(a.tokens),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
