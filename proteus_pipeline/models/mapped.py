"""A version's tensors, memory-mapped from their shards, and each checked the first time it is touched.

The chain of trust is: the tag's record -> a component's digest -> its tensors' digests (digests.json) -> a tensor's
bytes. Opening follows it down to the tensors' digests, and reads a few kilobytes however large the model is; touching a
tensor follows it to the end. So nothing is served that the record does not vouch for, and nothing is read in vain.

A tensor may also be used where it lies, for as long as somebody likes: memory that need not be filled, and that processes
share. What was checked once has to stay what it was: so it is only done where nobody may write to the file and where a
removed file stays readable; and who computes with it asks afterwards whether the file is still as it was.
"""

from __future__ import annotations

import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from proteus_pipeline.errors import IntegrityError, ModelError
from proteus_pipeline.identity import digests
from proteus_pipeline.models.checkpoint import (
    Checkpoint,
    FilesInUse,
    KnownTensors,
    component_digests,
    dtype_name,
    tensor_bytes,
)
from proteus_pipeline.models.folder import ALIGNMENT
from proteus_pipeline.models.reading import (
    DIGESTS,
    DIGESTS_SCHEMA,
    INDEX,
    read_architecture,
    read_files,
    read_json,
    read_weight_map,
)
from proteus_pipeline.stores.files import OpenFile, stays_mapped

if TYPE_CHECKING:
    import torch

_NO_LONGER = "it is no longer the file that was opened"
# Files that are used in place.
_LYING: WeakSet[OpenFile] = WeakSet()
_ENTERING = threading.Lock()
_MOST_LYING = 400
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_DIGEST = re.compile(r"[0-9a-f]{32}")
# What a reader of well-formed files raises on bytes that have changed since: a wrong value, type, key or size.
_UNREADABLE = (ValueError, ArithmeticError, KeyError, TypeError)


def open_mapped(files: Mapping[str, Path], components: Mapping[str, str], origin: str, remedy: str) -> Checkpoint:
    """Open a canonical folder without reading its tensors; each is read, and checked, when it is first touched.

    A folder that has no digests.json, an older one or another program's, is read whole and checked at once.

    Parameters
    ----------
    files
        The folder's files' places by their names in it.
    components
        Each component's digest by its name, from the version's record: what everything here is held to.
    origin
        What to call the folder in an error.
    remedy
        What to do when it is damaged.

    Raises
    ------
    IntegrityError
        When the folder is not what `components` say; later, from a touch, when a tensor is not.

    """
    try:
        if DIGESTS not in files:
            checkpoint = read_files(files, origin)
        else:
            architecture = read_architecture(files, origin)
            known, shards = _read_digests(files[DIGESTS]), read_weight_map(files, origin)
            checkpoint = Checkpoint(architecture, MappedTensors(files, shards, known, origin, remedy))
            if odd := sorted(shards.keys() ^ known.keys()):
                raise ValueError(f"{odd[0]} is in one of {INDEX} and {DIGESTS} only")
        found = component_digests(checkpoint.architecture, checkpoint.tensor_digests)
    except _UNREADABLE as error:
        raise IntegrityError(f"{origin} is damaged ({_line(error)})", remedy) from error
    if found != dict(components):
        changed = sorted(name for name in found.keys() | components.keys() if found.get(name) != components.get(name))
        raise IntegrityError(f"{origin} is damaged ({', '.join(changed)})", remedy)
    return checkpoint


