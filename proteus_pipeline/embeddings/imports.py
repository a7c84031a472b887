"""Embeddings that other programs computed and wrote to files; what is read here is checked for its form, and no more.

No path here runs code from a file: a ``.npz`` is read without pickles, a ``.pt`` weights-only.
"""

from __future__ import annotations

import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from proteus_pipeline.embeddings.writers import FAIR_ESM_FIELDS
from proteus_pipeline.errors import ProteusError, StorageError
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST = 2 << 30
"""Bytes of one array: titin's 35,000 residues of 15,000 numbers. A file that promises more is not believed."""
_GIVE_NPZ = "give one array an id, (D,) or (L, D), of floating-point numbers"
_GIVE_PT = "give a folder of ID.pt as fair-esm's extract.py writes them"
_POOLINGS = {field: pooling for pooling, field in FAIR_ESM_FIELDS.items()}


class Imported(NamedTuple):
    """One embedding from a file.

    Attributes
    ----------
    id
        Its sequence's.
    array
        fp32, (D,) or (L, D), every value finite.
    layer, pooling
        As in a recipe; None where the file does not say.

    """

    id: str
    array: NDArray[np.float32]
    layer: int | None
    pooling: str | None


def read_npz(path: Path) -> Iterator[Imported]:
    """Yield the arrays of a ``.npz`` by their names, holding one at a time.

    It does not say which layer they are of, and of their pooling only whether there is any.

    Raises
    ------
    StorageError
        While iterating: when the file can't be read, or holds anything but embeddings.

    """
    width: int | None = None
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            _check_names(path, [m.filename for m in members])
            for info in members:
                name = info.filename.removesuffix(".npy")
                with file.open(info) as member:
                    array = _checked(_read_npy(member, info.file_size), width, f"{shown(name)} in {path}", _GIVE_NPZ)
                width = array.shape[-1]
                yield Imported(name, array, None, "per_residue" if array.ndim == 2 else None)
    except ProteusError:
        raise
    except OSError as error:
        raise storage_error("read", path, error) from error
    except Exception as error:  # a damaged archive fails in any way that zlib's and numpy's steps can
        raise StorageError(f"{path} is no .npz of embeddings ({_reason(error)})", _GIVE_NPZ) from error


def _check_names(path: Path, names: list[str]) -> None:
    if not names:
        raise StorageError(f"{path} holds no arrays", _GIVE_NPZ)
    for name, times in Counter(names).items():
        if times > 1 or not name.endswith(".npy") or name == ".npy":
            raise StorageError(
                f"{path} holds {shown(name)}, {'twice' if times > 1 else 'which is no array'}", _GIVE_NPZ
            )


def _read_npy(member: IO[bytes], size: int) -> NDArray[Any]:
    """Read an array whose header agrees with its size; numpy would first make the array that a header asks for."""
    import numpy as np

    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in readers:
        raise ValueError(f"an array in .npy format {version[0]}.{version[1]}")
    shape, fortran, dtype = readers[version](member)
    count = 1
    for extent in shape:
        count *= extent
    nbytes = count * dtype.itemsize
    if dtype.kind != "f":
        raise ValueError(f"an array of {dtype}")
    if nbytes > LARGEST or member.tell() + nbytes != size:
        raise ValueError(f"an array that says it is {shape}, in {size:,} bytes")
    return np.frombuffer(member.read(), dtype).reshape(shape, order="F" if fortran else "C")


def read_pt(path: Path) -> Iterator[Imported]:
    """Yield what fair-esm's extract.py wrote to a folder: each pooling and layer that each file has, file after file.

    An id is a label's first word, as everywhere here; fair-esm's labels are whole FASTA headers.

    Raises
    ------
    StorageError
        While iterating: when the folder or a file can't be read, or a file is another program's or asks to run code.

    """
    if not path.is_dir():
        raise StorageError(f"{path} is no folder", _GIVE_PT)
    # A label with a slash makes a folder below.
    files = sorted(p for p in path.rglob("*.pt") if p.is_file())
    if not files:
        raise StorageError(f"{path} holds no .pt files", _GIVE_PT)
    width: int | None = None
    seen: dict[str, Path] = {}
    for file in files:
        name, found = _read_extracted(file)
        if name in seen:
            raise StorageError(f"{file} and {seen[name]} are both of {shown(name)}", "remove one of them")
        seen[name] = file
        for pooling, layer, tensor in found:
            array = _checked(_to_numpy(tensor, file), width, str(file), _GIVE_PT)
            if array.ndim != (2 if pooling == "per_residue" else 1):
                raise StorageError(f"{file} holds {array.shape} as {FAIR_ESM_FIELDS[pooling]}", _GIVE_PT)
            width = array.shape[-1]
            yield Imported(name, array, layer, pooling)


def _read_extracted(path: Path) -> tuple[str, list[tuple[str, int, Any]]]:
    """Return a file's id, and pooling, layer and tensor of each of its representations."""
    value = _load(path)
    label = value.get("label") if isinstance(value, dict) else None
    if not isinstance(label, str) or not label.split():
        raise StorageError(f"{path} has no label", _GIVE_PT)
    found = []
    for field, pooling in _POOLINGS.items():
        layers = value.get(field, {})
        if not isinstance(layers, dict) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise StorageError(f"{path} has {field} that are not by layer", _GIVE_PT)
        found += [(pooling, layer, layers[layer]) for layer in sorted(layers)]
    if not found:
        raise StorageError(f"{path} holds no representations", _GIVE_PT)
    return label.split()[0], found


def _load(path: Path) -> Any:
    import torch

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                # torch stores as it is; a compressed member could be a thousand times as large as the file.
                if any(i.compress_type != zipfile.ZIP_STORED for i in file.infolist()):
                    raise ValueError("it is compressed")  # noqa: TRY301 - told as the others are
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the error then says
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise storage_error("read", path, error) from error
    except Exception as error:  # a damaged pickle fails in any way that the unpickler's steps can
        raise StorageError(
            f"{path} can't be read without running its code ({_reason(error)})", f"remove it, or {_GIVE_PT}"
        ) from error


def _to_numpy(value: Any, path: Path) -> NDArray[Any]:
    import torch

    # A view may say that it is larger than the memory it is of.
    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.device.type != "cpu"
        or not value.dtype.is_floating_point
        or value.numel() * value.element_size() > min(LARGEST, value.untyped_storage().nbytes())
    ):
        raise StorageError(f"{path} holds a representation that is no tensor of floating-point numbers", _GIVE_PT)
    array: NDArray[Any] = value.detach().to(torch.float32).contiguous().numpy()
    return array


def _checked(array: NDArray[Any], width: int | None, where: str, remedy: str) -> NDArray[np.float32]:
    """Return an array as fp32 of its own, when it is an embedding as wide as the others."""
    import numpy as np

    if array.ndim not in {1, 2} or 0 in array.shape:
        raise StorageError(f"{where} is an array of shape {array.shape}", remedy)
    if width is not None and array.shape[-1] != width:
        raise StorageError(f"{where} is {array.shape[-1]} wide, and those before it {width}", "give each its own file")
    with np.errstate(over="ignore"):
        values = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(values).all():
        raise StorageError(f"{where} has values that are not finite", "compute it again")
    return values


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
