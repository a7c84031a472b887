"""Hiding what some weights made, from every reader at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.errors import CacheInvalidationError, StorageError

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache


def invalidate(cache: EmbeddingCache, trunk: str, reason: str, recipe: Mapping[str, Any], *, dry_run: bool) -> int:
    """Hide all entries of some weights, or of those recipes that agree in the fields given; return how many those are.

    Raises
    ------
    CacheInvalidationError
        When it can't be carried out: the entries are seen as before.

    """
    try:
        cache.refresh()
        known = [h.published for h in cache.all_segments() if h.trunk == trunk]
        event = make_event("invalidated", reason, after=max(known, default=0), trunk=trunk, recipe=recipe)
        hidden = cache.hidden_by(event)
        if hidden and not dry_run:
            write_event(cache.store, event)
    except StorageError as error:
        raise CacheInvalidationError(f"nothing was invalidated: {error.what}", error.remedy) from error
    if cache.hot and not dry_run:
        cache.hot.invalidate(trunk)
    return hidden
