"""Reads and writes PyTorch's `.pt` and `.pth` files without PyTorch, and without running anything that is in them.

Such a file is a zip archive of raw storages and a pickle that says how tensors lie in them. The pickle is read by an
unpickler that knows a dozen names, all of them data; storages are mapped into memory and compared with the archive's
checksums when they are read.
"""

import collections
import io
import itertools
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vidar.errors import CheckpointError
from vidar.interop.sources import Stored, Tensors
from vidar.weights import whole_file

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "Float8_e4m3fnStorage": ml_dtypes.float8_e4m3fn,
    "Float8_e5m2Storage": ml_dtypes.float8_e5m2,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LOCAL_HEADER = 30
_ALIGNMENT = 64
_DAMAGED = (
    zipfile.BadZipFile,
    NotImplementedError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
)
Progress = Callable[[int], Any]  # told a number of bytes whenever so many more are done


def write_torch_file(path: str | Path, content: Mapping[str, Stored | Tensors], progress: Progress = int) -> None:
    """Writes tensors as `torch.save` would, one in memory at a time.

    Args:
        path: The file.
        content: Tensors by name, or those of several networks by the network's name, such as `generator_ema`.
        progress: Called with the number of bytes of each tensor that is written, such as `tqdm.update`.

    Raises:
        CheckpointError: It cannot be written.
    """
    values = [[entry] if isinstance(entry, Stored) else entry.values() for entry in content.values()]
    flat = [stored for entries in values for stored in entries]
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(content))
        archive.writestr("archive/byteorder", b"little")
        for number, stored in enumerate(flat):
            _write_storage(archive, f"archive/data/{number}", np.ascontiguousarray(stored.read()))
            progress(math.prod(stored.shape) * stored.dtype.itemsize)
        archive.writestr("archive/version", b"3\n")


def _write_storage(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Writes a storage so that it begins at a multiple of 64 bytes, as PyTorch maps it into memory."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = array.nbytes
    assert archive.fp is not None
    large = 20 if array.nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0
    start = archive.fp.tell() + _LOCAL_HEADER + len(name) + large + 4
    entry.extra = struct.pack("<HH", 0x4246, -start % _ALIGNMENT) + b"Z" * (-start % _ALIGNMENT)
    with archive.open(entry, "w") as file:
        file.write(array.reshape(-1).view(np.uint8).data)


def _pickled(content: Mapping[str, Stored | Tensors]) -> bytes:
    """The pickle of nested dictionaries of tensors, opcode by opcode: pickle itself would import PyTorch."""
    names, numbers = {np.dtype(dtype): name for name, dtype in _STORAGES.items()}, itertools.count()

    def tensor(stored: Stored) -> bytes:
        strides = np.cumprod([1, *stored.shape[:0:-1]])[::-1] if stored.shape else ()
        storage = b"(" + _text("storage") + f"ctorch\n{names[stored.dtype]}\n".encode()
        storage += _text(str(next(numbers))) + _text("cpu") + _number(math.prod(stored.shape)) + b"tQ"
        shape, steps = (b"(" + b"".join(map(_number, values)) + b"t" for values in (stored.shape, strides))
        rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0)
        return rebuilt + shape + steps + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"

    def dictionary(content: Mapping[str, Stored | Tensors]) -> bytes:
        entries = (
            _text(name) + (tensor(entry) if isinstance(entry, Stored) else dictionary(entry))
            for name, entry in content.items()
        )
        return b"}(" + b"".join(entries) + b"u"

    return b"\x80\x02" + dictionary(content) + b"."


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", int(value))


