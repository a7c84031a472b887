"""Reading a checkpoint from whichever files hold it. No path here runs code from a file: pickles are read weights-only."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ModelError, StorageError
from proteus_pipeline.models.architecture import ESM2_TOKENS, Architecture
from proteus_pipeline.models.checkpoint import Checkpoint, canonical

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
DIGESTS = "digests.json"
DIGESTS_SCHEMA = 1
_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_GIVE = "give a fair-esm .pt, or a Hugging Face folder, .safetensors or .bin with config.json beside it"

# fair-esm 2.0.0's names within one block, and Hugging Face's.
_BLOCK = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn.rot_emb": "attention.self.rotary_embeddings",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
_OUTSIDE = {
    "embed_tokens.": "esm.embeddings.word_embeddings.",
    "emb_layer_norm_after.": "esm.encoder.emb_layer_norm_after.",
    "contact_head.": "esm.contact_head.",
}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a fair-esm ``.pt``, a Hugging Face folder, or one of its weight files, as canonical tensors.

    Raises
    ------
    StorageError
        When there is nothing to read at `path`.
    ModelError
        When what is there is no ESM-2 checkpoint, or asks to run code.

    """
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    elif not path.exists():
        raise StorageError(f"{path} does not exist", _GIVE)
    elif path.suffix == ".pt":
        beside = path.with_name(regression_of(path.name))
        files = {p.name: p for p in (path, beside) if p.exists()}
    else:
        files = {p.name: p for p in sorted(path.parent.iterdir()) if p.is_file() and p.suffix in {".json", ".txt"}}
        files.pop(INDEX, None)
        files[_SAFETENSORS if path.suffix == ".safetensors" else _PICKLE] = path
    return read_files(files, str(path))


def read_files(files: Mapping[str, Path], origin: str) -> Checkpoint:
    """Read a checkpoint from its files' places by their names.

    The names say what the files are, and the places need not: in DVC's cache a file is called by its hash, without a
    suffix.

    Parameters
    ----------
    files
        Those of a Hugging Face folder; or a fair-esm ``NAME.pt``, with ``NAME-contact-regression.pt`` where there is
        one; or one ``.safetensors`` or ``.bin`` of any name, with its config.json.
    origin
        What to call them in an error.

    Raises
    ------
    ModelError
        When they are no ESM-2 checkpoint, or not of one, or ask to run code.

    """
    if not files.keys() & {INDEX, _SAFETENSORS, _PICKLE}:
        top = sorted(name for name in files if "/" not in name)
        regressions = {regression_of(name) for name in top}
        official = [name for name in top if name.endswith(".pt") and name not in regressions]
        single = [name for name in top if name.endswith((".safetensors", ".bin"))]
        if len(official) + len(single) > 1:
            raise ModelError(f"{origin} holds several models' weights ({', '.join(official + single)})", "name one")
        if official:
            return _read_fair_esm(files[official[0]], files.get(regression_of(official[0])), origin)
        if single:
            name = _PICKLE if single[0].endswith(".bin") else _SAFETENSORS
            return read_folder({**files, name: files[single[0]]}, origin)
    return read_folder(files, origin)


def regression_of(name: str) -> str:
    """Return the name under which fair-esm keeps the contact regression of ``NAME.pt``.

    >>> regression_of("esm2_t6_8M_UR50D.pt")
    'esm2_t6_8M_UR50D-contact-regression.pt'
    """
    return f"{name.removesuffix('.pt')}-contact-regression.pt"


def read_folder(files: Mapping[str, Path], origin: str) -> Checkpoint:
    """Read a folder in Hugging Face's layout, from its files' places by their names in it.

    The files need not lie together: a version's lie in the DVC cache, under their content's names.
    """
    architecture = read_architecture(files, origin)
    mapped = True
    if INDEX in files:
        names = read_weight_map(files, origin)
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(set(names.values())):
            tensors |= _read_safetensors(files[shard])
        if lost := sorted(names.keys() - tensors.keys()):
            raise ModelError(f"{origin}: {lost[0]} is not in the shard {INDEX} names", "fetch the folder again")
    elif _SAFETENSORS in files:
        tensors = _read_safetensors(files[_SAFETENSORS])
    elif _PICKLE in files:
        value, mapped = _read_pickle(files[_PICKLE])
        tensors = _tensors(value, files[_PICKLE])
    else:
        raise ModelError(f"{origin} has no {_SAFETENSORS}, {INDEX} or {_PICKLE}", _GIVE)
    return canonical(architecture, tensors, origin, mapped=mapped)


def read_weight_map(files: Mapping[str, Path], origin: str) -> dict[str, str]:
    """Return the shard of each tensor by its name, as the index of a folder says; every shard is one of `files`."""
    names = read_json(files[INDEX]).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(s, str) for s in names.values()):
        raise ModelError(f"{origin}: {INDEX} has no weight_map", _GIVE)
    for shard in sorted(set(names.values())):
        if shard not in files:
            raise ModelError(f"{origin}: {INDEX} names {shard}, which is not there", "fetch the missing shard")
    return names


def read_architecture(files: Mapping[str, Path], origin: str) -> Architecture:
    """Read the architecture of a folder in Hugging Face's layout, from its config.json and vocab.txt."""
    if "config.json" not in files:
        raise ModelError(f"{origin} has no config.json", _GIVE)
    return _hf_architecture(read_json(files["config.json"]), files.get("vocab.txt"), origin)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no JSON file ({error})", "fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "fetch it again")
    return value


