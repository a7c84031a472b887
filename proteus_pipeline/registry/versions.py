"""The registry: model versions as annotated git tags that point to DVC-tracked weights.

What changes a registry is imported when it is asked for: most processes only look a version up and map its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.identity.names import Reference, Version, check_name
from proteus_pipeline.registry.home import scratch_folder
from proteus_pipeline.registry.lookup import VersionLookup
from proteus_pipeline.registry.places import DEFAULT_HOME
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.records import json_like
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.weights import DvcCache

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint
    from proteus_pipeline.registry.activity import VersionMetrics
    from proteus_pipeline.registry.compatibility import Compatibility
    from proteus_pipeline.registry.differences import VersionDifference
    from proteus_pipeline.registry.registering import RegistrableModel
    from proteus_pipeline.registry.retirement import Deletion
    from proteus_pipeline.registry.verification import Finding

MAX_VERSIONS = 10


class ModelVersionManager(VersionLookup):
    """The registry of one repository: a project's own, or a home of its own.

    Parameters
    ----------
    storage_path
        A folder in a git repository with DVC. When it does not exist, the first registration creates it, as a
        repository with a first commit.
    backup_enabled
        Whether a version is backed up, and the backup read back, before it is deleted.
    max_versions
        How many live versions a model may have: the oldest that nothing needs are deleted, with a warning that names
        them. None for no limit.
    metadata_schema
        A JSON Schema for the metadata of new versions: a mapping, a file, or ``"protein-model"`` for the one that comes
        with this package. None takes any metadata.

    Raises
    ------
    ConfigError
        For a limit below 1, or a schema that is none.
    StorageError
        When `storage_path` is a file, or a folder outside git that holds something.

    Examples
    --------
    `weights` and `tuned` are two fair-esm checkpoints of one model here, and `folder` an empty folder.

    >>> from proteus_pipeline import ModelInterface, VersionConflictError
    >>> manager = ModelVersionManager(folder / "versions")
    >>> first = manager.register_version(ModelInterface("lab/esm2", weights=weights), "1.0.0", {"training_data": "UR50D"})
    >>> second = manager.register_version(ModelInterface("lab/esm2", weights=tuned), bump="auto", reason="two more epochs")
    >>> [v.reference for v in manager.list_versions("lab/esm2")], second.current
    (['lab/esm2@v1.0.0', 'lab/esm2@v1.1.0'], True)
    >>> second.record.compatibility["level"], manager.diff(first.reference, second.reference).tensors[0].kind
    ('minor', 'changed')
    >>> manager.rollback("lab/esm2", "1.0.0", reason="1.1.0 loses membrane proteins").current
    True
    >>> deletion = manager.delete_version("lab/esm2", "1.1.0")
    >>> manager.restore_version("lab/esm2", "1.1.0").reference
    'lab/esm2@v1.1.0'
    >>> [(e.kind, e.version) for e in manager.history("lab/esm2").events][2:]
    [('made current', '1.0.0'), ('deleted', '1.1.0'), ('restored', '1.1.0')]
    >>> try:
    ...     manager.register_version(ModelInterface("lab/esm2", weights=tuned), "1.0.0")
    ... except VersionConflictError as error:
    ...     print(error.exit_code, error.remedy)
    5 register these as a new version
    >>> manager.verify()
    []

    """

    def __init__(
        self,
        storage_path: str | Path = DEFAULT_HOME,
        backup_enabled: bool = True,
        max_versions: int | None = MAX_VERSIONS,
        metadata_schema: str | Path | Mapping[str, Any] | None = None,
    ) -> None:
        if max_versions is not None and (
            not isinstance(max_versions, int) or isinstance(max_versions, bool) or max_versions < 1
        ):
            raise ConfigError(f"max_versions is {max_versions!r}", "use 1 or more, or None for no limit")
        super().__init__(Path(storage_path))
        self.backup_enabled = backup_enabled
        self.max_versions = max_versions
        self._schema = None
        if metadata_schema is not None:
            from proteus_pipeline.registry.metadata import load_schema

            self._schema = load_schema(metadata_schema)

    # Registering

    def register_version(
        self,
        model: RegistrableModel,
        version: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        bump: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        dependencies: Sequence[str] = (),
        reason: str = "",
        breaking: str = "",
        tolerance: float | None = None,
        on_branch: bool = False,
        stored: tuple[Pointer, dict[str, Any]] | None = None,
    ) -> ModelVersion:
        """Store a model's weights and tag them.

        The tag points to HEAD when HEAD holds the pointer to these weights already, else to a new commit that only the
        tag reaches; branch, index and working tree stay as they are. Registering the same weights under the same
        version again changes nothing.

        Parameters
        ----------
        model
            A name, and weights: ``ModelInterface(name, weights=PATH)``.
        version
            SemVer; None with `bump`.
        metadata, configuration
            JSON-like values to keep in the record.
        bump
            ``major``, ``minor``, ``patch``: the number after the greatest there ever was, refused where the measured
            drift asks for more; or ``auto``, which takes what it asks for.
        dependencies
            References of versions this one builds on; floating ones are recorded as what they mean now.
        reason, breaking
            Words for the history; `breaking` says what a MAJOR version breaks.
        tolerance
            The drift that a PATCH may have: `proteus_pipeline.registry.compatibility`. Once declared, it holds for the
            model's later versions, and every registration is measured against it.
        on_branch
            Advance the checked-out branch as well, index and working tree included.
        stored
            What `store_weights` returned, where it has stored these weights already.

        Returns
        -------
        ModelVersion
            The version as it stands in the registry.

        Raises
        ------
        InvalidVersionError
            For a name or version that breaks the grammar.
        ConfigError
            When neither or both of `version` and `bump` are given, or metadata or configuration is not JSON-like.
        MetadataError
            When the metadata break the schema.
        VersionNotFoundError
            When a dependency is not registered.
        VersionConflictError
            When the version exists with other weights, or other metadata where some is given, or depends on itself.
        CompatibilityError
            When a declared tolerance does not allow the version's number.
        StorageError
            When the weights can't be read or stored.

        """
        from proteus_pipeline.registry.registering import Request, number_of, register

        json_like({"reason": reason, "breaking": breaking}, "reason")
        number = number_of(version, bump)
        request = Request(
            name=check_name(model.name),
            number=number,
            bump=bump,
            metadata=self._metadata(metadata),
            configuration=json_like(configuration or {}, "configuration"),
            dependencies=dependencies,
            reason=reason,
            breaking=breaking,
            tolerance=tolerance,
            on_branch=on_branch,
            stored=stored,
        )
        return register(self, request, model)

    def _metadata(self, metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
        plain = None if metadata is None else json_like(metadata, "metadata")
        if self._schema is not None:
            from proteus_pipeline.registry.metadata import check_metadata

            check_metadata(plain or {}, self._schema)
        return plain

    def store_weights(self, name: str, checkpoint: Checkpoint) -> tuple[Pointer, dict[str, Any]]:
        """Put the canonical folder into the DVC cache; return its pointer, and what a record says of it."""
        from proteus_pipeline.models.folder import write_folder

        root = self.ensure_home().root
        with scratch_folder(root, "register") as folder:
            write_folder(checkpoint, folder)
            stored = DvcCache(root).add_folder(folder, name, ours=True)
        p = stored.pointer
        return p, {"md5": p.md5, "sha256": stored.sha256, "size": p.size, "files": p.files}

    # Comparing

    def diff(self, old: str, new: str) -> VersionDifference:
        """Compare two versions: records, and tensors of which only those that differ are read.

        Raises
        ------
        VersionNotFoundError, StorageError, IntegrityError
            As `resolve` and `ModelVersion.checkpoint`.

        """
        from proteus_pipeline.registry.differences import compare_versions

        return compare_versions(self.resolve(old), self.resolve(new))

    def check(self, old: str, new: str, *, tolerance: float | None = None) -> Compatibility:
        """Measure how far one version is from another, on a panel of proteins, and what SemVer step that asks for.

        Raises
        ------
        VersionNotFoundError, StorageError, IntegrityError
            As `resolve` and `ModelVersion.checkpoint`.

        """
        from proteus_pipeline.registry.compatibility import measure_versions

        return measure_versions(self.resolve(old), self.resolve(new), tolerance)

    # Changing what is there: each an event, never a rewrite

    def rollback(self, model_name: str, version: str, *, reason: str = "") -> ModelVersion:
        """Make a version current, once its weights are here and whole.

        Raises
        ------
        VersionNotFoundError
            When there is no such version, or it was deleted.
        StorageError, IntegrityError
            When its weights can't be had, or are not what its record says; what was current stays so.

        """
        from proteus_pipeline.registry import retirement

        return retirement.make_current(self, model_name, version, reason=reason)

    def delete_version(self, model_name: str, version: str, *, reason: str = "", force: bool = False) -> Deletion:
        """Delete a version: a backup first, then an event; its tag, and so its number, stay taken.

        Deleting it again completes a deletion that was interrupted, and otherwise changes nothing.

        Raises
        ------
        VersionNotFoundError
            When it was never registered.
        VersionConflictError
            When it is current, a version depends on it, or conf/, params.yaml, models.lock or dvc.lock records it at any
            branch or tag; `force` deletes it all the same.
        StorageError, IntegrityError
            When it can't be backed up; nothing is deleted then.

        """
        from proteus_pipeline.registry import retirement

        name, number = _checked(model_name, version)
        return retirement.delete(self, name, number, reason=reason, force=force)

    def plan_deletion(self, model_name: str, version: str) -> Deletion:
        """Return what `delete_version` would do."""
        from proteus_pipeline.registry import retirement

        name, number = _checked(model_name, version)
        return retirement.plan(self, self.history(name), [number])[0]

    def restore_version(self, model_name: str, version: str, *, reason: str = "") -> ModelVersion:
        """Bring a deleted version back, to the bit; what is current stays so.

        Raises
        ------
        VersionNotFoundError
            When it was never registered.
        StorageError, IntegrityError
            When its weights can't be had, or are not what its record says.

        """
        from proteus_pipeline.registry import retirement

        name, number = _checked(model_name, version)
        return retirement.restore(self, name, number, reason=reason)

    def prune(self, model_name: str, keep: int, *, reason: str = "", dry_run: bool = False) -> list[Deletion]:
        """Delete the oldest versions that nothing needs until `keep` are left.

        Raises
        ------
        ConfigError
            For fewer than one.
        VersionNotFoundError
            When there is no such model.
        StorageError, IntegrityError
            As `delete_version`.

        """
        from proteus_pipeline.registry import retirement

        name = check_name(model_name)
        if keep < 1:
            raise ConfigError(f"keep is {keep}", "keep 1 or more")
        if not self.history(name).live:
            raise self.not_found(self.history(name), "at all")
        if dry_run:
            return retirement.plan_retirement(self, name, keep)
        return retirement.retire(self, name, keep, reason=reason or f"pruned to {keep}")

    def adopt(self, model_name: str, version: str, *, reason: str = "") -> ModelVersion:
        """Give a version that ``gto register`` or a person tagged the record that ours have.

        Raises
        ------
        VersionNotFoundError, VersionConflictError, ModelError
            As `proteus_pipeline.registry.adoption.adopt`.

        """
        from proteus_pipeline.registry.adoption import adopt

        return adopt(self, *_checked(model_name, version), reason=reason)

    def verify(self, reference: str | None = None, *, repair: bool = False, deep: bool = False) -> list[Finding]:
        """Check tags, records, pointers, objects, digests, remotes, backups and dependencies; an empty list is sound.

        Parameters
        ----------
        reference
            A version, or None for all.
        repair
            Mend what can be mended; what is damaged goes to quarantine, and nothing is deleted.
        deep
            Read and hash the copies on remotes as well, which otherwise are asked for their size.

        Raises
        ------
        VersionNotFoundError
            When there is no such version.

        """
        from proteus_pipeline.registry.verification import DAMAGED, Verification

        wanted = None
        if reference is not None:
            parsed = Reference.parse(reference)
            known = self.history(parsed.name)
            # Of a model whose versions are all deleted, there are backups to look at.
            deleted = parsed.name if known.known and not known.live else None
            wanted = str(parsed) if parsed.exact else deleted or self.resolve(reference).reference
            if parsed.exact and parsed.selector not in self.history(parsed.name).known:
                raise self.not_found(self.history(parsed.name), f"v{parsed.selector}")
        findings = list(Verification(self, wanted, repair=repair, deep=deep).findings())
        if damaged := sum(finding.kind == DAMAGED for finding in findings):
            self.count("proteus_integrity_findings_total", damaged, of="versions")
        return findings

    def metrics(self) -> VersionMetrics:
        """Return how the registry was used: registrations, conflicts, rollbacks, deletions, bytes."""
        from proteus_pipeline.registry.activity import measure_activity

        return measure_activity(self.root, self.histories())

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Count what leaves no tag, by the name of its metric."""
        from proteus_pipeline.registry.activity import count_event

        count_event(self.root, name, value, **labels)


def _checked(name: str, version: str) -> tuple[str, str]:
    return check_name(name), Version.parse(version).text