def read_torch_file(path: str | Path) -> Any:
    """Reads a PyTorch file.

    Args:
        path: What `torch.save` wrote, version 1.6 or later.

    Returns:
        What was saved, with a `Stored` for each tensor; objects other than containers and plain values are refused.

    Raises:
        CheckpointError: The file is damaged, is of the format before 1.6, or holds objects that would run code.
    """
    path = Path(path)
    try:
        archive = _Archive(path)
        return _Unpickler(archive).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (*_DAMAGED, AttributeError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a PyTorch file ({reason}); download it again") from error


@dataclass(frozen=True)
class _Type:
    """Stands for a storage class of PyTorch's."""

    dtype: np.dtype


@dataclass
class _Archive:
    """The zip file: where its records lie, and which have been compared with their checksums."""

    path: Path
    records: dict[str, zipfile.ZipInfo] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with self.path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(
                    f"{self.path}: no zip archive, as torch.save writes since PyTorch 1.6; load and save it again there"
                )
        with zipfile.ZipFile(self.path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{self.path}: no file of torch.save's (it has no data.pkl)")
            root = pickles[0].removesuffix("data.pkl")
            self.records = {entry.filename.removeprefix(root): entry for entry in archive.infolist()}
            self.pickle = archive.read(pickles[0])
            order = archive.read(root + "byteorder") if "byteorder" in self.records else b"little"
        if order != b"little":
            raise CheckpointError(f"{self.path}: written on a big-endian machine; load and save it again elsewhere")

    def storage(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        """Maps a storage into memory."""
        entry = self.records.get(f"data/{name}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < count * dtype.itemsize:
            raise CheckpointError(f"{self.path}: storage {name} is missing or too short; download it again")
        with self.path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER)
        start = entry.header_offset + _LOCAL_HEADER
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if not count:
            return np.zeros((0,), dtype)
        try:
            stored = np.memmap(self.path, np.uint8, "r", start, (entry.file_size,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: storage {name} lies outside the file; download it again") from error
        if name not in self.checked and zlib.crc32(stored.data) != entry.CRC:
            raise CheckpointError(f"{self.path}: storage {name} does not have its checksum; download it again")
        self.checked.add(name)
        return stored[: count * dtype.itemsize].view(dtype)


class _Unpickler(pickle.Unpickler):
    """Knows containers and tensors, and nothing that acts."""

    def __init__(self, archive: _Archive):
        super().__init__(io.BytesIO(archive.pickle))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name in the file.

        Raises:
            CheckpointError: It is none of the known ones.
        """
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Type(np.dtype(_STORAGES[name]))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in _BUILDERS:
            return _BUILDERS[name]
        raise CheckpointError(
            f"{self._archive.path}: holds an object of {module}.{name}, which is not read because it could run code; "
            "save the weights alone (model.state_dict())"
        )

    def persistent_load(self, pid: Any) -> Any:
        """Returns a function that maps a storage, with its type and length."""
        kind, storage, name, _, count = pid
        if kind != "storage" or not isinstance(storage, _Type):
            raise pickle.UnpicklingError(f"unknown storage {kind!r}")
        archive, dtype, length = self._archive, storage.dtype, int(count)
        if f"data/{name}" not in archive.records:
            raise CheckpointError(f"{archive.path}: storage {name} is missing; download it again")
        return _Storage(lambda: archive.storage(str(name), dtype, length), dtype, length)


@dataclass(frozen=True)
class _Storage:
    read: Callable[[], np.ndarray]
    dtype: np.dtype
    count: int


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Stored:
    """A tensor in its storage; only those that lie inside it."""
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {strides}")
    empty = 0 in shape
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if not empty and last >= storage.count:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches beyond its storage")

    def read() -> np.ndarray:
        if empty:
            return np.zeros(shape, storage.dtype)
        steps = tuple(stride * storage.dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(storage.read()[offset:], shape, steps, writeable=False)

    return Stored(shape, storage.dtype, read)


def _parameter(data: Stored, *_: Any) -> Stored:
    return data


_BUILDERS = {"_rebuild_tensor_v2": _tensor, "_rebuild_tensor": _tensor, "_rebuild_parameter": _parameter}