def _hf_architecture(config: Mapping[str, Any], vocab: Path | None, origin: str) -> Architecture:
    if config.get("model_type") != "esm":
        raise ModelError(f"{origin}: config.json says model_type {config.get('model_type')!r}, not 'esm'", _GIVE)
    if config.get("is_folding_model"):
        raise ModelError(f"{origin} is ESMFold, whose trunk is not supported", "register the ESM-2 it was built on")
    # The defaults are transformers' EsmConfig's: save_pretrained may leave a key out that has its default value.
    positions = str(config.get("position_embedding_type", "absolute"))
    if positions != "rotary":
        raise ModelError(f"{origin} has {positions} positions, and ESM-2 has rotary ones", _GIVE)
    if config.get("rope_theta", 10000) != 10000:
        raise ModelError(f"{origin} has rope_theta {config['rope_theta']}, and ESM-2 has 10000", _GIVE)
    tokens = _read_vocab(vocab) if vocab else ESM2_TOKENS
    if config.get("vocab_size") != len(tokens):
        raise ModelError(
            f"{origin}: config.json says {config.get('vocab_size')} tokens, and the vocabulary has {len(tokens)}",
            "put the model's own vocab.txt beside config.json",
        )
    try:
        return Architecture(
            layers=int(config.get("num_hidden_layers", 12)),
            width=int(config.get("hidden_size", 768)),
            heads=int(config.get("num_attention_heads", 12)),
            ffn_width=int(config.get("intermediate_size", 3072)),
            positions=positions,
            token_dropout=bool(config.get("token_dropout", False)),
            emb_layer_norm_before=bool(config.get("emb_layer_norm_before")),
            layer_norm_eps=repr(float(config.get("layer_norm_eps", 1e-12))),
            tokens=tokens,
        )
    except (TypeError, ValueError) as error:
        raise ModelError(f"{origin}: config.json has a value of the wrong type ({error})", _GIVE) from error


def _read_vocab(path: Path) -> tuple[str, ...]:
    try:
        tokens = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no text file ({error})", "fetch it again") from error
    # Other letters in other rows are another alphabet, and the digest says so; without these nothing can be encoded.
    if lost := sorted({"<cls>", "<pad>", "<eos>", "<unk>", "<mask>"} - set(tokens)):
        raise ModelError(f"{path} has no {lost[0]}", "put the model's own vocab.txt beside config.json")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{path} names a token twice", "put the model's own vocab.txt beside config.json")
    return tokens


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no readable safetensors file ({error})", "fetch it again") from error


def _read_pickle(path: Path) -> tuple[Any, bool]:
    """Return what a file of torch.save holds, and whether its tensors are mapped."""
    import torch

    try:
        # fair-esm's files hold their arguments as a Namespace, which weights_only refuses unless it is named. For good: within
        # a block it would be taken away from another thread that reads at the same time.
        torch.serialization.add_safe_globals([argparse.Namespace])
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True), False  # written before torch 1.6
    except Exception as error:  # a damaged pickle fails in any way that the unpickler's steps can
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} is no checkpoint that can be read without running its code ({reason[:160]})",
            "save its state_dict with torch.save, or as safetensors",
        ) from error


def _tensors(value: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not a state_dict", _GIVE)
    return {str(name): t for name, t in value.items() if isinstance(t, torch.Tensor)}


def _read_fair_esm(path: Path, regression: Path | None, origin: str) -> Checkpoint:
    data, mapped = _read_pickle(path)
    if not (isinstance(data, dict) and isinstance(data.get("model"), dict) and isinstance(data.get("cfg"), dict)):
        raise ModelError(f"{path} is no ESM-2 checkpoint of fair-esm (a dict with 'model' and 'cfg')", _GIVE)
    cfg = data["cfg"].get("model")
    try:
        layers, width, heads = int(cfg.encoder_layers), int(cfg.encoder_embed_dim), int(cfg.encoder_attention_heads)
        token_dropout = bool(cfg.token_dropout)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its cfg is not an ESM-2's ({error})", _GIVE) from error
    tensors = _tensors(data["model"], path)
    if regression is not None:
        contacts, _ = _read_pickle(regression)
        tensors |= _tensors(contacts.get("model") if isinstance(contacts, dict) else contacts, regression)
    # fair-esm fixes these: ffn 4 x width, layer norm eps 1e-5, the ESM-1b alphabet (esm/model/esm2.py).
    architecture = Architecture(layers, width, heads, 4 * width, token_dropout=token_dropout)
    return canonical(architecture, {fair_esm_to_hf(name): t for name, t in tensors.items()}, origin, mapped=mapped)


def fair_esm_to_hf(name: str) -> str:
    """Translate a tensor's name in a fair-esm ESM-2 checkpoint.

    >>> fair_esm_to_hf("encoder.sentence_encoder.layers.3.self_attn.k_proj.weight")
    'esm.encoder.layer.3.attention.self.key.weight'
    """
    bare = re.sub(r"^encoder\.(sentence_encoder\.)?", "", name)
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)\.(\w+)", bare):
        index, inner, leaf = found.groups()
        return f"esm.encoder.layer.{index}.{_BLOCK.get(inner, inner)}.{leaf}"
    for old, new in _OUTSIDE.items():
        if bare.startswith(old):
            return new + bare.removeprefix(old)
    return "lm_head.decoder.weight" if bare == "lm_head.weight" else bare
