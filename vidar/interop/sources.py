"""Tensors of other projects' checkpoints by name, read one at a time from files that stay on disk.

Safetensors files, sharded ones by their index, and PyTorch's zip files (`torch_file.py`). It knows files and names;
what the names mean is decided elsewhere.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vidar.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# In the header of safetensors files of vidar's: a JSON object of the tensors' CRC-32, eight hexadecimal digits each.
CHECKSUMS = "crc32"
INDEX_SUFFIX = ".safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# Wrappers leave their names in those of the tensors they hold.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("module.", "model.")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


Tensors = Mapping[str, Stored]


def open_tensors(path: str | Path, part: str | None = None) -> Tensors:
    """Opens a checkpoint of another project.

    Args:
        path: A `.safetensors` file, an index of several, a PyTorch file (`.pt`, `.pth`, `.bin`, `.ckpt`), or a
            directory that holds one of them.
        part: Which of several networks in a PyTorch file, such as `generator_ema`; None takes the first of
            `generator`, `model` (as Self Forcing does), `generator_ema`, or the file as a whole.

    Returns:
        Tensors by name, without the prefixes of wrappers.

    Raises:
        CheckpointError: There is nothing to open, a part is missing, or a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.name.endswith(INDEX_SUFFIX):
        tensors = _sharded(path)
    elif path.suffix == ".safetensors":
        tensors = _safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        from vidar.interop.torch_file import read_torch_file

        tensors = _part(path, read_torch_file(path), part)
        part = None
    else:
        raise CheckpointError(
            f"{path}: unknown kind of file; use .safetensors, its {INDEX_SUFFIX}, or {', '.join(TORCH_SUFFIXES)}"
        )
    if part is not None:
        raise CheckpointError(f"{path}: part {part!r} was asked for, but only PyTorch files hold several networks")
    return without_wrappers(tensors, path)


def without_wrappers(tensors: Tensors, where: str | Path = "checkpoint") -> Tensors:
    """Tensors by the names that the network itself gives them.

    Args:
        tensors: Tensors whose names may contain those of wrappers (FSDP, checkpointing, compilation, Self Forcing's
            `model.`).
        where: Named in the error.

    Returns:
        The tensors without them.

    Raises:
        CheckpointError: Two tensors would have the same name.
    """
    names = {}
    for name in tensors:
        short = name
        for wrapper in _WRAPPERS:
            short = short.replace(wrapper, "")
        names[name] = short
    for prefix in _PREFIXES:
        if names and all(short.startswith(prefix) for short in names.values()):
            names = {name: short.removeprefix(prefix) for name, short in names.items()}
    if len(set(names.values())) != len(names):
        raise CheckpointError(f"{where}: two tensors have the same name without their wrappers")
    return {short: tensors[name] for name, short in names.items()}


def _only_checkpoint(directory: Path) -> Path:
    """The checkpoint in a directory: an index before the files that it names."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    for suffixes in ((INDEX_SUFFIX,), (".safetensors",), TORCH_SUFFIXES):
        found = [path for path in files if path.name.endswith(suffixes)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{directory}: holds several checkpoints ({names}); name the one that you mean")
        if found:
            return found[0]
    inside = sorted(path.name for path in directory.iterdir() if path.is_dir())
    hint = f"; name one of its folders, such as {inside[0]}" if inside else ""
    raise CheckpointError(f"{directory}: holds no checkpoint{hint}")


def _safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    def read(file: Any, name: str, checksum: str | None) -> np.ndarray:
        array = file.get_tensor(name)
        if checksum is not None and f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}" != checksum:
            raise CheckpointError(f"{path}: {name} does not have its checksum; download or convert it again")
        return array

    def stored(file: Any, name: str, checksum: str | None) -> Stored:
        part = file.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise CheckpointError(f"{path}: {name} has type {part.get_dtype()}, which is unknown here")
        return Stored(tuple(part.get_shape()), DTYPES[part.get_dtype()], lambda: read(file, name, checksum))

    try:
        file = safe_open(path, framework="np")
        checksums = json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))
        return {name: stored(file, name, checksums.get(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); download it again") from error


def _sharded(path: Path) -> dict[str, Stored]:
    try:
        where = json.loads(path.read_text())["weight_map"]
        shards = {name: path.parent / name for name in sorted(set(where.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no index of safetensors files (it has no weight_map)") from error
    missing = [name for name, shard in shards.items() if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{path}: names {', '.join(missing)}, which {path.parent} lacks; download it again")
    tensors = {shard: _safetensors(file) for shard, file in shards.items()}
    lost = [name for name, shard in where.items() if name not in tensors[shard]]
    if lost:
        raise CheckpointError(f"{path}: {lost[0]} is not in {where[lost[0]]}; download it again")
    return {name: tensors[shard][name] for name, shard in where.items()}


def _part(path: Path, content: Any, part: str | None) -> dict[str, Stored]:
    """The tensors of one network in what a PyTorch file holds."""
    if isinstance(content, dict) and part is None:
        part = next(
            (name for name in ("generator", "model", "generator_ema") if isinstance(content.get(name), dict)), None
        )
    if part is not None:
        if not isinstance(content, dict) or not isinstance(content.get(part), dict):
            known = ", ".join(str(key) for key, value in content.items() if isinstance(value, dict)) or "none"
            raise CheckpointError(f"{path}: holds no network {part!r}; it has {known}")
        content = content[part]
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Stored):
            tensors[str(name)] = value
    if not tensors:
        entries = content.items() if isinstance(content, dict) and part is None else ()
        networks = [str(key) for key, value in entries if isinstance(value, dict)]
        hint = f"; name one of {', '.join(networks)} as the part" if networks else ""
        raise CheckpointError(f"{path}: holds no tensors by name{hint}")
    return tensors
