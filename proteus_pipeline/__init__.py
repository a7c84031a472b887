"""git for protein language models, and a memory for what they computed.

The public names live in their rooms and are imported when first used: ``proteus --help`` loads neither torch nor DVC.
"""

from __future__ import annotations

# typing takes 5 ms to import, a tenth of what a quick command may take; type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.manifest import load_embeddings
    from proteus_pipeline.errors import (
        CacheInvalidationError,
        CacheMemoryError,
        ClusterError,
        CompatibilityError,
        ConfigError,
        FormatError,
        IntegrityError,
        InvalidVersionError,
        MetadataError,
        ModelError,
        ProteusError,
        SequenceError,
        StaleLockError,
        StorageError,
        VersionConflictError,
        VersionNotFoundError,
    )
    from proteus_pipeline.registry.distributed import DistributedVersionManager
    from proteus_pipeline.registry.versions import ModelVersionManager
    from proteus_pipeline.serving.interface import ModelInterface
    from proteus_pipeline.serving.model_cache import ModelCacheManager

_HOMES = {
    "DistributedVersionManager": "registry.distributed",
    "EmbeddingCache": "embeddings.cache",
    "ModelCacheManager": "serving.model_cache",
    "ModelInterface": "serving.interface",
    "ModelVersionManager": "registry.versions",
    "load_embeddings": "embeddings.manifest",
}

__all__ = [
    "CacheInvalidationError",
    "CacheMemoryError",
    "ClusterError",
    "CompatibilityError",
    "ConfigError",
    "DistributedVersionManager",
    "EmbeddingCache",
    "FormatError",
    "IntegrityError",
    "InvalidVersionError",
    "MetadataError",
    "ModelCacheManager",
    "ModelError",
    "ModelInterface",
    "ModelVersionManager",
    "ProteusError",
    "SequenceError",
    "StaleLockError",
    "StorageError",
    "VersionConflictError",
    "VersionNotFoundError",
    "load_embeddings",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
