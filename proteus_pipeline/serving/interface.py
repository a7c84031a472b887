"""A model in this process: a registered version, or weights that are not registered yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import SequenceError
from proteus_pipeline.identity.names import Reference, check_name
from proteus_pipeline.models.architecture import resolve_layer
from proteus_pipeline.models.encoder import Esm2Encoder
from proteus_pipeline.models.pooling import pool
from proteus_pipeline.registry.home import registry_home
from proteus_pipeline.registry.versions import ModelVersion, ModelVersionManager
from proteus_pipeline.sequences.rules import Rules, normalise

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from proteus_pipeline.models.checkpoint import Checkpoint


class ModelInterface:
    """A model by name; nothing is read until it is used.

    Parameters
    ----------
    name
        A reference to a registered version (``esm2``, ``esm2@v1.0.0``), or, with `weights`, the name to register
        under.
    version_manager
        The registry; by default the project's, or ``~/.proteus/versions`` outside a project.
    weights
        A fair-esm ``.pt``, a Hugging Face folder, or one of its weight files.

    Raises
    ------
    InvalidVersionError
        When the name breaks the grammar.

    """

    def __init__(
        self, name: str, version_manager: ModelVersionManager | None = None, *, weights: str | Path | None = None
    ) -> None:
        self._reference = Reference.parse(name)
        self.name = check_name(self._reference.name)
        self._weights = Path(weights).expanduser() if weights is not None else None
        self._manager = version_manager

    @cached_property
    def version(self) -> ModelVersion | None:
        """The version the reference means, resolved once; None for weights that are not registered."""
        if self._weights is not None:
            return None
        manager = self._manager or ModelVersionManager(registry_home())
        return manager.resolve(str(self._reference))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors, memory-mapped where the file allows it."""
        if self.version is not None:
            return self.version.checkpoint
        from proteus_pipeline.models.reading import read_checkpoint

        assert self._weights is not None  # noqa: S101 - version is None only then
        return read_checkpoint(self._weights)

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the weights came from, for a version's record; without this machine's folders."""
        return {"origin": self._weights.name} if self._weights is not None else {}

    def encoder(self, *, precision: str = "fp32", numerics: str = "strict", device: str = "cpu") -> Esm2Encoder:
        """Return an encoder over the weights."""
        return Esm2Encoder(self.checkpoint, precision=precision, numerics=numerics, device=device)

    def embed(
        self, sequences: Sequence[str], *, layer: int = -1, pooling: str = "mean", **options: str
    ) -> list[NDArray[np.float32]]:
        """Compute embeddings here and now, without the cache.

        Parameters
        ----------
        sequences
            Amino acids, in either case; normalised as the config's defaults do, and embedded whole however long.
        layer
            0 to the number of layers, or negative from the end.
        pooling
            ``mean``, ``cls``, ``max`` or ``per_residue``.
        options
            ``precision``, ``numerics``, ``device``, as for `encoder`.

        Returns
        -------
        list of NDArray
            (D,) fp32 each, or (L, D) per residue, in the order of `sequences`.

        Raises
        ------
        SequenceError
            For one text instead of a list of them, or a sequence that is none: `proteus_pipeline.sequences.rules`.
        ConfigError
            For a layer that the model does not have.

        """
        if isinstance(sequences, str):
            raise SequenceError("embed was given one text, not a list of sequences", "write embed([SEQUENCE])")
        rules = Rules(long="window")
        read = [normalise(s, rules, f"sequence {number}") for number, s in enumerate(sequences, 1)]
        index = resolve_layer(layer, self.checkpoint.architecture.layers)
        encoder = self.encoder(**options)
        found = {i: pool(hidden[index], pooling) for i, hidden in encoder.encode(read, [index])}
        return [found[i] for i in range(len(read))]

    def to_fair_esm(self) -> tuple[torch.nn.Module, Any]:
        """Return the weights as fair-esm's ``(model, alphabet)``, for code written against fair-esm."""
        from proteus_pipeline.models.fair_esm import to_fair_esm

        return to_fair_esm(self.checkpoint)
