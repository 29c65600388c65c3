"""Writes tensors as checkpoints that other projects load: safetensors, sharded where large, and PyTorch's files.

Tensors are read as they are written, one in memory at a time; a file replaces another only when it is complete. A
folder is written aside and moved when all of it is there, so that an interrupted conversion goes on where it was. It
knows files and names; what the names mean is decided elsewhere.
"""

import fcntl
import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from vidar.errors import CheckpointError, ConfigError, make_directory
from vidar.interop.sources import CHECKSUMS, DTYPES, INDEX_SUFFIX, TORCH_SUFFIXES, Stored, Tensors
from vidar.interop.torch_file import Progress, write_torch_file
from vidar.weights import whole_file

SHARD_BYTES = 2 * 2**30
_PART = "generator_ema"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RECORD = "source.json"
_logger = logging.getLogger("vidar")


def save_tensors(
    path: str | Path,
    tensors: Tensors,
    *,
    stem: str = "model",
    shard: int = SHARD_BYTES,
    source: str | None = None,
    progress: Progress = int,
) -> list[Path]:
    """Writes a checkpoint.

    Args:
        path: A `.pt` file, which gets the network as `generator_ema` with Self Forcing's `model.` before each name; a
            `.pth` file, which gets the tensors by their own names, as Wan's; a `.safetensors` file; or a directory,
            which gets `stem.safetensors`, in shards with an index where one file would be larger than a shard. Until a
            directory is complete, its files lie in `stem.part` inside it.
        tensors: Tensors by name.
        stem: Name of the files in a directory.
        shard: Largest number of bytes of a file, unless a single tensor is larger.
        source: What the tensors come from, as `fingerprint` says it. If an earlier call for this directory was
            interrupted and its source was the same, the shards that it completed are checked and kept. None starts
            anew.
        progress: Called with a number of bytes whenever so many more are written, such as `tqdm.update`.

    Returns:
        The files.

    Raises:
        ConfigError: One file was asked for where the tensors do not fit into a shard, or the directory holds shards
            of another checkpoint.
        CheckpointError: A file cannot be written, or a tensor cannot be read.
    """
    path = Path(path)
    if path.suffix == ".pt":
        write_torch_file(path, {_PART: {f"model.{name}": stored for name, stored in tensors.items()}}, progress)
        return [path]
    if path.suffix == ".pth":
        write_torch_file(path, dict(tensors), progress)
        return [path]
    shards = _shards(tensors, shard)
    if path.suffix == ".safetensors":
        if len(shards) > 1:
            raise ConfigError(
                f"{path}: {size(tensors) / 2**30:.1f} GiB do not fit into one file of {shard / 2**30:.1f} GiB; "
                "name a directory"
            )
        _save(path, shards[0], progress)
        return [path]
    if path.suffix[1:].isalpha() and not path.is_dir():  # Wan2.1 is a directory's name
        raise ConfigError(f"{path}: unknown kind of file; name a .safetensors, .pth or .pt file, or a directory")
    return _save_directory(path, shards, stem, source, progress)


def size(tensors: Tensors) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(map(_size, tensors.values()))


