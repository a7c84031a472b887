"""Every error this package raises on purpose, in one small tree.

::

    ProteusError
    ├── ConfigError             (ValueError)    exit 2   a setting is unknown, missing, or of the wrong type
    ├── SequenceError           (ValueError)    exit 1   a FASTA file, a sequence, or labels can't be used as they are
    ├── ModelError              (ValueError)    exit 1   weights that are no model this package knows
    ├── MetadataError           (ValueError)    exit 2   metadata that is not as its schema asks
    ├── InvalidVersionError     (ValueError)    exit 2   a model name, version or reference that breaks the grammar
    ├── VersionNotFoundError    (LookupError)   exit 1   no such model or version
    ├── VersionConflictError    (ValueError)    exit 5   a version that exists with other weights or metadata
    ├── CompatibilityError      (ValueError)    exit 3   a version's number promises more than its measured drift keeps
    ├── StaleLockError          (RuntimeError)  exit 3   models.lock does not say what the run would use
    ├── StorageError            (OSError)       exit 1   bytes could not be read, fetched or written
    │   └── IntegrityError                      exit 4   bytes are there, and are not what their digest says
    │       └── FormatError                     exit 4   a file is of another version of its format
    ├── ClusterError            (RuntimeError)  exit 1   a cluster could not be had, or not compute all it was given
    ├── CacheMemoryError        (MemoryError)   exit 1   a model does not fit in the memory it may use
    └── CacheInvalidationError  (RuntimeError)  exit 1   an invalidation could not be carried out

Each says what happened and what to do next, in one line: ``what; remedy``.
"""

from __future__ import annotations


class ProteusError(Exception):
    """The root of the tree.

    Parameters
    ----------
    what
        What happened, with the name of the thing it happened to.
    remedy
        What the reader can do about it.

    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what

    def __reduce__(self) -> tuple[type[ProteusError], tuple[str, str]]:
        # OSError would otherwise read the two strings as errno and strerror when it is unpickled.
        return type(self), (self.what, self.remedy)


class ConfigError(ProteusError, ValueError):
    """A setting is unknown, missing, or of the wrong type."""

    exit_code = 2


class SequenceError(ProteusError, ValueError):
    """A FASTA file, a sequence, or labels can't be used as they are."""


class ModelError(ProteusError, ValueError):
    """Weights that are no model this package knows how to run."""


class MetadataError(ProteusError, ValueError):
    """Metadata that is not as its schema asks."""

    exit_code = 2


class InvalidVersionError(ProteusError, ValueError):
    """A model name, version or reference that breaks the grammar."""

    exit_code = 2


class VersionNotFoundError(ProteusError, LookupError):
    """No such model, or no such version of it."""


class VersionConflictError(ProteusError, ValueError):
    """A version exists already, with other weights or other metadata."""

    exit_code = 5


class CompatibilityError(ProteusError, ValueError):
    """A version's number promises more than its measured drift keeps."""

    exit_code = 3


class StaleLockError(ProteusError, RuntimeError):
    """``models.lock`` does not say what the run would use."""

    exit_code = 3


class StorageError(ProteusError, OSError):
    """Bytes could not be read, fetched or written."""


class IntegrityError(StorageError):
    """Bytes are there, and are not what their digest says."""

    exit_code = 4


class FormatError(IntegrityError):
    """A file is of another version of its format: whoever wrote it can read it, and it is left alone."""


class ClusterError(ProteusError, RuntimeError):
    """A cluster could not be had, or did not compute all that it was given."""


class CacheMemoryError(ProteusError, MemoryError):
    """A model does not fit in the memory it may use."""


class CacheInvalidationError(ProteusError, RuntimeError):
    """An invalidation could not be carried out."""


class Terminated(KeyboardInterrupt):
    """The process was told to stop by SIGTERM, which a terminal sends to nobody: others may not have been told."""