class MappedTensors(KnownTensors):
    """Tensors in the shards of a folder, by canonical name.

    Nothing locks: two threads that touch one tensor at once may both check it, and both get the one that was kept
    first.
    """

    def __init__(
        self, files: Mapping[str, Path], shards: Mapping[str, str], known: dict[str, str], origin: str, remedy: str
    ) -> None:
        self.digests = known
        self._files, self._shards = files, shards
        self._origin, self._remedy = origin, remedy
        self._open: dict[str, tuple[Any, int]] = {}
        self._checked: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._checked.get(name)
        if tensor is not None:
            return tensor
        if name not in self.digests:
            raise KeyError(name)
        return self._checked.setdefault(name, self._sound(name, self._read(name, self._map)))

    def in_place(self, name: str, in_use: FilesInUse) -> torch.Tensor | None:
        """Return a tensor to be used where it lies in its file, however long: fp32 that begins at a multiple of 64 bytes.

        None where it has to be copied: it does not begin there, or the file is somebody's to write or on a file system that may
        take it away.

        Raises
        ------
        IntegrityError
            When it is not what the record says.

        """
        import torch

        shard = self._shards[name]
        path = self._files[shard]
        # Mappings of their own, so that pages of what is copied can be let go.
        if path not in in_use.opened:
            in_use.opened[path] = _opened(path)
        opened = in_use.opened[path]
        if opened is None:
            return None
        mapping, file = opened
        if not file.is_unchanged():
            raise self._damaged(name, _NO_LONGER)  # a page beyond the end of a file that was cut would end the process
        tensor = self._read(name, mapping.get_tensor)
        if tensor.dtype != torch.float32 or tensor.data_ptr() % ALIGNMENT:
            return None
        in_use.add(
            file, f"{self._origin} was changed while it was in use ({shard})", f"{self._remedy}, and load it again"
        )
        return self._sound(name, tensor)

    def __contains__(self, name: object) -> bool:
        return name in self.digests  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.digests)

    def __len__(self) -> int:
        return len(self.digests)

    def let_go(self) -> None:
        self._checked.clear()
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_checked": {}}  # a copy opens its own

    def _read(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        try:
            return read(name)
        except Exception as error:  # a changed header fails in any way that its reader can
            raise self._damaged(name, _line(error)) from error

    def _sound(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that is held to its digest."""
        expected = self.digests[name]
        try:
            found = digests.of_tensor(dtype_name(tensor), tuple(tensor.shape), tensor_bytes(tensor))
        except ModelError as error:  # of a dtype that no version has
            raise self._damaged(name, _line(error)) from error
        if found != expected:
            raise self._damaged(name, f"its digest is {found}, recorded {expected}")
        return tensor

    def _map(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        shard = self._shards[name]
        path = self._files[shard]
        opened = self._open.get(shard)  # another thread may let go meanwhile
        if opened is None:
            opened = self._open[shard] = (safe_open(path, framework="pt"), path.stat().st_size)
        file, size = opened
        # A page beyond the end of a file that was cut while it was mapped would end the process.
        if path.stat().st_size != size:
            raise ValueError(_NO_LONGER)
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def _damaged(self, name: str, reason: str) -> IntegrityError:
        shard = self._shards[name]
        self._open.pop(shard, None)  # so that the next touch finds a shard that was mended meanwhile
        return IntegrityError(f"{self._origin} is damaged ({name} in {shard}: {reason})", self._remedy)


def _opened(path: Path) -> tuple[Any, OpenFile] | None:
    """Return a shard mapped for tensors that are used in place, and its file; None where none may be."""
    from safetensors import SafetensorError, safe_open

    try:
        file = OpenFile(path)
        if file.status.st_mode & _WRITABLE or not stays_mapped(file.status.st_dev):
            return None
        with _ENTERING:
            if len(_LYING) >= _most_lying():
                return None
            _LYING.add(file)
        mapping = safe_open(path, framework="pt")
        return (mapping, file) if file.is_at(path) else None
    except (SafetensorError, OSError, RuntimeError):
        return None  # who copies it says what is wrong


def _most_lying() -> int:
    """Return how many files may be used in place, and so stay open: as many as leave a process its connections."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_LYING if soft < 0 else min(_MOST_LYING, soft // 3)  # -1 is no limit


def _read_digests(path: Path) -> dict[str, str]:
    value = read_json(path)
    if value.get("schema") != DIGESTS_SCHEMA:
        raise ValueError(f"{DIGESTS} is of schema {value.get('schema')!r}, and this proteus reads {DIGESTS_SCHEMA}")
    tensors = value.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in tensors.values()):
        raise ValueError(f"{DIGESTS} has no tensors' digests")
    return dict(sorted(tensors.items()))


def _line(error: Exception) -> str:
    what = getattr(error, "what", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(what).split())[:200]
