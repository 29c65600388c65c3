"""Weights of one network as a single safetensors file, with the config they belong to in its header.

For inference and for what a package ships; training state lives in checkpoints. This module must not know networks.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp

from vidar.errors import CheckpointError, make_directory

SUFFIX = ".safetensors"


def save_weights(path: str | Path, networks: Mapping[str, Any], meta: Mapping[str, Any], dtype: Any = None) -> None:
    """Writes networks to one file, completely or not at all.

    Args:
        path: File to write, ending in `.safetensors`.
        networks: Networks by role.
        meta: JSON-able description, such as the config.
        dtype: Type to store in; None keeps each array's own.

    Raises:
        CheckpointError: The file cannot be written.
    """
    from safetensors.flax import save

    arrays = {
        f"{role}{jax.tree_util.keystr(leaf_path)}": leaf if dtype is None else leaf.astype(dtype)
        for role, network in networks.items()
        for leaf_path, leaf in jax.tree_util.tree_flatten_with_path(network)[0]
    }
    with whole_file(path) as file:
        file.write(save(arrays, {"vidar": json.dumps(dict(meta), sort_keys=True)}))


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces the one of that name when it is complete, and never before.

    Args:
        path: The file; its folder is made.

    Yields:
        What to write to.

    Raises:
        CheckpointError: It cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    make_directory(path.parent, CheckpointError)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def is_weights(path: Path) -> bool:
    """Whether a file is one of `save_weights`, by its header."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        with safe_open(path, framework="flax") as file:
            return "vidar" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_meta(path: str | Path) -> dict[str, Any]:
    """Reads the description in the header of a weights file.

    Args:
        path: The file.

    Returns:
        What was given to `save_weights`.

    Raises:
        CheckpointError: There is no such file, or it is no weights file of vidar's.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="flax") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({error}); copy the file again") from error
    if "vidar" not in header:
        raise CheckpointError(f"{path}: not a weights file of vidar's (its header has no config)")
    try:
        meta = json.loads(header["vidar"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}); copy the file again") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: not a weights file of vidar's (its header is no dictionary)")
    return meta


def load_weights(path: str | Path, role: str, template: Any) -> Any:
    """Reads one network.

    Args:
        path: The file.
        role: Which network of the file.
        template: The network with `jax.ShapeDtypeStruct` leaves; arrays are cast to its types.

    Returns:
        The network.

    Raises:
        CheckpointError: The file is damaged, or does not hold this network.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({error}); copy the file again") from error
    leaves, tree = jax.tree_util.tree_flatten_with_path(template)
    loaded = []
    for leaf_path, leaf in leaves:
        name = f"{role}{jax.tree_util.keystr(leaf_path)}"
        if name not in arrays or arrays[name].shape != leaf.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise CheckpointError(f"{path}: {name} should be {leaf.shape}, found {found}; wrong file or wrong config")
        loaded.append(jnp.asarray(arrays[name], leaf.dtype))
    return jax.tree.unflatten(tree, loaded)
