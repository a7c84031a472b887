"""One model in the layouts that users have: fair-esm's official .pt, and Hugging Face's folder in three forms."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from proteus_pipeline.models.architecture import ESM2_TOKENS, Architecture

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint


def make_checkpoint(layers: int = 2, width: int = 32, heads: int = 4, seed: int = 0) -> Checkpoint:
    """A small ESM-2 of random weights."""
    from proteus_pipeline.models.checkpoint import canonical, trunk_shapes

    architecture = Architecture(layers, width, heads, 4 * width)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in trunk_shapes(architecture).items()
        if "inv_freq" not in name
    }
    tensors |= {name: t + 1 for name, t in tensors.items() if "norm" in name.lower() and name.endswith("weight")}
    return canonical(architecture, tensors, "a random model")


# Written out again, so that a mistake in the reader's own table does not cancel out.
FAIR_NAMES = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.self.rotary_embeddings": "self_attn.rot_emb",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
}


def fair_name(name: str) -> str:
    """Return the name of a trunk tensor in an official fair-esm file."""
    if name == "esm.embeddings.word_embeddings.weight":
        return "encoder.sentence_encoder.embed_tokens.weight"
    if name.startswith("esm.encoder.emb_layer_norm_after."):
        return "encoder.sentence_encoder." + name.removeprefix("esm.encoder.")
    index, inner = name.removeprefix("esm.encoder.layer.").split(".", 1)
    module, leaf = inner.rsplit(".", 1)
    return f"encoder.sentence_encoder.layers.{index}.{FAIR_NAMES[module]}.{leaf}"


def trunk(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {n: t for n, t in checkpoint.tensors.items() if n.startswith(("esm.encoder.", "esm.embeddings."))}


def lm_head(checkpoint: Checkpoint, *, fair: bool) -> dict[str, torch.Tensor]:
    """Return a language-model head of either library's names; its decoder is the embedding again."""
    width = checkpoint.architecture.width
    embedding = checkpoint.tensors["esm.embeddings.word_embeddings.weight"]
    head = {
        "dense.weight": torch.eye(width),
        "dense.bias": torch.zeros(width),
        "layer_norm.weight": torch.ones(width),
        "layer_norm.bias": torch.zeros(width),
        "bias": torch.arange(len(ESM2_TOKENS), dtype=torch.float32),
        "weight" if fair else "decoder.weight": embedding.clone(),
    }
    return {("encoder.lm_head." if fair else "lm_head.") + name: t for name, t in head.items()}


def contact_head(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    maps = checkpoint.architecture.layers * checkpoint.architecture.heads
    return {"regression.weight": torch.linspace(-1, 1, maps)[None], "regression.bias": torch.tensor([-3.0])}


def write_official(checkpoint: Checkpoint, path: Path, *, lm: bool = True, contact: bool = True) -> Path:
    """Write a .pt as fair-esm's servers hold it, with the regression of contacts in its own file."""
    a = checkpoint.architecture
    state = {fair_name(n): t for n, t in trunk(checkpoint).items()} | (lm_head(checkpoint, fair=True) if lm else {})
    arguments = argparse.Namespace(
        encoder_layers=a.layers,
        encoder_embed_dim=a.width,
        encoder_attention_heads=a.heads,
        token_dropout=a.token_dropout,
        arch="esm2",
    )
    torch.save({"cfg": {"model": arguments}, "model": state}, path)
    if contact:
        head = {f"contact_head.{n}": t for n, t in contact_head(checkpoint).items()}
        torch.save({"model": head}, path.with_name(f"{path.stem}-contact-regression.pt"))
    return path


def hf_config(checkpoint: Checkpoint) -> dict[str, object]:
    a = checkpoint.architecture
    return {
        "model_type": "esm",
        "num_hidden_layers": a.layers,
        "hidden_size": a.width,
        "num_attention_heads": a.heads,
        "intermediate_size": a.ffn_width,
        "position_embedding_type": "rotary",
        "token_dropout": a.token_dropout,
        "emb_layer_norm_before": None,  # as the published files have it
        "layer_norm_eps": 1e-05,
        "vocab_size": 33,
    }


def write_hf(checkpoint: Checkpoint, folder: Path, form: str, *, lm: bool = True, contact: bool = True) -> Path:
    """Write a Hugging Face folder: `form` is bin, safetensors, sharded, or canonical."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = trunk(checkpoint) | (lm_head(checkpoint, fair=False) if lm else {})
    tensors |= {f"esm.contact_head.{n}": t for n, t in contact_head(checkpoint).items()} if contact else {}
    # What published files carry and no forward pass reads.
    tensors["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    tensors["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, checkpoint.architecture.width)
    (folder / "config.json").write_text(json.dumps(hf_config(checkpoint)))
    (folder / "vocab.txt").write_text("\n".join(ESM2_TOKENS))
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
        for shard, part in shards.items():
            save_file({n: tensors[n] for n in part}, folder / shard)
        weight_map = {n: shard for shard, part in shards.items() for n in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
