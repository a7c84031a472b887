"""The official ESM-2 models, for a user who has no project and so no conf/model: the same facts, in code."""

from __future__ import annotations

from pathlib import Path

from proteus_pipeline.models.mirrors import FAIR_ESM
from proteus_pipeline.models.sources import FairEsmSource, ModelEntry, load_catalogue

# Layers and size of each, as its name says them (esm/pretrained.py).
_ESM2 = ((6, "8M"), (12, "35M"), (30, "150M"), (33, "650M"), (36, "3B"), (48, "15B"))


def official_catalogue() -> dict[str, ModelEntry]:
    """Return what conf/model/ says of fair-esm's ESM-2 checkpoints, by model name.

    The addresses are fair-esm's own; the environment's PROTEUS_FAIR_ESM_URL puts a mirror in their place when they are
    fetched: `mirrors.mirrored`.
    """
    return {entry.name: entry for entry in (_entry(layers, size) for layers, size in _ESM2)}


def catalogue_at(root: Path) -> dict[str, ModelEntry]:
    """Return the official models, and those of conf/model/ where `root` is a project that has it; these come first.

    Raises
    ------
    ConfigError
        When a file there is not as it should be.

    """
    folder = root / "conf" / "model"
    return official_catalogue() | (load_catalogue(folder) if folder.is_dir() else {})


def _entry(layers: int, size: str) -> ModelEntry:
    name = f"esm2_t{layers}_{size}_UR50D"
    source = FairEsmSource(f"{FAIR_ESM}/models/{name}.pt", f"{FAIR_ESM}/regression/{name}-contact-regression.pt")
    description = f"ESM-2 with {layers} layers and {size} parameters, trained on UniRef50 (Lin et al. 2023)"
    return ModelEntry(name, description, "MIT", {"1.0.0": source}, Path(__file__))
