"""A model in this process: a registered version, or weights that are not registered yet: a file's, or a catalogue's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError, IntegrityError, SequenceError, StorageError, VersionNotFoundError
from proteus_pipeline.identity.names import Reference, Version, check_name
from proteus_pipeline.models.architecture import Architecture, resolve_layer
from proteus_pipeline.models.device import resolve_device
from proteus_pipeline.models.encoder import TOKENS_PER_BATCH, Encoded, Encoder, Outputs, make_encoder
from proteus_pipeline.models.pooling import POOLINGS, finite, pool
from proteus_pipeline.registry.places import registry_home
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.sequences.rules import Rules, normalise

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from proteus_pipeline.models.checkpoint import Checkpoint
    from proteus_pipeline.models.sources import FetchedWeights, Source


class ModelInterface:
    """A model by name; nothing is read until it is used.

    Parameters
    ----------
    name
        A reference to a registered version (``esm2``, ``esm2@v1.0.0``), or, with `weights`, the name to register
        under. One that is not registered, and is official (``esm2_t33_650M_UR50D``) or in the project's conf/model,
        means the weights that are named there: they are fetched when they are used.
    version_manager
        The registry; by default the project's, or ``~/.proteus/versions`` outside a project.
    weights
        A fair-esm ``.pt``, a Hugging Face folder, or one of its weight files.

    Raises
    ------
    InvalidVersionError
        When the name breaks the grammar.

    """

    _precision = "fp32"  # what calls compute in that don't say

    def __init__(
        self, name: str, version_manager: ModelVersionManager | None = None, *, weights: str | Path | None = None
    ) -> None:
        self._reference = Reference.parse(name)
        self.name = check_name(self._reference.name)
        self._weights = Path(weights).expanduser() if weights is not None else None
        self._manager = version_manager

    @cached_property
    def version(self) -> ModelVersion | None:
        """The version the reference means, resolved once; None for weights that are not registered.

        Raises
        ------
        VersionNotFoundError
            When it is not registered, and no catalogue says where its weights come from.

        """
        if self._weights is not None:
            return None
        try:
            return self._registry.resolve(str(self._reference))
        except VersionNotFoundError:
            if self._listed is None:
                raise
            return None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors, memory-mapped where the file allows it.

        Raises
        ------
        VersionNotFoundError
            As `version` does.
        StorageError
            When they can't be read, or not be fetched.
        IntegrityError
            When they are not what their digests say.
        ModelError
            When what is there is no ESM-2 checkpoint.

        """
        return self.version.checkpoint if self.version is not None else self.fresh()

    @property
    def architecture(self) -> Architecture:
        """The weights' architecture; errors as `checkpoint`."""
        return self.checkpoint.architecture

    def fresh(self) -> Checkpoint:
        """Open the weights anew, as `checkpoint` does once: what it returns is nobody else's."""
        if self.version is not None:
            return self.version.fresh()
        from proteus_pipeline.models.reading import read_checkpoint

        return read_checkpoint(self.path)

    @property
    def path(self) -> Path:
        """Where weights that are not registered lie; fetches them where they do not lie anywhere yet."""
        return self._weights or self._fetched.path

    @property
    def listed(self) -> str | None:
        """Which version of a catalogue the reference means, ``NAME@vX.Y.Z``; None where no catalogue has it."""
        return f"{self.name}@v{self._listed[0]}" if self._weights is None and self._listed else None

    @property
    def source(self) -> Mapping[str, Any]:
        """Where the weights came from, for a version's record, without this machine's folders; fetches them to say so."""
        if self._weights is not None:
            return {"origin": self._weights.name}
        if self.version is not None:
            return {}
        return {"origin": self._fetched.origin, "sha256": dict(self._fetched.sha256)}

    @cached_property
    def _registry(self) -> ModelVersionManager:
        return self._manager or ModelVersionManager(registry_home())

    @cached_property
    def _listed(self) -> tuple[str, Source] | None:
        """The greatest version in a catalogue that the reference admits, and where its weights come from."""
        from proteus_pipeline.models.official import catalogue_at

        entry = catalogue_at(self._registry.root).get(self.name)
        fitting = [v for v in map(Version, entry.versions) if self._reference.selects(v)] if entry else []
        return (max(fitting).text, entry.versions[max(fitting).text]) if entry and fitting else None

    @cached_property
    def _fetched(self) -> FetchedWeights:
        from proteus_pipeline.models.sources import FileSource, fetch

        assert self._listed is not None  # noqa: S101 - version has raised otherwise
        number, source = self._listed
        # First, since a home is only created where nothing lies yet.
        self._registry.ensure_home()
        root = self._registry.root
        if isinstance(source, FileSource):
            source = FileSource(root / source.path)  # relative to the project, wherever the user stands
        try:
            return fetch(source, root / ".proteus" / "downloads" / self.name / number)
        except IntegrityError:
            raise
        except StorageError as error:
            remedy = f"{error.remedy}, or give your own: ModelInterface({self.name!r}, weights=PATH)"
            raise StorageError(error.what, remedy) from error

    def encoder(self, *, precision: str = "fp32", numerics: str = "strict", device: str = "cpu") -> Encoder:
        """Return an encoder over the weights."""
        return make_encoder(self.checkpoint, precision=precision, numerics=numerics, device=resolve_device(device))

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
            ``mean``, ``cls``, ``max``, ``attention`` or ``per_residue``.
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
            For a layer that the model does not have, or an unknown pooling.
        ModelError
            When the weights give what is no number.

        """
        read = _normalised(sequences, "embed")
        index = resolve_layer(layer, self.architecture.layers)
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling is {pooling!r}", f"use one of {', '.join(POOLINGS)}")
        outputs = Outputs.to_pool(index, pooling)
        return self._compute(read, outputs, options, lambda e: pool(e.hidden[index], pooling, e.received.get(index)))

    def logits(self, sequences: Sequence[str], **options: str) -> list[NDArray[np.float32]]:
        """Compute the language-model head's logits.

        Parameters
        ----------
        sequences, options
            As for `embed`.

        Returns
        -------
        list of NDArray
            (L + 2, V) fp32 each, in the order of ``checkpoint.architecture.tokens``; the start token's row comes first.

        Raises
        ------
        ModelError
            When the weights have no language-model head.
        SequenceError
            As `embed`.

        """
        return self._compute(_normalised(sequences, "logits"), Outputs(logits=True), options, attrgetter("logits"))

    def contacts(self, sequences: Sequence[str], **options: str) -> list[NDArray[np.float32]]:
        """Predict contacts, layer by layer: no more than some heads' attention maps are in memory at once.

        Parameters
        ----------
        sequences, options
            As for `embed`.

        Returns
        -------
        list of NDArray
            (L, L) fp32 probabilities each.

        Raises
        ------
        ModelError
            When the weights have no contact head.
        SequenceError
            As `embed`.

        """
        return self._compute(
            _normalised(sequences, "contacts"), Outputs(contacts=True), options, attrgetter("contacts")
        )

    def _compute(
        self,
        sequences: list[str],
        outputs: Outputs,
        options: Mapping[str, str],
        take: Callable[[Encoded], NDArray[np.float32]],
    ) -> list[NDArray[np.float32]]:
        """Return what is taken of each sequence's outputs, in their order; the rest is dropped as it comes."""
        precision = options.get("precision", self._precision)
        found: dict[int, NDArray[np.float32]] = {}
        # Closed, so that no thread computes on after an error, when the model may be let go.
        with (
            self._using(options, sequences, outputs) as (encoder, tokens),
            closing(encoder.compute(sequences, outputs, tokens)) as computed,
        ):
            for index, encoded in computed:
                found[index] = finite(take(encoded), precision)
        return [found[i] for i in range(len(sequences))]

    def _using(
        self,
        options: Mapping[str, str],
        sequences: Sequence[str],  # noqa: ARG002 - for whoever counts memory
        outputs: Outputs,  # noqa: ARG002
    ) -> AbstractContextManager[tuple[Encoder, int]]:
        """Return an encoder for one call, and the tokens of a batch."""
        return nullcontext((self.encoder(**options), TOKENS_PER_BATCH))

    def to_fair_esm(self) -> tuple[torch.nn.Module, Any]:
        """Return the weights as fair-esm's ``(model, alphabet)``, for code written against fair-esm."""
        from proteus_pipeline.models.fair_esm import to_fair_esm

        return to_fair_esm(self.checkpoint)


def _normalised(sequences: Sequence[str], verb: str) -> list[str]:
    """Return sequences as the config's defaults read them, whole however long."""
    if isinstance(sequences, str | bytes):
        raise SequenceError(f"{verb} was given one text, not a list of sequences", f"write {verb}([SEQUENCE])")
    rules, read = Rules(long="window"), []
    for number, sequence in enumerate(sequences, 1):
        if not isinstance(sequence, str):
            raise SequenceError(f"sequence {number} is {sequence!r}", "give each as text")
        read.append(normalise(sequence, rules, f"sequence {number}"))
    return read