def fingerprint(*sources: str | Path | None, **options: Any) -> str:
    """Says what a conversion reads and how, so that one that was interrupted goes on only with the same.

    Args:
        sources: Checkpoints as `open_tensors` takes them; None stands for one that is not given.
        options: What else decides about the result; JSON-able.

    Returns:
        Names, sizes and times of the files, and the options.
    """
    files = [file for source in sources if source is not None for file in checkpoint_files(Path(source))]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps({"files": stats, "options": options}, sort_keys=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, completely or not at all.

    Raises:
        CheckpointError: It cannot be written.
    """
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


# --------------------------------------------------------------------------------------------------------- directories


def _save_directory(
    path: Path, shards: list[dict[str, Stored]], stem: str, source: str | None, progress: Progress
) -> list[Path]:
    count = len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    index = f"{stem}{INDEX_SUFFIX}"
    work = path / f"{stem}.part"
    make_directory(path, CheckpointError)
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigError(f"{path}: another conversion is writing here; wait for it, or name another one") from error
    try:
        _check_free(path, [*names, index] if count > 1 else names)
        _begin(work, source)
        kept = 0
        for name, part in zip(names, shards, strict=True):
            if _holds(work / name, part):
                kept += 1
                progress(size(part))
            else:
                _save(work / name, part, progress)
        if kept:
            _logger.info("%s: kept %d of %d files of an interrupted conversion", path, kept, count)
        if count > 1:
            where = {tensor: name for name, part in zip(names, shards, strict=True) for tensor in part}
            total = {"total_size": sum(map(size, shards))}
            write_json(work / index, {"metadata": total, "weight_map": where})
            # While files are moved there is no index, so that shards of two checkpoints are never taken for one.
            (path / index).unlink(missing_ok=True)
            names.append(index)
        for name in names:
            (work / name).replace(path / name)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another"
        ) from error
    finally:
        os.close(lock)
        if source is None or not any(work.glob("*.safetensors")):
            with suppress(OSError):
                _empty(work)
                work.rmdir()
    return [path / name for name in names]


def _check_free(path: Path, names: list[str]) -> None:
    """Refuses a directory in which files of another checkpoint would lie between the new ones."""
    there = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    kinds = (".safetensors", INDEX_SUFFIX, *TORCH_SUFFIXES)
    others = [name for name in there if name.endswith(kinds) and name not in names]
    if others:
        raise ConfigError(f"{path}: holds {others[0]} of another checkpoint; delete it, or name another directory")


def _begin(work: Path, source: str | None) -> None:
    """Makes the directory of unfinished work, and empties it unless the work in it is of the same source."""
    make_directory(work, CheckpointError)
    record = work / _RECORD
    if source is not None and record.is_file() and record.read_bytes() == source.encode():
        return
    _empty(work)
    if source is not None:
        with whole_file(record) as file:
            file.write(source.encode())


def _empty(work: Path) -> None:
    for file in work.iterdir():
        file.unlink()


def checkpoint_files(path: Path) -> list[Path]:
    """The files that a checkpoint may consist of, with the settings beside them."""
    suffixes = (".safetensors", ".json", *TORCH_SUFFIXES)
    if path.is_file() and not path.name.endswith(INDEX_SUFFIX):
        beside = (path.parent / "config.json", path.parent / "adapter_config.json")
        return [path, *(file for file in beside if file.is_file())]
    folder = path if path.is_dir() else path.parent
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(suffixes))


def _shards(tensors: Tensors, limit: int) -> list[dict[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    held = 0
    for name, stored in tensors.items():
        if shards[-1] and held + _size(stored) > limit:
            shards.append({})
            held = 0
        shards[-1][name] = stored
        held += _size(stored)
    return shards


def _size(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


# --------------------------------------------------------------------------------------------------------------- files


def _save(path: Path, tensors: Tensors, progress: Progress) -> None:
    """Writes a safetensors file, a tensor at a time; its checksums are filled in at the end."""
    checksums = dict.fromkeys(tensors, 0)
    with whole_file(path) as file:
        file.write(_header(tensors, checksums))
        for name, stored in _ordered(tensors):
            data = _bytes(name, stored)
            checksums[name] = zlib.crc32(data)
            file.write(data)
            progress(len(data))
            del data  # before the next is read
        file.seek(0)
        file.write(_header(tensors, checksums))


def _bytes(name: str, stored: Stored) -> memoryview:
    array = np.asarray(stored.read(), order="C")
    if (array.shape, array.dtype) != (stored.shape, stored.dtype):
        raise CheckpointError(f"{name} is {array.dtype} {list(array.shape)}, and not what its file said before")
    return array.reshape(-1).view(np.uint8).data


def _holds(path: Path, tensors: Tensors) -> bool:
    """Whether a file holds these tensors whole, by its own checksums."""
    length = len(_header(tensors, dict.fromkeys(tensors, 0)))
    checksums = {}
    try:
        with path.open("rb") as file:
            header = file.read(length)
            for name, stored in _ordered(tensors):
                checksums[name] = zlib.crc32(file.read(_size(stored)))
            more = file.read(1)
    except OSError:
        return False
    return not more and header == _header(tensors, checksums)


def _ordered(tensors: Tensors) -> list[tuple[str, Stored]]:
    """Tensors as they lie in a file: those of wide types first, so that each begins at a multiple of its own width."""
    return sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)


def _header(tensors: Tensors, checksums: Mapping[str, int]) -> bytes:
    """The beginning of a safetensors file: its length, and in JSON where tensors lie; as long for any checksums."""
    sums = json.dumps({name: f"{checksums[name]:08x}" for name in tensors})
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS: sums}}
    start = 0
    for name, stored in _ordered(tensors):
        end = start + _size(stored)
        entries[name] = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
