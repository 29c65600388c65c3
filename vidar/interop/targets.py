"""Writes tensors as checkpoints that other projects load: safetensors, sharded where large, and PyTorch's files.

Tensors are read as they are written, a shard at a time; a file replaces another only when it is complete. It knows
files and names; what the names mean is decided elsewhere.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidar.errors import CheckpointError, ConfigError, make_directory
from vidar.interop.sources import INDEX_SUFFIX, Stored, Tensors
from vidar.interop.torch_file import write_torch_file
from vidar.weights import whole_file

SHARD_BYTES = 2 * 2**30
_PART = "generator_ema"

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def save_tensors(
    path: str | Path, tensors: Tensors, *, stem: str = "model", shard: int = SHARD_BYTES, progress: Progress = iter
) -> list[Path]:
    """Writes a checkpoint.

    Args:
        path: A `.pt` file, which gets the network as `generator_ema` with Self Forcing's `model.` before each name; a
            `.safetensors` file; or a directory, which gets `stem.safetensors`, in shards with an index where one file
            would be larger than a shard.
        tensors: Tensors by name.
        stem: Name of the files in a directory.
        shard: Largest number of bytes of a file, unless a single tensor is larger.
        progress: Wraps the list of files, such as `tqdm`.

    Returns:
        The files.

    Raises:
        ConfigError: One file was asked for where the tensors do not fit into a shard.
        CheckpointError: A file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".pt":
        write_torch_file(path, {_PART: {f"model.{name}": stored for name, stored in tensors.items()}})
        return [path]
    shards = _shards(tensors, shard)
    if path.suffix == ".safetensors":
        if len(shards) > 1:
            raise ConfigError(
                f"{path}: {sum(map(_size, tensors.values())) / 2**30:.1f} GiB do not fit into one file of "
                f"{shard / 2**30:.1f} GiB; name a directory"
            )
        _save(path, shards[0])
        return [path]
    if path.suffix:
        raise ConfigError(f"{path}: unknown kind of file; name a .safetensors or .pt file, or a directory")
    make_directory(path, CheckpointError)
    count = len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    for name, part in progress(list(zip(names, shards, strict=True))):
        _save(path / name, part)
    files = [path / name for name in names]
    if count > 1:
        where = {tensor: name for name, part in zip(names, shards, strict=True) for tensor in part}
        total = {"total_size": sum(map(_size, tensors.values()))}
        files.append(path / f"{stem}{INDEX_SUFFIX}")
        write_json(files[-1], {"metadata": total, "weight_map": where})
    return files


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, completely or not at all.

    Raises:
        CheckpointError: It cannot be written.
    """
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


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


def _save(path: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save

    with whole_file(path) as file:
        file.write(
            save({name: np.asarray(stored.read(), order="C") for name, stored in tensors.items()}, {"format": "pt"})
        )
